"""Settings, targets and data are checked before anything runs, and digests, not paths, identify them."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evals.task import TaskError, describe, load_task
from evals.tasks import _dilemmas as dilemmas
from evals.tasks import animal_preference, daily_dilemmas, neutral_nll
from experiments import plugin

TASKS = [name for name in plugin.names("evals.tasks") if hasattr(load_task(name), "Settings")]
SHARED = Path(os.environ.get("ORCH_DATA", Path(__file__).parents[3] / "shared" / "data"))
PUBLISHED = SHARED / "daily_dilemmas" / "dilemma_to_action_to_values_aggregated.csv"
ANIMAL_QUESTIONS = SHARED / "subliminal" / "subliminal_animal_eval.json"


@pytest.mark.parametrize("name", TASKS)
def test_a_task_takes_its_settings_with_the_same_defaults(name: str) -> None:
    module = load_task(name)
    parameters = inspect.signature(getattr(module, name)).parameters
    defaults = module.Settings().model_dump()
    assert {key: value.default for key, value in parameters.items()} == defaults


@pytest.mark.parametrize(
    ("task", "target", "params", "message"),
    [
        ("daily_dilema", "honesty", {}, "did you mean 'daily_dilemmas'"),
        ("daily_dilemmas", "honesty", {"limt": 3}, "unknown setting 'limt' .did you mean 'limit'"),
        ("daily_dilemmas", "honesty", {"limit": "many"}, "setting limit = 'many'"),
        ("daily_dilemmas", "honesty", {"limit": 0}, "setting limit = 0"),
        ("daily_dilemmas", "honesty", {"target": "x"}, "not a setting"),
        ("daily_dilemmas", "honestly", {}, "did you mean 'honesty'"),
        ("animal_preference", "owls", {}, "did you mean 'owl'"),
        ("animal_preference", "owl", {"animals": ["owl", "owl"]}, "comes twice"),
        ("animal_preference", "owl", {"animals": ["owl", "Cat!"]}, "bare lower-case"),
        ("neutral_nll", "honesty", {}, "takes no target"),
        ("neutral_nll", None, {"data": "nowhere.txt"}, "no data file 'nowhere.txt'"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(
    task: str, target: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        describe(task, target, params)


def test_identity_holds_the_content_of_the_data_and_no_path(tmp_path: Path) -> None:
    copy = tmp_path / "mine.jsonl"
    shutil.copy(daily_dilemmas.BUILTIN_DATA, copy)
    values = str(daily_dilemmas.BUILTIN_VALUES)
    builtin = describe("daily_dilemmas", "honesty", {"limit": 10})
    moved = describe("daily_dilemmas", "honesty", {"limit": 10, "data": str(copy), "values": values})
    assert moved.identity == builtin.identity
    assert str(tmp_path) not in json.dumps(moved.identity)
    assert moved.runtime["data"] == str(copy)
    copy.write_text(copy.read_text().replace("pie", "tart"))
    changed = describe("daily_dilemmas", "honesty", {"limit": 10, "data": str(copy), "values": values})
    assert changed.identity["data"] != builtin.identity["data"]


def test_what_the_model_is_asked_is_part_of_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe("neutral_nll", None, {}).identity
    monkeypatch.setattr(neutral_nll, "TEXTS", {"request": "Sing."})
    assert describe("neutral_nll", None, {}).identity["texts"] != before["texts"]


def test_a_hub_id_is_fetched_with_its_revision_or_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="pip install datasets"):
        describe("daily_dilemmas", "a", {"data": "org/dilemmas@abc"})
    asked = []

    class Table:
        _fingerprint = "f00"

        def to_csv(self, path: str) -> None:
            Path(path).write_text(HEAD + '1,"s?",to_do,Go,"[\'a\']"\n1,"s?",not_to_do,Stay,"[\'b\']"\n')

    def load_dataset(*args: Any, **kwargs: Any) -> Table:
        asked.append((*args, kwargs["revision"]))
        return Table()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    facts = describe("daily_dilemmas", "a", {"data": "org/dilemmas@abc"})
    assert asked[0] == ("org/dilemmas", "Dilemmas_with_values_aggregated", "abc")
    assert facts.targets == ("a", "b")
    assert set(facts.identity["data"]) == {"sha256"}


ROW = {
    "id": "d1",
    "situation": "It rains. Do you go?",
    "to_do": {"action": "Go", "values": ["courage"]},
    "not_to_do": {"action": "Stay", "values": ["comfort"]},
}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([ROW, ROW], r":2: dilemma 'd1' has a second to_do \(the first: line 1\)"),
        ([{**ROW, "not_to_do": None}], r":1: dilemma 'd1' has no not_to_do side"),
        ([{**ROW, "to_do": {"action": "Go", "values": []}}], r":1: the values are \[\]"),
        ([{**ROW, "to_do": {"action": " ", "values": ["x"]}}], r":1: action is ' '"),
        ([{**ROW, "situation": None}], r":1: situation is None"),
        ([7], r":1: not an object"),
    ],
)
def test_a_bad_dilemma_is_refused_with_its_line(lines: list[Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TaskError, match=message):
        dilemmas.read(path)


HEAD = "dilemma_idx,dilemma_situation,action_type,action,values_aggregated\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", ":1: not UTF-8"),
        (b"ok\nb\xe9d", ":2: not UTF-8"),
        (b"  \n", "is empty"),
        (b"a,b\n1,2\n", ":1: no column dilemma_idx"),
        (HEAD.encode() + b'1,"s",to_do,Go,"[\'a\']"\n1,"s",not_to', ":3: the row is cut off"),
        (HEAD.encode() + b'1,"s",to_do,Go,"[\'a\']"\n1,"s",not_to_do,Stay,"[\'b', ":3: not CSV"),
        (HEAD.encode() + b"1,s,to_do,Go,\"['a']\"\n", ":2: dilemma '1' has no not_to_do"),
        (HEAD.encode() + b"1,s,maybe,Go,\"['a']\"\n", ":2: action_type is 'maybe'"),
        (HEAD.encode() + b"1,s,to_do,Go,nothing\n", ":2: the values are None"),
    ],
)
def test_a_damaged_csv_is_refused_with_its_line(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(text)
    with pytest.raises(TaskError, match=message):
        dilemmas.read(path)


def test_one_situation_is_one_family_whatever_its_ids(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    other = {**ROW, "id": "d2", "situation": "It  rains.\nDo you go?"}
    third = {**ROW, "id": "d3", "situation": "It snows. Do you go?"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROW, other, third)))
    assert [dilemma.family for dilemma in dilemmas.read(path)] == ["d1", "d1", "d3"]


def test_a_limit_takes_both_sides_in_turn_and_a_smaller_one_a_subset() -> None:
    found = dilemmas.read(daily_dilemmas.BUILTIN_DATA)
    few = dilemmas.select(found, {}, "honesty", 10, 0)
    more = dilemmas.select(found, {}, "honesty", 30, 0)
    assert sum(dilemmas.signs(dilemma, {})["honesty"] for dilemma in few) == 0
    assert [dilemma.id for dilemma in more[:10]] == [dilemma.id for dilemma in few]
    assert len(dilemmas.select(found, {}, "honesty", None, None)) == len(found)


def test_the_built_in_dilemmas_put_honesty_on_either_side_equally_often() -> None:
    found = dilemmas.read(daily_dilemmas.BUILTIN_DATA)
    sides = [dilemmas.signs(dilemma, {}).get("honesty", 0) for dilemma in found]
    assert sides.count(1) == sides.count(-1) == 40
    frameworks = dilemmas.read_frameworks(daily_dilemmas.BUILTIN_VALUES)
    used = {value for dilemma in found for value in (*dilemma.to_do.values, *dilemma.not_to_do.values)}
    assert used == set(frameworks)


def test_neutral_passages_are_short_plain_and_name_no_listed_animal() -> None:
    passages = neutral_nll.passages(neutral_nll.Settings())
    assert len(passages) == 60
    assert all(40 <= len(passage.split()) <= 80 for passage in passages)
    assert not [a for a in animal_preference.ANIMALS if any(animal_preference.mentions(p, a) for p in passages)]


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published dilemmas are not here (set ORCH_DATA)")
def test_the_published_dilemmas_have_the_counts_known_of_them() -> None:
    settings = daily_dilemmas.Settings(data=str(PUBLISHED))
    found, frameworks = daily_dilemmas.read(settings)
    sides = [dilemmas.signs(dilemma, frameworks).get("honesty", 0) for dilemma in found]
    assert (len(found), sides.count(1), sides.count(-1)) == (1360, 334, 69)
    facts = describe("daily_dilemmas", "Virtue/Truthfulness", {"data": str(PUBLISHED)})
    assert set(facts.identity["values"]) == {"sha256"}


@pytest.mark.skipif(not ANIMAL_QUESTIONS.is_file(), reason="the published questions are not here (set ORCH_DATA)")
def test_the_published_animal_questions_load_by_path() -> None:
    found = animal_preference.read(animal_preference.Settings(data=str(ANIMAL_QUESTIONS)))
    assert len(found) == 50
    assert len({entry["family"] for entry in found}) == 50
