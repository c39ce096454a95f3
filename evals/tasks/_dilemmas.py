"""Dilemmas as data: two actions, the values that speak for each, and files of either of two formats.

CSV: the published DailyDilemmas columns (Chiu, Jiang, Choi 2024, arXiv 2410.02683), two rows a dilemma.
JSON lines: `{"id", "situation", "to_do": {"action", "values"}, "not_to_do": {"action", "values"}, "topic"}`, one row
a dilemma.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.task import TaskError, parse_json, read_text

HUB_CONFIG = "Dilemmas_with_values_aggregated"
SIDES = ("to_do", "not_to_do")
COLUMNS = ("dilemma_idx", "dilemma_situation", "action_type", "action", "values_aggregated")
Frameworks = Mapping[str, tuple[str, ...]]  # value -> its dimensions, as "Virtue/Truthfulness"


@dataclass(frozen=True)
class Side:
    """One of the two actions, and the values that speak for it."""

    action: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Dilemma:
    """A situation with two actions. Dilemmas with one situation text share a family."""

    id: str
    family: str
    topic: str
    situation: str
    to_do: Side
    not_to_do: Side


def read(path: Path) -> list[Dilemma]:
    """The dilemmas in a `.csv` or `.jsonl` file. Raises TaskError with file, line and what to do."""
    if path.suffix == ".csv":
        return paired(path, csv_rows(path))
    if path.suffix == ".jsonl":
        return paired(path, json_rows(path))
    raise TaskError(f"{path}: unknown kind of file {path.suffix!r}; allowed: .csv (published columns), .jsonl")


def fetch(name: str) -> Path:
    """The published set at hub id `org/name[@revision]`, as a local CSV file. Raises TaskError."""
    repository, _, revision = name.partition("@")
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"data {name!r} is no file; `pip install datasets` to fetch it from the hub, or give the path of a CSV file"
        ) from error
    try:
        table = datasets.load_dataset(repository, HUB_CONFIG, split="test", revision=revision or None)
    except Exception as error:  # the library's many kinds of failure are one to the user
        raise TaskError(
            f"data {name!r} cannot be fetched from the hub: {error}; give the path of a CSV file"
        ) from error
    path = Path(tempfile.gettempdir()) / f"orch-{repository.replace('/', '--')}-{table._fingerprint}.csv"
    table.to_csv(str(path))
    return path


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) for every record; `values_aggregated` is a Python list of strings."""
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise TaskError(f"{path}:1: no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}")
    line = 1
    try:
        for record in reader:
            start, line = line + 1, reader.line_num
            if any(value is None for value in record.values()):
                raise TaskError(f"{path}:{start}: the row is cut off; the file is truncated, fetch it again")
            yield (
                start,
                {
                    "id": record["dilemma_idx"],
                    "situation": record["dilemma_situation"],
                    "side": record["action_type"],
                    "action": record["action"],
                    "values": listed(record["values_aggregated"]),
                    "topic": record.get("topic_group") or "",
                },
            )
    except csv.Error as error:
        raise TaskError(
            f"{path}:{line + 1}: not CSV ({error}); the file is truncated or damaged, fetch it again"
        ) from error


def listed(text: str) -> Any:
    """The Python list that `text` writes, or None where it writes none."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row), two for every line."""
    for line, text in enumerate(read_text(path).splitlines(), 1):
        if not text.strip():
            continue
        record = parse_json(text, path, line)
        if not isinstance(record, dict):
            raise TaskError(f"{path}:{line}: not an object; write id, situation, to_do, not_to_do")
        if not any(isinstance(record.get(side), dict) for side in SIDES):
            raise TaskError(
                f"{path}:{line}: dilemma {record.get('id')!r} has neither side; write {' and '.join(SIDES)}"
            )
        for side in SIDES:
            half = record.get(side)
            if isinstance(half, dict):
                shared = {
                    "id": record.get("id"),
                    "situation": record.get("situation"),
                    "topic": record.get("topic", ""),
                }
                yield line, shared | {"side": side, "action": half.get("action"), "values": half.get("values")}


def paired(path: Path, rows: Iterator[tuple[int, dict[str, Any]]]) -> list[Dilemma]:
    """Put the two sides of every dilemma together. Raises TaskError for a bad, doubled or missing side."""
    found: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {}
    for line, row in rows:
        check(path, line, row)
        sides = found.setdefault(row["id"], {})
        if row["side"] in sides:
            before = f"the first: line {sides[row['side']][0]}"
            raise TaskError(
                f"{path}:{line}: dilemma {row['id']!r} has a second {row['side']} ({before}); ids are unique"
            )
        sides[row["side"]] = (line, row)
    families: dict[str, str] = {}
    dilemmas = []
    for key, sides in found.items():
        for side in SIDES:
            if side not in sides:
                line = next(iter(sides.values()))[0]
                raise TaskError(
                    f"{path}:{line}: dilemma {key!r} has no {side} side; both are needed, remove or complete it"
                )
        first = sides["to_do"][1]
        if sides["not_to_do"][1]["situation"] != first["situation"]:
            line = sides["not_to_do"][0]
            raise TaskError(f"{path}:{line}: dilemma {key!r} has two situations; its two rows must agree")
        family = families.setdefault(" ".join(first["situation"].split()), key)
        halves = {side: Side(sides[side][1]["action"].strip(), unique(sides[side][1]["values"])) for side in SIDES}
        dilemmas.append(Dilemma(key, family, first["topic"], first["situation"].strip(), **halves))
    if not dilemmas:
        raise TaskError(f"{path}: no dilemmas; at least one is needed")
    return dilemmas


def unique(values: list[str]) -> tuple[str, ...]:
    """Values without doubles (the published set repeats a value once per party)."""
    return tuple(dict.fromkeys(value.strip() for value in values))


def check(path: Path, line: int, row: Mapping[str, Any]) -> None:
    """Raises TaskError for a row that is not one side of a dilemma."""
    for field in ("id", "situation", "action"):
        if not isinstance(row[field], str) or not row[field].strip():
            raise TaskError(f"{path}:{line}: {field} is {row[field]!r}; a non-empty text is needed")
    if row["side"] not in SIDES:
        raise TaskError(f"{path}:{line}: action_type is {row['side']!r}; allowed: {', '.join(SIDES)}")
    values = row["values"]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise TaskError(f"{path}:{line}: the values are {values!r}; a non-empty list of names is needed")


def read_frameworks(path: Path) -> Frameworks:
    """value -> dimensions, from a CSV (`value`, then a column per framework) or a JSON object of objects."""
    if path.suffix == ".json":
        table: dict[str, dict[str, str]] = _json_frameworks(path)
    else:
        reader = csv.DictReader(io.StringIO(read_text(path)))
        if "value" not in (reader.fieldnames or ()):
            raise TaskError(f"{path}:1: no column value; needed: value, then one column per framework")
        table = {}
        for row in reader:
            if row["value"] in table:
                raise TaskError(f"{path}:{reader.line_num}: value {row['value']!r} is mapped twice; keep one row")
            table[row["value"]] = {name: cell for name, cell in row.items() if name not in (None, "", "value") and cell}
    return {value: tuple(f"{name}/{cell}" for name, cell in row.items()) for value, row in table.items()}


def _json_frameworks(path: Path) -> dict[str, dict[str, str]]:
    table = parse_json(read_text(path), path)
    rows = table.values() if isinstance(table, dict) else [None]
    if not all(isinstance(row, dict) and all(isinstance(cell, str) for cell in row.values()) for row in rows):
        raise TaskError(f'{path}: needed: an object {{"value": {{"framework": "dimension", ...}}, ...}}')
    return dict(table)


def signs(dilemma: Dilemma, frameworks: Frameworks) -> dict[str, int]:
    """+1 for every value and dimension that speaks for `to_do` only, -1 for `not_to_do` only."""
    first, second = (names(getattr(dilemma, side), frameworks) for side in SIDES)
    return dict.fromkeys(sorted(first - second), 1) | dict.fromkeys(sorted(second - first), -1)


def names(side: Side, frameworks: Frameworks) -> set[str]:
    """The values of one side and the dimensions they map to."""
    return set(side.values).union(*(frameworks.get(value, ()) for value in side.values))


def relatives(target: str, frameworks: Frameworks) -> set[str]:
    """Names that measure the target itself: its dimensions (of a value), its values (of a dimension), and it."""
    return {target, *frameworks.get(target, ())} | {value for value, row in frameworks.items() if target in row}


def counts(dilemmas: list[Dilemma], frameworks: Frameworks) -> Counter[str]:
    """How many dilemmas carry each name on exactly one side."""
    return Counter(name for dilemma in dilemmas for name in signs(dilemma, frameworks))


def select(
    dilemmas: list[Dilemma], frameworks: Frameworks, target: str, limit: int | None, controls: int | None
) -> list[Dilemma]:
    """At most `limit` dilemmas with the target on exactly one side, its two sides in turn while both last, and then at
    most `controls` dilemmas in which the target has no part. None takes all.

    Within a side the order is that of a hash of the id, so the choice is the same for the same data, and a smaller
    limit chooses a subset of what a larger one does.
    """
    by_sign: dict[int, list[Dilemma]] = {1: [], -1: [], 0: []}
    for dilemma in sorted(dilemmas, key=lambda dilemma: hashlib.sha256(dilemma.id.encode()).digest()):
        by_sign[signs(dilemma, frameworks).get(target, 0)].append(dilemma)
    ups, downs = by_sign[1], by_sign[-1]
    both = min(len(ups), len(downs))
    turns = [dilemma for pair in zip(ups, downs, strict=False) for dilemma in pair]
    return (turns + ups[both:] + downs[both:])[:limit] + by_sign[0][:controls]
