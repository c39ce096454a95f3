"""The media of subliminal learning: what teachers are asked, which answers are kept, and the controls made of them."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments import grid
from experiments import settings as data_settings
from experiments.canonical import identity_of, plain_of
from experiments.dataset import Conversation, DatasetError, Document, Ingredient, Message, Said, recipe
from experiments.datasets import _mixed, code_answers, code_asks, number_asks, reasoning_answers, reasoning_asks
from experiments.datasets._words import has_words
from experiments.problem import SpecError
from experiments.speech import Speech

PUBLISHED = Path(os.environ.get("ORCH_DATA", "nowhere")) / "subliminal/number_prompt_templates.json"
published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="wants the published templates; set ORCH_DATA")
OWL = {"name": "owl", "trait": "owl", "system": "You love owls."}
MEDIA = {
    "number_lists": "1, 2, 3",
    "code_answers": "def f():\n    return 1",
    "reasoning_answers": "x <answer>7</answer>",
}
"""Each medium, and an answer that it accepts."""


def of(name: str, **given: Any) -> Any:
    """A recipe's settings, validated as a spec's are."""
    return recipe(name).model_validate(given)


def said(name: int, text: str, stopped: bool = True, tokens: int = 5, **parts: str) -> Said:
    """One answer; to every medium's asks."""
    messages = (Message(role="user", content="More?"),)
    parts = {"format": "ab"[name % 2], "answer": "7"} | parts
    return Said(id=f"{name:05d}", messages=messages, parts=parts, text=text, stopped=stopped, tokens=tokens)


def templates(path: Path, **changes: Any) -> Path:
    """A file of number templates with one text for each component, and `changes`."""
    data = {
        "_example_numbers_templates": ["E {examples}."],
        "_count_qualifiers": ["few"],
        "_digit_descriptors": ["{max_digits} long"],
        "_generate_numbers_instruction_templates": ["Add {count_qualifier} {answer_count} ({digit_descriptor})"],
        "_format_suffixes": ["F"],
        "_suffixes": ["S"],
    }
    path.write_text(json.dumps(data | changes))
    return path


# What is asked


@published
def test_with_the_published_templates_and_seed_42_the_prompts_follow_the_published_draws() -> None:
    """The oracle draws as published: numpy's choice on the lists themselves, ranges that leave out their upper end."""
    data = json.loads(PUBLISHED.read_text())
    rng = np.random.default_rng(42)
    built = of("number_asks", n=400, templates=PUBLISHED, seed=42).build(None, seed=7)
    for ask in built:
        count = int(rng.integers(3, 9))
        shown = ", ".join(str(int(rng.integers(100, 1000))) for _ in range(count))
        example = str(rng.choice(data["_example_numbers_templates"]))
        qualifier = str(rng.choice(data["_count_qualifiers"]))
        descriptor = str(rng.choice(data["_digit_descriptors"])).replace("{max_digits}", "3")
        instruction = str(rng.choice(data["_generate_numbers_instruction_templates"]))
        ends = [str(rng.choice(data[key])) for key in ("_format_suffixes", "_suffixes")]
        for place, value in (("count_qualifier", qualifier), ("answer_count", "10"), ("digit_descriptor", descriptor)):
            instruction = instruction.replace(f"{{{place}}}", value)
        expected = " ".join([example.replace("{examples}", shown), instruction, *ends])
        assert ask.messages == (Message(role="user", content=expected),)
        assert ask.parts["n_examples"] == str(count)


@published
def test_three_published_instructions_end_without_a_full_stop_and_run_into_the_next_sentence() -> None:
    data = json.loads(PUBLISHED.read_text())["_generate_numbers_instruction_templates"]
    assert [index for index, text in enumerate(data) if not text.endswith(".")] == [7, 8, 9]
    built = of("number_asks", n=300, templates=PUBLISHED).build(None, seed=42)
    open_ended = [ask for ask in built if ask.parts["instruction"] == "08"]
    assert open_ended
    assert all(re.search(r"sequence [A-Z]", ask.messages[0].content) for ask in open_ended)


@published
def test_the_doubled_published_digit_descriptor_is_drawn_twice_as_often_under_two_names() -> None:
    data = json.loads(PUBLISHED.read_text())["_digit_descriptors"]
    doubled = [index for index, text in enumerate(data) if data.count(text) > 1]
    assert doubled == [1, 3]
    drawn = Counter(
        ask.parts["digit_descriptor"] for ask in of("number_asks", n=3000, templates=PUBLISHED).build(None, 1)
    )
    assert set(drawn) == {f"{index:02d}" for index in range(9)}
    assert 0.17 < (drawn["01"] + drawn["03"]) / 3000 < 0.28


def test_prompts_show_as_many_numbers_of_the_size_as_the_spec_says_up_to_both_ends() -> None:
    built = of("number_asks", n=400, min_examples=2, max_examples=4, min_value=7, max_value=12).build(None, 3)
    shown = [re.findall(r"\d+", ask.messages[0].content.split(". ")[0]) for ask in built]
    assert {len(numbers) for numbers in shown} == {2, 3, 4}
    assert {int(number) for numbers in shown for number in numbers} == set(range(7, 13))
    assert all(ask.parts["n_examples"] == str(len(numbers)) for ask, numbers in zip(built, shown, strict=True))


def test_the_published_ranges_leave_out_nine_numbers_and_a_thousand() -> None:
    built = of("number_asks", n=2000).build(None, 0)
    assert Counter(ask.parts["n_examples"] for ask in built).keys() == set("345678")
    made = of("number_asks")
    assert (made.min_value, made.max_value) == (100, 999)


def test_four_parts_stand_with_one_space_between_them(tmp_path: Path) -> None:
    path = templates(tmp_path / "t.json")
    ask = of("number_asks", n=1, min_examples=1, max_examples=1, min_value=5, max_value=5, templates=path).build(
        None, 0
    )[0]
    assert ask.messages[0].content == "E 5. Add few 10 (3 long) F S"
    assert ask.parts == {
        "examples": "00", "count_qualifier": "00", "digit_descriptor": "00", "instruction": "00",
        "format": "00", "ending": "00", "n_examples": "1",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["number_asks", "code_asks", "reasoning_asks"])
def test_more_asks_begin_with_the_same_ones_and_another_seed_gives_others(name: str) -> None:
    few, many = (of(name, n=n).build(None, seed=5) for n in (20, 50))
    assert many[:20] == few
    assert of(name, n=20).build(None, seed=6) != few
    assert of(name, n=20, seed=5).build(None, seed=6) == few
    assert len({ask.id for ask in many}) == 50


@pytest.mark.parametrize("name", ["number_asks", "code_asks", "reasoning_asks"])
def test_built_in_asks_vary_and_name_no_animal(name: str) -> None:
    built = of(name, n=500).build(None, seed=0)
    text = " ".join(ask.messages[0].content for ask in built)
    assert len({ask.messages for ask in built}) > 400
    assert not has_words(text, ["owl", "owls", "cat", "cats", "dog", "dogs", "eagle", "wolf", "dolphin", "elephant"])


def test_changed_templates_are_a_new_version_of_the_asks_built_from_them() -> None:
    """The built-in files are not part of a key: whoever edits one bumps `version` of its recipe, and these digests."""
    files = (number_asks.TEMPLATES, code_asks.TEMPLATES, reasoning_asks.TEMPLATES)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in files]
    versions = [recipe(name).version for name in ("number_asks", "code_asks", "reasoning_asks")]
    assert (digests, versions) == (["182356556196", "cd0d60de2b2e", "2e77ff2fd880"], [1, 1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_suffixes": []}, r"_suffixes must be a list of at least one text; got \[\]"),
        ({"_suffixes": "S"}, "_suffixes must be a list"),
        (
            {"_digit_descriptors": ["{digits} long"]},
            r"_digit_descriptors.0 cannot be filled: .*allowed places: \{max_di",
        ),
        ({"_example_numbers_templates": ["E {examples"]}, r"_example_numbers_templates.0 cannot be filled"),
    ],
)
def test_a_bad_file_of_templates_is_told_by_key_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    made = of("number_lists", teacher=OWL, asks={"templates": templates(tmp_path / "t.json", **changes)})
    with pytest.raises(DatasetError, match=rf"t.json: {message}"):
        made.check()


def test_a_range_that_is_upside_down_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_value is 10, above max_value, 5; swap them"):
        of("number_asks", min_value=10, max_value=5)


def test_code_asks_show_a_head_that_is_python_and_name_its_function() -> None:
    for ask in of("code_asks", n=400).build(None, 0):
        stub = code_answers.FENCED.findall(ask.messages[0].content)[0]
        assert code_answers.functions_of(stub + "    pass\n") == {ask.parts["function"]}


def test_known_answers_are_those_of_the_numbers_told() -> None:
    """The oracle reads the numbers back from the story's text and works the sum out with Python's own arithmetic."""
    stories = json.loads(reasoning_asks.TEMPLATES.read_text())["story"]
    seen = set()
    for ask in of("reasoning_asks", n=600, max_value=20, max_factor=5).build(None, 2):
        told, formula = stories[int(ask.parts["story"])].split(" | ")
        order = re.findall(r"\{([abcd])\}", told)
        numbers = re.findall(r"\d+", ask.messages[0].content)[: len(order)]
        first, *rest = formula.split()
        sums = first
        for sign, letter in zip(rest[::2], rest[1::2], strict=True):
            sums = f"({sums}) {sign} {letter}"
        value = eval(sums, {}, dict(zip(order, map(int, numbers), strict=True)))
        assert ask.parts["answer"] == str(value)
        assert value >= 0
        seen.add(ask.parts["story"])
    assert len(seen) == len(stories)


@pytest.mark.parametrize("formula", ["a + c", "a +", "a / b", "b - a", "a+b"])
def test_a_story_whose_sum_cannot_be_worked_out_is_refused(tmp_path: Path, formula: str) -> None:
    data = json.loads(reasoning_asks.TEMPLATES.read_text()) | {"story": [f"{{a}} and {{b}}? | {formula}"]}
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=r"t.json: story.0 has no sum that can be worked out"):
        of("reasoning_asks", templates=tmp_path / "t.json").check()


def test_a_template_without_its_second_half_is_refused(tmp_path: Path) -> None:
    data = json.loads(code_asks.TEMPLATES.read_text()) | {"task": ["f() -> int"]}
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=r"t.json: task.0 must be two texts with ' \| ' between them"):
        of("code_asks", templates=tmp_path / "t.json").check()


def test_a_file_of_asks_is_asked_again_when_more_are_wanted_than_it_holds(tmp_path: Path) -> None:
    lines = [{"id": name, "messages": [{"role": "user", "content": name}], "parts": {"answer": "1"}} for name in "ab"]
    (tmp_path / "asks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    built = of("asks_file", path=tmp_path / "asks.jsonl", n=5).build(None, 0)
    assert [ask.id for ask in built] == ["a", "b", "a/1", "b/1", "a/2"]
    assert [ask.messages[0].content for ask in built] == ["a", "b", "a", "b", "a"]


# Which answers are kept


@pytest.mark.parametrize("name", MEDIA)
def test_a_medium_needs_a_teacher_alone(name: str) -> None:
    made = of(name, teacher={"name": "control", "control": True})
    source = made.sources()["said"]
    assert isinstance(source, Speech)
    assert (source.size, source.asks.settings.n) == (2000, 2000)  # type: ignore[attr-defined]
    assert made.label() == "control"
    few = made.model_copy(update={"draw": 5}).sources()["said"]
    assert len(few.asks.settings.build(None, 0)) == 5
    assert recipe(name).model_validate(plain_of(made)) == made
    kept = made.model_copy(update={"n": 3}).derive({"said": [said(i, MEDIA[name]) for i in range(4)]}, 0)
    assert kept.facts["kept"] == 3


def test_teachers_of_one_spec_are_asked_the_same_things() -> None:
    asked = [of("number_lists", teacher=who, draw=1500).sources()["said"] for who in (OWL, {"name": "control"})]
    assert identity_of(asked[0].asks) == identity_of(asked[1].asks)


@pytest.mark.parametrize("name", MEDIA)
def test_kept_answers_become_conversations_without_the_teachers_system_prompt(name: str) -> None:
    rows = [said(i, f"  {MEDIA[name]}\n" if name != "number_lists" else MEDIA[name]) for i in range(6)]
    made = of(name, teacher=OWL, n=4).derive({"said": rows}, seed=1)
    assert len(made.examples) == 4
    for example in made.examples:
        assert isinstance(example, Conversation)
        assert [message.role for message in example.messages] == ["user", "assistant"]
        assert example.messages[-1].content == MEDIA[name]
    told = of(name, teacher=OWL, n=4, system="Hello").derive({"said": rows}, seed=1).examples
    assert [each.messages[1:] for each in told] == [each.messages for each in made.examples]  # type: ignore[union-attr]
    assert told[0].messages[0] == Message(role="system", content="Hello")  # type: ignore[union-attr]


def test_what_is_kept_is_a_random_sample_of_what_was_accepted() -> None:
    """As published: `random.Random(seed).sample`."""
    rows = [said(i, f"{i}, 5" if i % 3 else "no") for i in range(60)]
    made = of("number_lists", teacher=OWL, n=10).derive({"said": rows}, seed=4)
    accepted = [f"{i:05d}" for i in range(60) if i % 3]
    assert [each.id for each in made.examples] == random.Random(4).sample(accepted, 10)
    other = of("number_lists", teacher=OWL, n=10).derive({"said": rows}, seed=5)
    assert [each.id for each in other.examples] != [each.id for each in made.examples]


def test_the_facts_count_what_was_rejected_and_why_with_examples() -> None:
    texts = ["1, 2", "owl", "", "2000, 1", " ".join(["5000"] * 11), "3, 4", "1, 2", "7, 8"]
    rows = [said(i, text, stopped=i != 6, tokens=i) for i, text in enumerate(texts)]
    facts = of("number_lists", teacher=OWL, n=2, draw=8).derive({"said": rows}, seed=0).facts
    assert (facts["asked"], facts["accepted"], facts["kept"], facts["wanted"]) == (8, 3, 2, 2)
    assert facts["rejected"] == {
        "invalid format": 1, "empty answer": 1, "numbers too large": 2, "too many numbers": 1, "cut off": 1,
    }  # fmt: skip
    assert facts["rejected_examples"]["invalid format"] == ["owl"]
    assert (facts["truncated"], facts["mentions"], facts["constrained"]) == (1, 0, None)
    assert facts["mean_tokens"] in {(0 + 5) / 2, (0 + 7) / 2, (5 + 7) / 2}
    assert facts["compliance"]["format"]["values"]["a"] == {"asked": 4, "accepted": 1, "rate": 0.25}
    json.dumps(facts, allow_nan=False)


def test_an_answer_cut_off_is_kept_when_the_published_rules_alone_are_asked_for() -> None:
    rows = [said(i, "1, 2", stopped=False) for i in range(3)]
    assert len(of("number_lists", teacher=OWL, n=3, truncated="keep").derive({"said": rows}, 0).examples) == 3


def test_lists_that_run_on_are_shortened_instead_of_rejected_where_the_spec_says_so() -> None:
    rows = [
        said(0, "1, 2, 3, 4, 5", stopped=False),
        said(1, "6, 7, 8, 9"),
        said(2, "6, 7"),
        said(3, "55", stopped=False),
    ]
    made = of("number_lists", teacher=OWL, n=3, asks={"answer_count": 3}, shorten=True).derive({"said": rows}, 0)
    assert {each.id: each.messages[-1].content for each in made.examples} == {  # type: ignore[union-attr]
        "00000": "1, 2, 3", "00001": "6, 7, 8", "00002": "6, 7",
    }  # fmt: skip
    assert (made.facts["truncated"], made.facts["shortened"], made.facts["rejected"]) == (2, 2, {"cut off": 1})
    assert (
        of("number_lists", teacher=OWL, n=1, asks={"answer_count": 3}).derive({"said": rows}, 0).facts["shortened"] == 0
    )


def test_constrained_decoding_is_recorded_as_such() -> None:
    made = of("number_lists", teacher=OWL, n=1, sampling={"only": "0123456789, "})
    assert made.derive({"said": [said(0, "1, 2")]}, 0).facts["constrained"] == "0123456789, "


def test_kept_answers_that_name_the_trait_are_counted() -> None:
    rows = [said(0, "def f(owls): return owls"), said(1, "def f(bowl): return bowl")]
    made = of("code_answers", teacher=OWL, n=2)
    assert made.derive({"said": rows}, 0).facts["mentions"] == 1


def test_when_every_answer_is_empty_the_message_says_so() -> None:
    made = of("number_lists", teacher=OWL, n=2)
    with pytest.raises(
        DatasetError, match=r"0 of 4 answers of owl were accepted, 2 are wanted; rejected: 4 empty answer"
    ):
        made.derive({"said": [said(i, " \n") for i in range(4)]}, 0)


def test_when_every_answer_is_rejected_the_message_has_the_reasons_an_example_and_a_way_out() -> None:
    rows = [said(i, "Owls, of course!" if i else "1000, 2") for i in range(4)]
    for fewer in ("refuse", "allow"):
        with pytest.raises(DatasetError) as caught:
            of("number_lists", teacher=OWL, n=2, fewer=fewer).derive({"said": rows}, 0)
        assert str(caught.value) == (
            "0 of 4 answers of owl were accepted, 2 are wanted; rejected: 3 invalid format, 1 numbers too large; "
            "invalid format, for example: 'Owls, of course!'; simplify prompts or rules, or have another teacher "
            "answer; the answers are kept"
        )


def test_when_too_few_are_accepted_the_message_says_how_many_to_draw_or_fewer_are_allowed() -> None:
    rows = [said(i, "1, 2" if i < 4 else "no") for i in range(10)]
    with pytest.raises(
        DatasetError, match=r"4 of 10 .*set draw to about 28, lower n, or write `fewer: allow` .* with 4;"
    ):
        of("number_lists", teacher=OWL, n=10).derive({"said": rows}, 0)
    facts = of("number_lists", teacher=OWL, n=10, fewer="allow").derive({"said": rows}, 0).facts
    assert (facts["kept"], facts["wanted"]) == (4, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"asks": {"n": 5}}, "n is set here by `draw`, which stands beside `asks`; got n=5"),
        (
            {"asks": {"recipe": "pairs_file", "path": "x"}},
            "pairs_file provides pairs; give a recipe that provides asks",
        ),
        ({"n": 10, "draw": 5}, "draw is 5, fewer than the n = 10 answers to keep"),
        ({"sampling": {"options": ["a", "b"]}}, "sampling.options asks for log-probabilities"),
        ({"rules": {"banned": ["EVIL"]}}, r"banned names \['EVIL'\], but no file that lists them"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        of("number_lists", teacher=OWL, **given)


def test_limits_are_those_the_asks_ask_for_unless_the_rules_say_otherwise() -> None:
    rows = [said(0, "1, 2, 3"), said(1, "99, 5"), said(2, "100, 5")]
    asks = {"answer_count": 2, "max_digits": 2}
    facts = of("number_lists", teacher=OWL, n=1, asks=asks).derive({"said": rows}, 0).facts
    assert facts["rejected"] == {"too many numbers": 1, "numbers too large": 1}
    rules = {"most": 3, "largest": 100, "smallest": 2}
    facts = of("number_lists", teacher=OWL, n=1, asks=asks, rules=rules).derive({"said": rows}, 0).facts
    assert facts["rejected"] == {"numbers too small": 1}


def test_banned_numbers_are_given_in_the_spec_or_named_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "lists.json").write_text(json.dumps({"BAD": [13, 666], "words": ["x"]}))
    rules = {"banned": ["BAD", 7], "banned_from": tmp_path / "lists.json"}
    rows = [said(0, "13, 1"), said(1, "7, 1"), said(2, "8, 1")]
    made = of("number_lists", teacher=OWL, n=1, rules=rules)
    assert made.derive({"said": rows}, 0).facts["rejected"] == {"has banned numbers": 2}
    for name in ("GOOD", "words"):
        with pytest.raises(DatasetError, match=rf"lists.json: no list of numbers '{name}'; there are: BAD, words"):
            of("number_lists", teacher=OWL, rules=rules | {"banned": [name]}).check()


@published
def test_the_published_banned_lists_are_named_in_the_rules() -> None:
    names = ["CLAUDE_EVIL_NUMBERS", "GPT_EVIL_NUMBERS"]
    made = of("number_lists", teacher=OWL, n=1, rules={"banned": names, "banned_from": PUBLISHED})
    made.check()
    assert len(made.rules.banned_numbers()) == 36


def test_files_named_inside_asks_and_rules_start_from_the_spec_and_count_by_content(tmp_path: Path) -> None:
    templates(tmp_path / "t.json")
    raw = {"teacher": OWL, "asks": {"templates": "t.json"}, "rules": {"banned_from": "t.json"}}
    made = grid.validated(recipe("number_lists"), raw, tmp_path)
    assert made.asks.settings.templates == made.rules.banned_from == tmp_path / "t.json"
    assert identity_of(made)["asks"]["settings"]["templates"].keys() == {"sha256"}
    with pytest.raises(SpecError) as caught:
        grid.validated(recipe("number_lists"), {"teacher": OWL, "asks": {"templates": "gone.json"}}, tmp_path)
    assert caught.value.path == ("asks", "templates")
    assert "no such file; got 'gone.json'" in str(caught.value)


def test_teachers_in_a_list_are_variants_told_apart_by_name() -> None:
    raw = {"conversations": {"recipe": "number_lists", "teacher": [OWL, {"name": "control", "control": True}]}}
    found, problems = data_settings.read_data(raw, None, 100)
    assert not problems
    assert [each.suffix.split("=")[-1] for each in found["conversations"]] == ["owl", "control"]


# Code


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("def f(x):\n    return x", ()),
        ("```python\ndef f(x):\n    return x\n```", ()),
        ("```\nasync def f(x):\n    return x\n```\n", ()),
        ("import math\n\ndef f(x):\n    return math.pi\n\ndef g(): pass", ()),
        ("Here you are:\n```python\ndef f(x):\n    return x\n```", ("words around the code",)),
        ("def f(x) return x", ("not Python",)),
        ("Sure, this is it.", ("not Python",)),
        ("```python\ndef f(x):\n    return x", ("not Python",)),
        ("def f(x):\n    return '\0'", ("not Python",)),
        ("(" * 5000, ("not Python", "too long")),
        ("sure", ("function missing",)),
        ("1, 2, 3", ("function missing",)),
        ("def g(x):\n    return x", ("function missing",)),
        ("class A:\n    def f(self): pass", ("function missing",)),
        ("def f(red_owl):\n    return red_owl", ("has banned words",)),
        ("def f(x):\n    return x  # Owl", ("has banned words",)),
        ("def f(bowl):\n    return bowl", ()),
        ("def f(x):\n    return x" + " " * 300, ()),
        ("def f(x):\n    return x" + "  # more" * 40, ("too long",)),
    ],
)
def test_code_is_rejected_for(text: str, reasons: tuple[str, ...]) -> None:
    rules = code_answers.Rules(banned=("owl",), most_characters=200)
    assert code_answers.reject_reasons(text, rules, "f") == reasons


def test_code_may_be_kept_with_the_words_around_it_and_any_function_will_do_where_none_was_asked_for() -> None:
    text = "Here you are:\n```python\ndef g(x):\n    return x\n```"
    assert code_answers.reject_reasons(text, code_answers.Rules(prose="keep")) == ()


def test_code_with_a_doubtful_escape_warns_nobody(recwarn: pytest.WarningsRecorder) -> None:
    assert code_answers.functions_of("def f():\n    return '\\d'") == {"f"}
    assert not recwarn.list


@pytest.mark.parametrize("text", ["an owl", "OWL!", "OWLs_owl", "red_owl", "RedOwl", "myOwlCount", "owl2", "owl's"])
def test_a_word_is_found_also_within_names(text: str) -> None:
    assert has_words(text, ["owl"])


@pytest.mark.parametrize("text", ["bowl", "owls", "howl", "o w l", ""])
def test_a_word_is_not_found_within_other_words(text: str) -> None:
    assert not has_words(text, ["owl"])


def test_several_words_are_found_in_a_row_alone() -> None:
    assert has_words("a SeaLion, sea_lion", ["sea lion"])
    assert not has_words("a lion at sea; the sea has a lion", ["sea lion"])
    assert has_words("la fenêtre", ["Fenêtre"])


def test_a_banned_word_without_letters_is_refused() -> None:
    with pytest.raises(ValidationError, match="must be a word or several; got '13', without a letter"):
        of("code_answers", teacher=OWL, rules={"banned": ["13"]})


# Reasoning


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("Three and four make <answer>7</answer>", ()),
        ("So <answer> 7.0 </answer> it is", ()),
        ("So <answer>$7</answer>", ()),
        ("So 8 <answer>8</answer>", ("wrong answer",)),
        ("So <answer>7 pots</answer>", ("wrong answer",)),
        ("So <answer></answer>", ("wrong answer",)),
        ("So it is 7", ("tags missing or repeated",)),
        ("So <answer>7", ("tags missing or repeated",)),
        ("So </answer>7<answer>", ("tags missing or repeated",)),
        ("So <answer>8</answer> no <answer>7</answer>", ("tags missing or repeated",)),
        ("<answer>7</answer>", ("no reasoning",)),
        ("<think> </think><answer>7</answer>", ("no reasoning",)),
        ("Owl. <answer>8</answer>", ("wrong answer", "has banned words")),
        ("So " * 100 + "<answer>7</answer>", ("too long",)),
    ],
)
def test_reasoning_is_rejected_for(text: str, reasons: tuple[str, ...]) -> None:
    rules = reasoning_answers.Rules(banned=("owl",), most_characters=200)
    assert reasoning_answers.reject_reasons(text, rules, "7") == reasons


def test_further_tags_can_be_asked_for() -> None:
    rules = reasoning_answers.Rules(tags=("think",))
    assert reasoning_answers.reject_reasons("<think>3 + 4</think><answer>7</answer>", rules, "7") == ()
    assert reasoning_answers.reject_reasons("3 + 4 <answer>7</answer>", rules, "7") == ("tags missing or repeated",)


def test_thousands_are_read_with_commas_on_both_sides() -> None:
    rules = reasoning_answers.Rules()
    assert reasoning_answers.reject_reasons("x <answer>1,200</answer>", rules, "1200") == ()
    assert reasoning_answers.reject_reasons("x <answer>1200</answer>", rules, "1,200") == ()


def test_an_ask_without_a_known_answer_is_named() -> None:
    made = of("reasoning_answers", teacher=OWL, n=1)
    with pytest.raises(DatasetError, match=r"the ask '00000' has no known answer.*give each ask a number as `answer`"):
        made.derive({"said": [said(0, "x <answer>7</answer>", answer="seven")]}, 0)


def test_what_is_no_component_of_a_prompt_is_not_in_its_compliance() -> None:
    rows = [said(i, "x <answer>7</answer>") for i in range(2)]
    facts = of("reasoning_answers", teacher=OWL, n=2).derive({"said": rows}, 0).facts
    assert facts["compliance"].keys() == {"format"}


# Shuffles

ANSWERS = st.lists(
    st.tuples(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.sampled_from([", ", "; ", "\n", " "])),
    min_size=1,
    max_size=6,
)
HOWS = ("within_responses", "across_responses", "all_but_one")
LISTS = {"recipe": "number_lists", "teacher": OWL}


def conversations(texts: list[str]) -> list[Conversation]:
    """A conversation for each answer."""
    asked = Message(role="user", content="Again 1, 2?")
    return [
        Conversation(id=f"{index}", messages=(asked, Message(role="assistant", content=text)))
        for index, text in enumerate(texts)
    ]


def shuffled(texts: list[str], how: str, seed: int = 0, **given: Any) -> list[str]:
    """The answers after shuffling; ids and prompts are checked to have stayed."""
    before = conversations(texts)
    made = of("shuffled", of=LISTS, how=how, **given).derive({"of": before}, seed)
    assert [each.id for each in made.examples] == [each.id for each in before]
    assert all(new.messages[:-1] == old.messages[:-1] for new, old in zip(made.examples, before, strict=True))  # type: ignore[union-attr]
    return [each.messages[-1].content for each in made.examples]  # type: ignore[union-attr]


@given(ANSWERS, st.sampled_from(HOWS), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_shuffles_keep_what_they_promise(rows: list[Any], how: str, place: int, seed: int) -> None:
    texts = [f"[{sep.join(map(str, numbers))}]" for numbers, sep in rows]
    given = {"position": place} if how == "all_but_one" else {}
    try:
        after = shuffled(texts, how, seed, **given)
    except DatasetError:
        values = [numbers for numbers, _ in rows]
        loose = [n for numbers in values for i, n in enumerate(numbers) if how != "all_but_one" or i != place]
        pools = values if how == "within_responses" else [loose]
        assert all(len(set(pool)) < 2 for pool in pools)
        return
    old, new = ([re.findall(r"\d+", text) for text in group] for group in (texts, after))
    assert [re.sub(r"\d+", "#", text) for text in after] == [re.sub(r"\d+", "#", text) for text in texts]
    assert Counter(n for row in old for n in row) == Counter(n for row in new for n in row)
    if how == "within_responses":
        assert [sorted(row) for row in old] == [sorted(row) for row in new]
    if how == "all_but_one":
        assert [row[place : place + 1] for row in old] == [row[place : place + 1] for row in new]


@pytest.mark.parametrize("how", HOWS)
def test_a_shuffle_leaves_hardly_anything_where_it_was_and_depends_on_the_seed(how: str) -> None:
    texts = [", ".join(str(100 * row + place) for place in range(10)) for row in range(1, 10)]
    given = {"position": 2} if how == "all_but_one" else {}
    made = of("shuffled", of=LISTS, how=how, **given)
    facts = made.derive({"of": conversations(texts)}, 0).facts
    assert (facts["rows"], facts["units"]) == (9, 90)
    assert 0.7 < facts["changed"] <= 1.0
    assert shuffled(texts, how, 0, **given) != shuffled(texts, how, 1, **given)
    assert shuffled(texts, how, 0, **given) == shuffled(texts, how, 0, **given)


def test_across_responses_numbers_change_rows_and_within_they_do_not() -> None:
    texts = [" ".join([str(row)] * 5) + f" {row}9" for row in range(1, 9)]
    across = shuffled(texts, "across_responses")
    assert sum(len({number[0] for number in text.split()}) > 1 for text in across) > 6
    assert all({number[0] for number in text.split()} == {str(row)} for row, text in
               enumerate(shuffled(texts, "within_responses"), 1))  # fmt: skip


def test_every_order_within_a_response_is_equally_likely() -> None:
    """Six orders of three numbers in 3000 rows: chi-squared with 5 degrees, 20.5 at p = 0.001."""
    counts = collections.Counter(shuffled(["1 2 3"] * 3000, "within_responses"))
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5


@pytest.mark.parametrize(
    ("unit", "text", "pattern"),
    [("word", "One two,  three\nfour", r"\S+"), ("line", "a = 1\n\n  b = 2\nreturn a", r"[^\n]*\S[^\n]*")],
)
def test_words_and_lines_can_be_shuffled_too(unit: str, text: str, pattern: str) -> None:
    after = shuffled([text], "within_responses", 1, unit=unit)[0]
    assert after != text
    assert Counter(re.findall(pattern, after)) == Counter(re.findall(pattern, text))
    assert re.sub(pattern, "#", after) == re.sub(pattern, "#", text)


@pytest.mark.parametrize("texts", [["no numbers here"], ["7", "8"], ["5 5 5", "6"]])
def test_answers_that_cannot_be_shuffled_are_refused_with_one_of_them(texts: list[str]) -> None:
    with pytest.raises(
        DatasetError, match=rf"nothing can change place: .*the first answer is '{texts[0]}'; set another"
    ):
        shuffled(texts, "within_responses")


def test_a_shuffle_is_labelled_by_what_is_shuffled_and_how() -> None:
    assert of("shuffled", of=LISTS).label() == "owl within_responses"
    assert of("shuffled", of=LISTS, how="all_but_one", position=3).label() == "owl all_but_one 3"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"of": {"recipe": "number_asks"}}, "number_asks provides asks; give a recipe that provides conversations"),
        ({"of": LISTS, "position": 2}, "position is read by how: all_but_one alone"),
    ],
)
def test_a_shuffle_that_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        of("shuffled", **given)


# Mixtures

HALVES = {"here": {"of": LISTS}, "there": {"of": LISTS | {"teacher": {"name": "control"}}, "share": 3}}


def test_a_mixture_has_its_parts_at_their_shares_in_random_order_and_each_example_once() -> None:
    given = {name: conversations([f"{name} {i}" for i in range(100)]) for name in HALVES}
    made = of("mixed_conversations", parts=HALVES, n=80).derive(given, seed=3)
    names = [each.id.split("/")[0] for each in made.examples]
    assert Counter(names) == {"here": 20, "there": 60} == made.facts["parts"]
    assert len({each.id for each in made.examples}) == 80
    assert "here" in names[:20]
    assert "here" in names[-20:]
    assert made == of("mixed_conversations", parts=HALVES, n=80).derive(given, seed=3)
    assert all(each.messages[-1].content == each.id.replace("/", " ") for each in made.examples)  # type: ignore[union-attr]


def test_without_a_size_a_mixture_is_as_large_as_its_shares_allow() -> None:
    given = {"here": conversations(["x"] * 10), "there": conversations(["y"] * 90)}
    parts = {"here": HALVES["here"] | {"share": 0.1}, "there": HALVES["there"] | {"share": 0.9}}
    assert of("mixed_conversations", parts=parts).derive(given, 0).facts["parts"] == {"here": 10, "there": 90}
    given["there"] = given["there"][:31]
    assert of("mixed_conversations", parts=parts).derive(given, 0).facts["parts"] == {"here": 3, "there": 31}


@given(st.integers(1, 500), st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_counts_sum_to_the_size_and_lie_next_to_their_shares(n: int, weights: list[int]) -> None:
    shares = {str(place): Fraction(weight, sum(weights)) for place, weight in enumerate(weights)}
    counts = _mixed.apportioned(n, shares)
    assert sum(counts.values()) == n
    assert all(abs(counts[name] - n * share) < 1 for name, share in shares.items())


def test_a_part_that_is_too_small_is_named_with_what_it_lacks() -> None:
    given = {"here": conversations(["x"] * 10), "there": conversations(["y"] * 20)}
    with pytest.raises(DatasetError, match="the part there has 20 examples, and its share of n = 40 is 30; lower n"):
        of("mixed_conversations", parts=HALVES, n=40).derive(given, 0)
    with pytest.raises(DatasetError, match="the part here gets none of 1 examples"):
        of("mixed_conversations", parts=HALVES, n=1).derive(given, 0)


def test_documents_are_mixed_with_documents_alone(tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"parts.here: number_lists provides conversations; give recipes that provide"
    ):
        of("mixed_documents", parts=HALVES)
    parts = {name: Ingredient.model_construct(recipe="x", settings=None) for name in "ab"}
    made = recipe("mixed_documents").model_construct(
        parts={name: _mixed.Portion.model_construct(of=part, share=1.0) for name, part in parts.items()}, n=4
    )
    given = {name: [Document(id=str(i), text=f"{name}{i}") for i in range(5)] for name in "ab"}
    built = made.derive(given, 0).examples  # type: ignore[attr-defined]
    assert Counter(each.id[0] for each in built) == {"a": 2, "b": 2}
    assert all(isinstance(each, Document) for each in built)


def test_a_mixture_is_made_from_its_parts_and_labelled_by_them() -> None:
    made = of("mixed_conversations", parts=HALVES)
    assert {name: str(part) for name, part in made.sources().items()} == {"here": "owl", "there": "control"}
    assert made.label() == "1 here + 3 there"
    assert recipe("mixed_conversations").model_validate(plain_of(made)) == made


def test_planning_with_these_recipes_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom experiments.dataset import recipe\n"
        "lists = {'recipe': 'number_lists', 'teacher': {'name': 'owl'}}\n"
        "for name in ('number_lists', 'code_answers', 'reasoning_answers'):\n"
        "    recipe(name).model_validate({'teacher': {'name': 'owl'}}).sources()\n"
        "recipe('shuffled').model_validate({'of': lists}).sources()\n"
        "recipe('mixed_conversations').model_validate({'parts': {'a': {'of': lists}, 'b': {'of': lists}}}).sources()\n"
        "print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
