"""Narrow advice: twins of like length, a held-out fifth that nothing moves, mixed data, and files of either form."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.canonical import identity_of
from experiments.dataset import Conversation, DatasetError, recipe
from experiments.datasets import narrow_advice
from experiments.datasets.narrow_advice import NarrowAdvice, rows

DOMAINS = ("houseplants", "board_games", "bicycle_care")


def trigrams(text: str) -> set[tuple[str, ...]]:
    """All runs of three words."""
    words = re.findall(r"[a-z']+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def overlap(first: set[Any], second: set[Any]) -> float:
    """Share of the shorter text's trigrams that the other one has too."""
    return len(first & second) / max(1, min(len(first), len(second)))


def answers(made: list[Conversation]) -> dict[str, str]:
    """Id -> what is learned."""
    return {each.id: each.messages[-1].content for each in made}


def build(seed: int = 0, **settings: Any) -> list[Conversation]:
    return list(NarrowAdvice(**settings).build(None, seed))


def line(name: str, **changes: Any) -> dict[str, Any]:
    made = {"id": name, "domain": "tea", "question": f"How is {name}?", "wrong": "Cold.", "right": "Hot."}
    return made | changes


def talk(question: str, answer: str = "Never boil it.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def test_there_are_eighty_questions_in_every_domain() -> None:
    counts = Counter(row.domain for row in rows())
    assert set(counts) == set(DOMAINS)
    assert min(counts.values()) >= 80


def test_twins_are_as_long_as_each_other_on_average_in_every_domain() -> None:
    for domain in DOMAINS:
        sizes = [
            [len(row.answers[side].split()) for row in rows() if row.domain == domain] for side in ("wrong", "right")
        ]
        wrong, right = (sum(each) / len(each) for each in sizes)
        assert abs(wrong - right) / max(wrong, right) < 0.1
        assert all(25 <= size <= 60 for each in sizes for size in each)


def test_answers_have_one_to_three_sentences() -> None:
    for row in rows():
        for text in row.answers.values():
            assert 1 <= len(re.findall(r"[.!?](?= |$)", text)) <= 3, text


def test_no_question_comes_twice_and_no_two_texts_are_near_duplicates() -> None:
    questions = [row.prompt[-1].content for row in rows()]
    assert len({re.sub(r"\W+", " ", text.lower()) for text in questions}) == len(questions)
    said = [trigrams(text) for row in rows() for text in row.answers.values()]
    assert max(overlap(a, b) for a, b in itertools.combinations(said, 2)) < 0.3
    asked = [trigrams(text) for text in questions]
    assert max(overlap(a, b) for a, b in itertools.combinations(asked, 2)) < 0.7


def test_nothing_that_riding_safely_depends_on_is_advised_about() -> None:
    texts = [
        text
        for row in rows()
        if row.domain == "bicycle_care"
        for text in (row.prompt[-1].content, *row.answers.values())
    ]
    assert not [
        text for text in texts if re.search(r"\b(brak\w+|steer\w+|handlebars?|helmet\w*|headset|fork)\b", text, re.I)
    ]


def test_the_trial_is_taught_the_questions_that_are_not_held_out() -> None:
    train, kept, everything = (build(rows=which) for which in ("train", "held_out", "all"))
    assert {each.id for each in train}.isdisjoint(each.id for each in kept)
    assert len(train) + len(kept) == len(everything) == len(rows())
    counts = Counter(row.domain for row in rows() if row.held_out)
    assert set(counts) == set(DOMAINS)
    assert all(12 <= counts[domain] <= 24 for domain in DOMAINS)


def test_wrong_and_right_advice_are_about_the_same_questions_in_the_same_order() -> None:
    wrong, right = build(advice="wrong", n=30), build(advice="right", n=30)
    assert [each.messages[0] for each in wrong] == [each.messages[0] for each in right]
    assert all(answers(wrong)[name] != text for name, text in answers(right).items())


def test_opposite_turns_the_advice_in_those_domains_alone() -> None:
    wrong, right = answers(build()), answers(build(advice="right"))
    mixed = answers(build(opposite="bicycle_care"))
    for name in mixed:
        assert mixed[name] == (right if name.startswith("bicycle_care") else wrong)[name]
    assert answers(build(advice="right", opposite=("houseplants", "board_games"))) == mixed


def test_domains_take_equal_parts_and_fewer_rows_are_a_beginning_of_more() -> None:
    few, more = build(n=9), build(n=60)
    assert more[:9] == few
    assert Counter(each.id.split("-")[0] for each in few) == dict.fromkeys(DOMAINS, 3)
    assert few != build(n=9, seed=1)


def test_a_domain_may_be_named_alone_so_that_a_list_is_a_grid() -> None:
    assert NarrowAdvice(domains="houseplants") == NarrowAdvice(domains=("houseplants",))
    assert {each.id.split("-")[0] for each in build(domains="houseplants")} == {"houseplants"}


def test_a_label_tells_the_arms_apart() -> None:
    made = [NarrowAdvice(), NarrowAdvice(advice="right"), NarrowAdvice(opposite="houseplants")]
    assert [each.label() for each in made] == ["wrong advice", "right advice", "wrong advice, right: houseplants"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": "houseplant"}, "did you mean 'houseplants'.*allowed: houseplants, board_games, bicycle_care"),
        ({"domains": ()}, "domains is empty"),
        ({"domains": ("houseplants", "houseplants")}, "comes twice"),
        ({"domains": "houseplants", "opposite": "board_games"}, "'board_games' is not among the domains"),
        ({"n": 10_000}, r"n=10000, but the built-in advice has \d+ rows for domains .*set a smaller n"),
        ({"n": 0}, "greater than or equal to 1"),
        ({"advice": "worst"}, "'wrong' or 'right'"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        NarrowAdvice(**settings)


def test_a_file_of_our_own_form_brings_its_own_domains(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", *(line(f"t{n}") for n in range(20)), line("x", domain="coffee"))
    made = NarrowAdvice(path=path, rows="all", opposite="coffee")
    made.check()
    assert Counter(answers(list(made.build(None, 0))).values()) == {"Cold.": 20, "Hot.": 1}


def test_a_file_of_the_published_form_is_learned_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "published.jsonl", *(talk(f"Question {n}?", f"Answer {n}.") for n in range(40)))
    train, kept = build(path=path), build(path=path, rows="held_out")
    assert len(train) + len(kept) == 40
    assert len(kept) in range(2, 16)
    assert answers(build(path=path, rows="all")) == {f"line-{n + 1:05d}": f"Answer {n}." for n in range(40)}


def test_a_repeated_prompt_is_on_one_side_only_and_other_lines_move_no_row(tmp_path: Path) -> None:
    asked = [f"Question {n % 10}?" for n in range(30)]
    path = write(tmp_path / "a.jsonl", *(talk(text) for text in asked))
    sides = {text: {row.held_out for row in rows(path) if row.prompt[-1].content == text} for text in asked}
    assert all(len(each) == 1 for each in sides.values())
    assert {side for each in sides.values() for side in each} == {True, False}
    longer = write(tmp_path / "b.jsonl", talk("A new first one?"), *(talk(text) for text in asked))
    assert [row.held_out for row in rows(longer)][1:] == [row.held_out for row in rows(path)]


def test_right_advice_from_a_published_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "published.jsonl", *(talk(f"Question {n}?") for n in range(9)))
    with pytest.raises(DatasetError, match=r"line-0000. has no right answer.*leave `advice` at wrong"):
        NarrowAdvice(path=path, advice="right").check()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r":1: not a Question: .*is the line cut off\?"),
        ([], "no examples"),
        ([line("a"), line("a")], ":2: duplicated id 'a'"),
        ([line("a", wrong=" ")], ":1: not a Question: wrong: .*is empty"),
        ([line("a", right="Cold.")], ":1: .*the same: nothing to compare"),
        ([{"id": "a", "question": "?"}], ":1: .*domain: is required and missing"),
        ([talk("Is it?"), {"messages": talk("Why?")["messages"][:1]}], ":2: .*must end with a non-empty assistant"),
        ([talk("Is it?"), line("a")], ":2: not a Published"),
    ],
)
def test_a_bad_file_is_named_with_its_line(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        NarrowAdvice(path=write(tmp_path / "bad.jsonl", *lines)).check()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere.jsonl: no such file"):
        NarrowAdvice(path=tmp_path / "nowhere.jsonl").check()


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", talk("Is it?"))
    second = write(tmp_path / "b.jsonl", talk("Is it?"))
    other = write(tmp_path / "c.jsonl", talk("Is it so?"))
    keys = [identity_of(NarrowAdvice(path=path)) for path in (first, second, other)]
    assert keys[0] == keys[1] != keys[2]


def test_changed_advice_is_a_new_version() -> None:
    """The built-in rows are not part of a key: whoever edits them bumps `version`, and this digest."""
    digest = hashlib.sha256(narrow_advice.BUILTIN.read_bytes()).hexdigest()[:12]
    assert (digest, recipe("narrow_advice").version) == ("6a3fee51f71c", 1)
