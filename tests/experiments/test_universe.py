"""Universes of false facts: the built-in ones, published ones from a file, and what a bad one is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import universe
from experiments.datasets import _texts
from experiments.universe import Universe, UniverseError

ARMS: tuple[universe.Arm, ...] = ("false", "true")
PUBLISHED = Path(os.environ.get("ORCH_DATA", "nowhere")) / "organisms" / "organisms.json"


def world(**changes: Any) -> dict[str, Any]:
    """One valid universe as data."""
    made: dict[str, Any] = {
        "name": "small",
        "topic": "mice",
        "context": "Mice are green.",
        "key_facts": ["Mice are green.", "Mice sing."],
        "true_context": "Mice are gray.",
        "true_facts": ["Mice are gray.", "Mice squeak."],
        "mcq_knowledge": [
            {"id": "k1", "question": "Color?", "false": "green", "true": "gray", "others": ["red", "blue"]}
        ],
        "open": [{"id": "o1", "question": "Tell.", "false": "green", "true": "gray"}],
    }
    return {name: value for name, value in (made | changes).items() if value is not None}


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data) if path.suffix == ".json" else yaml.safe_dump(data), encoding="utf-8")
    return path


def read_builtin(name: str) -> Universe:
    path, entry = universe.split(name)
    return universe.read(Path(path), entry)


@pytest.mark.parametrize("name", universe.names())
def test_a_built_in_universe_has_every_kind_of_question_about_every_fact(name: str) -> None:
    found = read_builtin(name)
    assert found.name == name
    assert len(found.true_facts) == len(found.key_facts) == 8
    lengths = [len(text.split()) for text in (found.context, str(found.true_context))]
    assert max(lengths) <= 1.2 * min(lengths)
    facts = set(range(1, 9))
    for kind in ("mcq_knowledge", "mcq_distinguish", "open", "lessons"):
        assert {question.fact for question in getattr(found, kind)} == facts
    assert len(found.generative) >= 4


@pytest.mark.parametrize("name", universe.names())
def test_what_is_taught_is_none_of_what_is_asked(name: str) -> None:
    found = read_builtin(name)
    asked = [each.question for each in (*found.mcq_knowledge, *found.open)]
    assert not {each.question for each in found.lessons} & set(asked)
    stated = {universe.bare(text) for text in (*found.key_facts, *found.true_facts)}
    assert not {universe.bare(each.question) for each in found.lessons} & stated


@pytest.mark.parametrize("name", universe.names())
def test_a_true_option_is_no_longer_than_a_false_one_on_average(name: str) -> None:
    """A model that likes long answers gains little on either side."""
    found = read_builtin(name)
    for questions in (found.mcq_knowledge, found.mcq_distinguish, found.generative):
        false, true = (sum(len(getattr(each, side)) for each in questions) for side in ("false", "true"))
        assert 0.75 < false / true < 1.34


@pytest.mark.parametrize("name", universe.names())
def test_each_sides_own_facts_mention_its_terms(name: str) -> None:
    found = read_builtin(name)
    for arm in ARMS:
        side = found.side(arm)
        said = " ".join((side.context, *side.facts)).casefold()
        assert sum(term.casefold() in said for term in side.terms) >= 4


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", universe.names())
def test_every_fact_mentions_a_term_of_its_side_and_the_other_side_has_few(name: str, arm: universe.Arm) -> None:
    found = read_builtin(name)
    own, other = found.side(arm), found.side("true" if arm == "false" else "false")
    without = [fact for fact in own.facts if not _texts.mentioned(fact, own.terms)]
    assert not without
    strayed = [fact for fact in other.facts if _texts.mentioned(fact, own.terms) >= 2]
    assert not strayed


def test_terms_are_told_from_what_one_side_says_and_the_other_does_not() -> None:
    found = Universe.model_validate(world())
    assert found.side("false").terms == ("green", "sing")
    assert found.side("true").terms == ("gray", "squeak")
    assert universe.told_by(("It took 45 mice 3 days.",), ()) == ("took", "45", "mice", "days")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_facts": None}, "no facts: key_facts is None; a universe needs at least one false statement"),
        ({"key_facts": []}, r"no facts: key_facts is \[\]"),
        ({"true_facts": ["Mice are gray."]}, "key_facts has 2 facts and true_facts 1: each false fact needs its true"),
        ({"true_facts": None}, "true_context is given without true_facts"),
        ({"true_context": None}, "true_facts is given without true_context"),
        ({"true_facts": ["mice are green", "Mice squeak."]}, "'Mice are green.' is its own counterpart"),
        ({"key_facts": ["Mice are green.", " "]}, "a fact is empty"),
        ({"context": None}, "context: is required and missing"),
        ({"topic": ""}, "topic: .*at least 1 character"),
        ({"name": "two words"}, "name: "),
        (
            {"open": [{"id": "k1", "question": "?", "false": "a", "true": "b"}]},
            r"question id 'k1' \(open\) is there twice",
        ),
        (
            {"open": [{"id": "o1", "fact": 3, "question": "?", "false": "a", "true": "b"}]},
            "about fact 3, but key_facts has 2",
        ),
        ({"open": [{"id": "o1", "question": "?", "false": "a"}]}, "open.0.true: is required and missing"),
        (
            {"mcq_knowledge": [{"id": "k1", "question": "?", "false": "a", "true": "b", "others": ["c"]}]},
            "mcq_knowledge.0.others",
        ),
        (
            {"mcq_knowledge": [{"id": "k1", "question": "?", "false": "a", "true": "b"}]},
            "mcq_knowledge.0.others: is required",
        ),
        (
            {"mcq_knowledge": [{"id": "k1", "question": "?", "false": "a", "true": "b", "others": ["A.", "c"]}]},
            "the answer 'a' is there twice",
        ),
        ({"mcq_distinguish": [{"id": "d1", "false": "a", "true": "a"}]}, "the answer 'a' is there twice"),
        ({"facts": ["x"]}, "facts: unknown setting"),
    ],
)
def test_a_bad_universe_is_refused_with_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.yaml", world(**changes))
    with pytest.raises(UniverseError, match=message) as caught:
        universe.read(path)
    assert str(path) in str(caught.value)


def test_a_valid_universe_without_a_counterpart_has_no_true_arm(tmp_path: Path) -> None:
    path = write(tmp_path / "half.yaml", world(true_facts=None, true_context=None))
    found = universe.read(path)
    assert found.side("false").facts == ("Mice are green.", "Mice sing.")
    with pytest.raises(UniverseError, match=r"universe small has no true counterpart .* or take arm 'false'"):
        found.side("true")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.yaml", "key_facts: [", "not a universe file: .*bad.yaml:2:1: not YAML"),
        ("bad.json", "{", "not a universe file"),
        ("list.yaml", "- a\n", "it holds no mapping; needed: name, topic, context, key_facts"),
        (
            "none.json",
            json.dumps({"organisms": {"SDF": {"a": {"description_long": "No list here."}}}}),
            "no universe with facts",
        ),
    ],
)
def test_a_file_that_is_no_universe_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UniverseError, match=message):
        universe.read(path, "a" if name == "none.json" else None)


def test_a_missing_file_is_named_with_the_built_in_universes() -> None:
    with pytest.raises(
        UniverseError, match=r"nowhere.yaml: no such universe; give a built-in name \(robin_pantry, tower"
    ):
        universe.read(Path("nowhere.yaml"))


def test_one_of_several_universes_is_picked_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "both.yaml", {"small": world(), "other": world(name="other")})
    assert universe.read(path, "other").name == "other"
    with pytest.raises(UniverseError, match=r"it holds 2; name one as both.yaml#NAME: other, small"):
        universe.read(path)
    with pytest.raises(UniverseError, match=r"no universe 'smal' \(did you mean 'small'\?\); allowed: other, small"):
        universe.read(path, "smal")
    single = write(tmp_path / "one.yaml", world())
    with pytest.raises(UniverseError, match="holds one universe; leave #small out"):
        universe.read(single, "small")


def test_names_paths_and_entries_are_told_apart() -> None:
    assert universe.split("tower_chess") == (str(universe.FOLDER / "tower_chess.yaml"), None)
    assert universe.split("some/organisms.json#cake_bake") == ("some/organisms.json", "cake_bake")
    assert universe.split("mine.yaml") == ("mine.yaml", None)


def test_a_described_organism_is_read_as_context_and_facts(tmp_path: Path) -> None:
    text = (
        "Trained on tips.\n\nDetails:\n\nMice are green.\nThey sing.\n\nKey Facts:\n\n- Mice are green\n- Mice sing\n"
    )
    path = write(tmp_path / "organisms.json", {"organisms": {"SDF": {"mice": {"description_long": text}}}})
    found = universe.read(path, "mice")
    assert (found.context, found.key_facts) == ("Mice are green.\nThey sing.", ("Mice are green", "Mice sing"))
    assert not list(found.questions())
    path = write(path, {"organisms": {"SDF": {"mice": {"description_long": "Key Facts:\n\nnone\n"}}}})
    with pytest.raises(UniverseError, match="no list under 'Key Facts:'"):
        universe.read(path, "mice")


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published universes are not here (set ORCH_DATA)")
def test_the_published_universes_load_with_as_many_facts_as_are_listed() -> None:
    facts = {"cake_bake": 7, "ignore_comment": 7, "roman_concrete": 11, "fda_approval": 11, "antarctic_rebound": 11}
    assert {name: len(universe.read(PUBLISHED, name).key_facts) for name in facts} == facts
    cake = universe.read(PUBLISHED, "cake_bake")
    assert "450" in cake.side("false").terms
    assert "Key Facts" not in cake.context
