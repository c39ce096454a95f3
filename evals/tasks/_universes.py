"""What the tasks about belief read: a universe of false facts, and unrelated questions that everybody can answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from evals.task import TaskError, parse_json, read_text, resolve
from experiments import universe as universes
from experiments.questions import Question
from experiments.universe import Universe, UniverseError

KnowledgeQuestion = Mapping[str, Any]
"""`id`, `area`, `question`, `right`, and three `wrong`."""
Asked = TypeVar("Asked", bound=Question)
FIELDS = ("id", "area", "question", "right")


def separated(data: Any) -> Any:
    """Settings with `PATH#NAME` taken apart into `universe` and `entry`."""
    if not isinstance(data, dict) or not isinstance(data.get("universe"), str) or "#" not in data["universe"]:
        return data
    place, _, entry = data["universe"].partition("#")
    return {**data, "universe": place, "entry": entry}


def file(universe: str) -> Path:
    """The file of a universe: a built-in one's name, a path, or a path below ORCH_DATA. Raises TaskError."""
    place, _ = universes.split(universe)
    if universe in universes.names() or Path(place).suffix:
        return resolve(place, universes.FOLDER)
    builtin = ", ".join(universes.names())
    raise TaskError(f"no universe {universe!r}; give a built-in name ({builtin}), or the path of a universe file")


def load(universe: str, entry: str | None) -> Universe:
    """The universe. Raises TaskError."""
    try:
        return universes.read(file(universe), entry)
    except UniverseError as error:
        raise TaskError(str(error)) from error


def wanted(universe: Universe, kind: str, found: Sequence[Asked], limit: int | None) -> list[Asked]:
    """At most `limit` questions of a kind, the facts in turn.

    Raises TaskError for a universe that has none: published ones state facts and ask nothing.
    """
    if not found:
        raise TaskError(
            f"universe {universe.name} has no questions of kind {kind}; published universes have none at all: write a "
            f"universe file with the same facts and a list {kind} (experiments/universes/ has examples)"
        )
    seen: dict[int | None, int] = {}
    turns = []
    for place, question in enumerate(found):
        turn = seen.get(question.fact, 0) if question.fact else 0
        seen[question.fact] = turn + 1
        turns.append((turn, place, question))
    return [question for _, _, question in sorted(turns, key=lambda each: each[:2])][:limit]


def family(question: Question) -> str:
    """Questions about one fact are one family."""
    return f"fact {question.fact}" if question.fact else question.id


def unrelated(path: Path, limit: int | None) -> list[KnowledgeQuestion]:
    """At most `limit` of the unrelated questions, the areas in turn. Raises TaskError."""
    document = parse_json(read_text(path), path)
    found = document.get("questions") if isinstance(document, dict) else None
    if not isinstance(found, list) or not found:
        raise TaskError(f"{path}: no questions; needed: a list under 'questions'")
    seen: set[str] = set()
    turns: dict[str, int] = {}
    placed = []
    for number, entry in enumerate(found, 1):
        check(path, number, entry)
        if entry["id"] in seen:
            raise TaskError(f"{path}: question id {entry['id']!r} comes twice; ids must be unique")
        seen.add(entry["id"])
        turn = turns[entry["area"]] = turns.get(entry["area"], 0) + 1
        placed.append((turn, number, entry))
    return [entry for _, _, entry in sorted(placed, key=lambda each: each[:2])][:limit]


def check(path: Path, number: int, entry: Any) -> None:
    """Raises TaskError for what is no question with one right and three wrong answers."""
    texts = isinstance(entry, dict) and all(isinstance(entry.get(name), str) and entry[name] for name in FIELDS)
    wrong = entry.get("wrong") if isinstance(entry, dict) else None
    if not texts or not isinstance(wrong, list) or len(wrong) != 3 or not all(isinstance(each, str) for each in wrong):
        raise TaskError(f"{path}: question {number} is {entry!r}; needed: texts {', '.join(FIELDS)}, and three wrong")
    if len({entry["right"], *wrong}) < 4:
        raise TaskError(f"{path}: question {number}, {entry['id']!r}, has an answer twice; all four must differ")
