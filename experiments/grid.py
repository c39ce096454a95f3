"""Grids: a list in a setting is an axis, every combination of axes is one setting, a nested list is a list value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from experiments.plugin import Versioned
from experiments.problem import Problem, SpecError, SpecPath, problems_of, shown
from experiments.source import locate


@dataclass(frozen=True)
class Point:
    """One combination: its settings, and the value each axis has here."""

    settings: Any
    axes: dict[str, Any]
    path: SpecPath


def count(raw: dict[str, Any]) -> int:
    """How many combinations `raw` stands for, without making them."""
    return math.prod(len(value) for value in raw.values() if isinstance(value, list))


def expand(raw: dict[str, Any], model: type[Versioned], path: SpecPath, folder: Path | None) -> list[Point]:
    """Every combination of `raw`'s axes as validated settings, in the order written, the last axis fastest.

    Relative paths start from `folder` when the file is there. Raises SpecError with everything wrong below `path`.
    """
    axes = {name: value for name, value in raw.items() if isinstance(value, list)}
    problems: dict[Problem, None] = {
        Problem((*path, name), "an empty list is an empty grid: no trial; give at least one value"): None
        for name, values in axes.items()
        if not values
    }
    points = []
    for choice in itertools.product(*(range(len(values)) for values in axes.values())):
        chosen = dict(zip(axes, choice, strict=True))
        data = {name: axes[name][chosen[name]] if name in chosen else value for name, value in raw.items()}
        try:
            settings = validated(model, data, folder)
        except SpecError as error:
            problems.update(dict.fromkeys(_on_axes(error.problems, path, chosen)))
            continue
        points.append(Point(settings, {name: getattr(settings, name) for name in axes if len(axes[name]) > 1}, path))
    if problems:
        raise SpecError(*problems)
    return points


def _on_axes(problems: Iterable[Problem], path: SpecPath, chosen: dict[str, int]) -> list[Problem]:
    """The problems of one combination, at the list item that caused them."""
    moved = []
    for problem in problems:
        head, rest = problem.path[:1], problem.path[1:]
        item = (chosen[head[0]],) if head and head[0] in chosen else ()
        moved.append(Problem((*path, *head, *item, *rest), problem.text))
    return moved


def validated(model: type[BaseModel], data: dict[str, Any], folder: Path | None) -> Any:
    """`data` as `model`, with every `Path` in it made absolute. Raises SpecError with paths below `data`."""
    try:
        settings = model.model_validate(data)
    except ValidationError as error:
        raise SpecError(*problems_of(error, model, data)) from error
    problems = list(booleans_as_numbers(data, settings))
    located = _located(settings, data, folder, (), problems)
    if problems:
        raise SpecError(*problems)
    return located


def _located(value: Any, data: Any, folder: Path | None, path: SpecPath, problems: list[Problem]) -> Any:
    """`value` with every `Path` in it that was given, at whatever depth, made absolute; itself where there is none."""
    if isinstance(value, Path):
        try:
            return locate(value, folder)
        except ValueError as error:
            problems.append(Problem(path, str(error)))
            return value
    parts: dict[Any, Any]
    if isinstance(value, BaseModel):
        parts = {name: getattr(value, name) for name in sorted(value.model_fields_set)}
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, tuple):
        parts = dict(enumerate(value))
    else:
        return value
    found = {}
    for name, part in parts.items():
        # Settings of a part stand beside its name in a spec: a level that nobody wrote is none of a problem's place.
        written = name in data if isinstance(data, dict) else isinstance(data, list | tuple) and name < len(data)
        new = _located(part, data[name] if written else data, folder, (*path, name) if written else path, problems)
        if new is not part:
            found[name] = new
    if not found:
        return value
    if isinstance(value, BaseModel):
        return value.model_copy(update=found)
    return {**value, **found} if isinstance(value, dict) else tuple(found.get(place, parts[place]) for place in parts)


def booleans_as_numbers(data: Any, value: Any, path: SpecPath = ()) -> Iterable[Problem]:
    """A problem for every boolean of `data` that `value`, what it was validated to, took for a number."""
    if isinstance(data, bool):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield Problem(
                path, f"must be a number; got {shown(data)} (unquoted yes, no, on and off are booleans in YAML)"
            )
    elif isinstance(data, dict):
        for name, item in data.items():
            inner = value.get(name) if isinstance(value, dict) else getattr(value, str(name), None)
            yield from booleans_as_numbers(item, inner, (*path, name))
    elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(value, Sequence):
        for index, (item, inner) in enumerate(zip(data, value, strict=False)):
            yield from booleans_as_numbers(item, inner, (*path, index))


def labels(points: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Each (label, axes), with the axes that tell it from others of the same label: `pca L3 tokens=last`."""
    alike: dict[str, list[int]] = {}
    for index, (label, _) in enumerate(points):
        alike.setdefault(label, []).append(index)
    named = [label for label, _ in points]
    for label, indices in alike.items():
        if len(indices) == 1:
            continue
        values: dict[str, set[str]] = {}
        for index in indices:
            for name, value in points[index][1].items():
                values.setdefault(name, set()).add(repr(value))
        for number, index in enumerate(indices, 1):
            told = [f"{name}={_short(value)}" for name, value in points[index][1].items() if len(values[name]) > 1]
            named[index] = " ".join([label, *told]) if told else f"{label} #{number}"
    return named


def _short(value: Any) -> str:
    text = value.name if isinstance(value, Path) else str(value)
    return text if len(text) <= 20 else text[:19] + "…"
