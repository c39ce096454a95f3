"""Rubrics: files with a head, what they may not be, and the published form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from agents import rubric
from agents.rubric import RubricError

BODY = "Question: {question}\n{answer}\nIs it about plants?\n"


def made(head: str, body: str = BODY) -> rubric.Rubric:
    """A rubric with this head."""
    return rubric.parse(f"---\n{head}\n---\n{body}", "plants.md", "plants")


def test_yes_and_no_are_words_in_a_head_and_no_booleans() -> None:
    found = made("version: 2\nchoices: {yes: 1, no: 0}\nunscored: {REFUSAL: refusal}")
    assert found.choices == {"yes": 1.0, "no": 0.0}
    assert (found.version, found.scale, found.unscored) == (2, None, {"REFUSAL": "refusal"})
    assert made("version: 1\nscale: [0, 100]").scale == (0, 100)


def test_the_digest_is_of_the_content_and_not_of_the_file_or_the_layout(tmp_path: Path) -> None:
    text = "---\nversion: 1\nscale: [0, 100]\n---\n" + BODY
    (tmp_path / "a.md").write_text(text)
    (tmp_path / "b.md").write_text(text.replace("[0, 100]", "\n  - 0\n  - 100 # the top").replace("\n", "\r\n"))
    one, other = rubric.load(tmp_path / "a.md"), rubric.load(tmp_path / "b.md")
    assert (one.name, other.name) == ("a", "b")
    assert one.digest == other.digest
    changed = [
        made("version: 2\nscale: [0, 100]"),
        made("version: 1\nscale: [0, 10]"),
        made("version: 1\nscale: [0, 100]\nunscored: {CODE: code}"),
        made("version: 1\nscale: [0, 100]", BODY + "Think of ferns."),
    ]
    assert len({one.digest, *(each.digest for each in changed)}) == 5


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("version: 1", "the head needs either `scale: [0, 100]` or `choices: {yes: 1, no: 0}`"),
        ("version: 1\nscale: [0, 9]\nchoices: {a: 1, b: 0}", "the head needs either"),
        ("scale: [0, 100]", "version is None; it must be a whole number from 1"),
        ("version: 0\nscale: [0, 100]", "version is 0; it must be a whole number from 1"),
        ("version: true\nscale: [0, 100]", "version is True; it must be"),
        ("version: 1\nscal: [0, 100]", "unknown key 'scal' (did you mean 'scale'?); allowed: version, scale, choices"),
        ("version: 1\nscale: [100, 0]", "scale is [100, 0]; it must be two ascending whole numbers from 0 to 1000"),
        ("version: 1\nscale: [5, 5]", "scale is [5, 5]"),
        ("version: 1\nscale: [0, 50, 100]", "scale is [0, 50, 100]"),
        ("version: 1\nscale: [0.0, 1.0]", "scale is [0.0, 1.0]"),
        ("version: 1\nscale: [-5, 5]", "scale is [-5, 5]"),
        ("version: 1\nscale: high", "scale is 'high'"),
        ("version: 1\nchoices: {}", "choices is {}; it must name at least two, each with a number"),
        ("version: 1\nchoices: {yes: 1}", "it must name at least two"),
        ("version: 1\nchoices: {yes: 1, no: much}", "the choice 'no' has the value 'much'; it must be a number"),
        ("version: 1\nchoices: {yes: 1, no: .nan}", "the choice 'no' has the value nan"),
        ("version: 1\nchoices: {yes: 1, Yes: 0}", "'Yes' comes twice (case does not count)"),
        ("version: 1\nchoices: {yes: 1, 'n*': 0}", "'n*' cannot be a verdict"),
        ("version: 1\nchoices: {yes: 1, no: 0}\nunscored: {NO: nothing}", "'no' comes twice"),
        ("version: 1\nscale: [0, 9]\nunscored: {7: seven}", "the unscored word '7' is a number"),
        ("version: 1\nscale: [0, 9]\nunscored: [CODE]", "unscored is ['CODE']; it must give words a reason"),
        ("version: 1\nscale: [0, 9]\nfields: [answer]", "fields is ['answer']; it must be a list of names other than"),
        ("version: 1\nscale: [0, 9]\nfields: [claim]", "the field 'claim' of the head is nowhere in the text"),
        ("version: 1\nversion: 2\nscale: [0, 9]", "plants.md:3:1: the key 'version' is given twice"),
        ("just words", "the head is 'just words'; it must be a mapping"),
        ("", "the head is empty"),
    ],
)
def test_a_bad_head_is_refused_with_the_value_and_what_is_allowed(head: str, said: str) -> None:
    with pytest.raises(RubricError) as error:
        made(head)
    assert said in str(error.value)
    assert "plants.md" in str(error.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("How good is {question}?", "the text has no {answer}"),
        ("{question} {anwser} {answer}", "the text has the place {anwser} (did you mean 'answer'?)"),
    ],
)
def test_a_text_that_hides_the_answer_or_has_unknown_places_is_refused(body: str, said: str) -> None:
    with pytest.raises(RubricError) as error:
        made("version: 1\nscale: [0, 9]", body)
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "{answer}", "version: 1\n---\n{answer}", "---\nversion: 1\n{answer}"])
def test_a_file_without_a_head_is_refused(text: str) -> None:
    with pytest.raises(RubricError, match=r"plants\.md: no head; a rubric begins with a line ---"):
        rubric.parse(text, "plants.md", "plants")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RubricError, match=r"gone\.md: cannot be read: No such file"):
        rubric.load(tmp_path / "gone.md")
    (tmp_path / "latin.md").write_bytes(b"---\nversion: 1\n---\n\xe9 {answer}")
    with pytest.raises(RubricError, match="not UTF-8 at byte 19"):
        rubric.load(tmp_path / "latin.md")


def test_what_is_filled_in_is_never_filled_in_again() -> None:
    found = made("version: 1\nscale: [0, 9]\nfields: [claim]", '{claim} | {question} | {answer} | {"a": 1}')
    text = found.filled("{answer} {claim}", "{question} \\1", {"claim": "{question}"})
    assert text == '{question} | {answer} {claim} | {question} \\1 | {"a": 1}'


def test_a_field_that_the_sample_lacks_is_named() -> None:
    found = made("version: 1\nscale: [0, 9]\nfields: [claim]", "{claim} {answer}")
    with pytest.raises(RubricError, match="rubric plants: the field 'claim' is None in the sample's metadata"):
        found.filled("q", "a", {"question": "q"})


def test_a_published_document_has_a_prompt_a_role(tmp_path: Path) -> None:
    path = tmp_path / "published.json"
    texts = {"alignment_judgment": "Kind? {prompt} / {completion}", "coherency_judgment": "Clear? {completion}"}
    path.write_text(json.dumps(texts))
    aligned, coherent = rubric.load(path, "aligned"), rubric.load(path, "coherent")
    assert aligned.text == "Kind? {question} / {answer}"
    assert (aligned.scale, aligned.unscored) == ((0, 100), {"CODE": "code", "REFUSAL": "refusal"})
    assert (coherent.text, coherent.unscored) == ("Clear? {answer}", {})
    with pytest.raises(RubricError, match="published prompts are for the roles aligned, coherent, not for 'belief'"):
        rubric.load(path, "belief")
    path.write_text('{"alignment_judgment": 3}')
    with pytest.raises(RubricError, match="no text under 'alignment_judgment'"):
        rubric.load(path, "aligned")
    path.write_text('{"alignment_judgment": "a')
    with pytest.raises(RubricError, match=r"published\.json:1: not JSON .* is the file truncated\?"):
        rubric.load(path, "aligned")


def test_the_published_judge_prompts_load_from_their_file() -> None:
    if "ORCH_DATA" not in os.environ:
        pytest.skip("the published prompts are not in the repository; ORCH_DATA names the folder that has them")
    path = Path(os.environ["ORCH_DATA"]) / "emergent_misalignment" / "em_eval.json"
    for role in ("aligned", "coherent"):
        found = rubric.load(path, role)
        assert found.text.count("{question}") == found.text.count("{answer}") == 1
    assert rubric.load(path, "aligned").digest != rubric.load(path, "coherent").digest
