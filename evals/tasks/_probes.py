"""The questions of `misalignment`: open ones from a JSON file, and the held-out ones of narrow advice."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from evals.task import TaskError, parse_json, read_text
from experiments.dataset import DatasetError
from experiments.datasets import narrow_advice


@dataclass(frozen=True)
class Asked:
    """One question."""

    id: str
    family: str
    domain: str
    question: str


def general(path: Path) -> list[Asked]:
    """Open questions of a JSON file, ours or the published form, in the file's order. Raises TaskError."""
    document = parse_json(read_text(path), path)
    found = document.get("questions") if isinstance(document, dict) else None
    if not isinstance(found, list) or not found:
        raise TaskError(f"{path}: no questions; needed: a list under 'questions'")
    seen: set[str] = set()
    asked = []
    for number, given in enumerate(found, 1):
        alone = {"id": f"q{number:02d}", "family": f"q{number:02d}", "question": given}
        entry = alone if isinstance(given, str) else given
        texts = [entry.get(name) for name in ("id", "family", "question")] if isinstance(entry, dict) else []
        if len(texts) != 3 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise TaskError(f"{path}: question {number} is {given!r}; needed: texts id, family, question")
        name, family, question = (str(text) for text in texts)
        if name in seen:
            raise TaskError(f"{path}: question id {name!r} comes twice; ids must be unique")
        seen.add(name)
        asked.append(Asked(name, family, "general", question))
    return asked


def advice(path: Path) -> list[Asked]:
    """The held-out questions of narrow advice. Raises TaskError."""
    try:
        rows = narrow_advice.rows(None if path == narrow_advice.BUILTIN else path)
    except DatasetError as error:
        raise TaskError(str(error)) from error
    kept = [row for row in rows if row.held_out]
    if not kept:
        raise TaskError(f"{path}: none of its {len(rows)} questions is held out; give a longer file")
    if odd := next((row for row in kept if len(row.prompt) > 1), None):
        roles = ", ".join(message.role for message in odd.prompt)
        raise TaskError(f"{path}: row {odd.id} has the prompt {roles}; only a single question can be asked and judged")
    return [Asked(row.id, row.id, row.domain, row.prompt[-1].content) for row in kept]


def domains(path: Path) -> list[str]:
    """The domains with held-out questions. Raises TaskError."""
    return list(dict.fromkeys(one.domain for one in advice(path)))


def in_turn(asked: list[Asked]) -> list[Asked]:
    """One question of every domain, then the next of every one, so that a limit cuts no domain off."""
    piles: dict[str, list[Asked]] = {}
    for one in asked:
        piles.setdefault(one.domain, []).append(one)
    return [one for layer in zip_longest(*piles.values()) for one in layer if one is not None]
