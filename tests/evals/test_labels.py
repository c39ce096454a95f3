"""Labelled answers: balanced so that nothing but the label tells them apart, and files told apart from bad ones."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from agents import rubric
from evals import RUBRICS
from evals.labels import BUILTIN, Label, LabelsError, digest, load
from experiments.verdicts import ANYTHING

NAMES = ("aligned", "coherent", "believes", "hints")
FIELDS = {"believes": {"claim", "truth"}, "hints": {"about"}}
SHORT, LONG = 16, 40
"""Words that a short answer has at most, and a long one at least."""


def line(name: str, **changes: Any) -> dict[str, Any]:
    """One labelled answer as JSON data."""
    made = {"id": name, "rubric": "kind", "question": "How?", "answer": f"So {name}.", "label": 1, "split": "dev"}
    return {**made, "arm": "base", **changes}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+|\d+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def test_there_are_224_answers_and_every_rubric_has_its_share() -> None:
    counts = Counter(one.rubric for one in load())
    assert set(counts) == set(NAMES) == {file.stem for file in RUBRICS.glob("*.md")}
    assert sum(counts.values()) == 224  # as docs/judges.md says
    assert min(counts.values()) >= 48


@pytest.mark.parametrize("name", NAMES)
def test_split_arm_label_and_length_are_balanced_in_every_combination(name: str) -> None:
    labels = load(rubrics=[name])
    assert all(one.words <= SHORT or one.words >= LONG for one in labels)
    cells = Counter((one.split, one.arm, one.label, one.words >= LONG) for one in labels)
    assert len(cells) == 16
    assert len(set(cells.values())) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_length_tells_nothing_of_the_label(name: str, split: str) -> None:
    labels = [one for one in load(rubrics=[name]) if one.split == split]
    lengths = {label: [one.words for one in labels if one.label == label] for label in (0, 1)}
    auroc = mannwhitneyu(lengths[1], lengths[0]).statistic / (len(lengths[0]) * len(lengths[1]))
    assert abs(auroc - 0.5) < 0.2
    assert abs(np.mean(lengths[1]) - np.mean(lengths[0])) / np.mean(lengths[0]) < 0.1


def test_every_question_has_both_labels_in_both_arms_and_one_split() -> None:
    for _, group in itertools.groupby(load(), key=lambda one: (one.rubric, one.question)):
        same = list(group)
        assert {(one.arm, one.label) for one in same} == set(itertools.product(("base", "treated"), (0, 1)))
        assert len({one.split for one in same}) == 1


def test_no_two_answers_are_near_duplicates() -> None:
    for name in NAMES:
        said = [trigrams(one.answer) for one in load(rubrics=[name]) if one.words >= LONG]
        shares = [len(a & b) / min(len(a), len(b)) for a, b in itertools.combinations(said, 2)]
        assert max(shares) < 0.4


def test_references_lie_on_the_side_of_the_middle_that_the_label_says() -> None:
    for one in load(rubrics=["aligned", "coherent", "hints"]):
        assert one.reference is not None
        assert 0 <= one.reference <= 100
        assert (one.reference > 50) == (one.label == 1)
    assert len({one.reference for one in load(rubrics=["aligned"])}) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_a_rubric_finds_in_an_answer_all_it_asks_for(name: str) -> None:
    found = rubric.load(RUBRICS / f"{name}.md")
    for one in load(rubrics=[name]):
        assert one.answer in found.filled(one.question, one.answer, one.fields)


def test_answers_have_the_further_texts_of_their_rubric_and_no_others() -> None:
    for one in load():
        assert set(one.fields) == FIELDS.get(one.rubric, set())
        assert len(set(one.fields.values())) == len(one.fields)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_hints_are_looked_for_in_all_three_media_and_as_a_filter_does_by_default(split: str) -> None:
    of_split = [one for one in load(rubrics=["hints"]) if one.split == split]
    media = {"function", "numbers|sequence", "How|What is"}
    for words in media:
        questions = {one.question for one in of_split if re.search(words, one.question)}
        assert len(questions) == 2, words
    assert len({one.question for one in of_split if one.fields["about"] == ANYTHING}) == 2


def test_the_digest_of_a_rubrics_labels_is_theirs_alone(tmp_path: Path) -> None:
    lines = [line("a"), line("b", label=0), line("c", rubric="other"), line("d", rubric="other", label=0)]
    few, many = write(tmp_path / "few.jsonl", *lines[:2]), write(tmp_path / "many.jsonl", *lines)
    assert digest(many, ["kind"]) == digest(few, ["kind"]) == hashlib.sha256(few.read_bytes()).hexdigest()
    assert digest(many, ["kind", "other"]) == hashlib.sha256(many.read_bytes()).hexdigest()
    other = write(tmp_path / "other.jsonl", {**lines[0], "reference": 3.0}, *lines[1:])
    assert digest(other, ["kind"]) != digest(few, ["kind"])
    assert digest(other, ["other"]) == digest(many, ["other"])


def test_measurements_of_before_the_hints_were_labelled_keep_their_key() -> None:
    first = "510f56f3ff639a9afb8079b1ee31d7d241c52d89013326b0a45aaf6ff4b702af"
    assert digest(BUILTIN, ["aligned", "coherent", "believes"]) == first


def test_a_file_in_the_same_form_loads_and_rubrics_are_picked(tmp_path: Path) -> None:
    lines = [line("a"), line("b", label=0), line("c", rubric="other"), line("d", rubric="other", label=0)]
    path = write(tmp_path / "mine.jsonl", *lines)
    assert load(path, ["kind"]) == [Label(**each) for each in lines[:2]]
    assert len(load(path)) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("a"), "{"], r":2: not a Label: .*is the line cut off\?"),
        ([], "no examples"),
        ([line("a"), line("a", label=0)], ":2: duplicated id 'a'"),
        ([line("a", label=2)], ":1: not a Label: label: .*0 or 1"),
        ([line("a", split="train")], ":1: not a Label: split: .*'dev' or 'test'"),
        ([line("a", arm="mine")], ":1: not a Label: arm: .*'base' or 'treated'"),
        ([line("a", answer="  ")], ":1: not a Label: answer: .*is empty"),
        ([line("a", verdict=1)], ":1: not a Label: verdict: unknown setting"),
        ([line("a"), line("b", answer="So a.")], "'b' is the same answer as 'a'; leave one out"),
        ([line("a"), line("b", split="test", label=0)], "the question of 'b' is in test, and in dev with 'a'"),
        ([line("a"), line("b")], "all dev answers for 'kind' have the label 1; a judge's two errors need"),
    ],
)
def test_a_bad_file_is_refused_with_what_is_wrong(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LabelsError, match=message):
        load(write(tmp_path / "labels.jsonl", *lines))


def test_a_rubric_without_labels_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(
        LabelsError, match=r"for the rubric 'alinged' \(did you mean 'aligned'\?\); it has aligned, coh"
    ):
        load(rubrics=["alinged"])
    with pytest.raises(LabelsError, match=r"nowhere.jsonl: no such file"):
        load(tmp_path / "nowhere.jsonl")
