"""What the open parts of a spec mean: data and interventions, each narrowed to the class its name stands for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from experiments import dataset, grid, intervention, plugin
from experiments.canonical import canonical, identity_of
from experiments.controls import Control, Given, controls
from experiments.intervention import DoseKind, Intervention, NeedsError
from experiments.plugin import PluginError
from experiments.problem import Problem, SpecError, SpecPath, problems_of, unknown

if TYPE_CHECKING:
    from experiments.detector import Detector

METHODS, RECIPES, DETECTORS = "experiments.interventions", "experiments.datasets", "experiments.detectors"
COMPOSED = "composed"
"""The method that a list of interventions means."""

Entry = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""An intervention of a spec: a method with its settings, or several applied at once."""
DataEntry = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""The data of a role: a recipe with its settings, or several recipes, each a variant of its own."""


@dataclass(frozen=True)
class DataVariant(Given):
    """One combination of a recipe's settings."""

    suffix: str = ""
    """What tells it from the other variants in a label; empty when it is the only one."""


@dataclass(frozen=True)
class Setting:
    """One intervention with all its settings given."""

    method: str
    intervention: Intervention
    identity: dict[str, Any]
    """method, version, settings: plain data, files by digest."""
    label: str
    roles: tuple[str, ...]
    """The kinds of data it takes, of those the spec has."""
    baseline: bool
    path: SpecPath
    axes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """The settings of a spec, baselines last, and what its author should know about them."""

    settings: list[Setting] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def fitting(doses: Iterable[float], kind: DoseKind) -> tuple[float, ...]:
    """The doses that mean something for a method, ascending: all, the positive ones, or the signs alone as -1 and 1."""
    if kind == "on_off":
        return tuple(sorted({1.0 if dose > 0 else -1.0 for dose in doses}))
    return tuple(sorted(dose for dose in doses if dose > 0 or kind != "one_sided"))


def read_data(
    data: Mapping[Any, DataEntry], folder: Path | None, most: int, wanted: Sequence[Control] = ()
) -> tuple[dict[str, list[DataVariant]], list[Problem]]:
    """Role -> its variants with the controls that are `wanted`, and everything wrong."""
    variants: dict[str, list[DataVariant]] = {}
    problems: list[Problem] = []
    for role, raw in data.items():
        several = not isinstance(raw, Mapping)
        entries = [raw] if isinstance(raw, Mapping) else raw
        given: list[Given] = []
        for index, entry in enumerate(entries):
            path: SpecPath = ("data", role, index) if several else ("data", role)
            try:
                given += _given(role, entry, path, folder, most)
            except SpecError as error:
                problems += error.problems
        try:
            added = controls(given, wanted)
        except SpecError as error:
            problems += error.problems
            continue
        found = _told(given, added, several)
        if not found and not problems:
            problems.append(Problem(("data", role), "an empty list; give at least one recipe, or leave the role out"))
        variants[role] = found
        problems += _alike(role, found)
    return variants, problems


def _alike(role: str, variants: Sequence[DataVariant]) -> list[Problem]:
    """Recipes written twice."""
    texts = [canonical(each.identity) for each in variants]
    twice = sorted(
        {each.identity["recipe"] for each, text in zip(variants, texts, strict=True) if texts.count(text) > 1}
    )
    return [Problem(("data", role), f"the same data of {name} twice; leave one out") for name in twice]


def _given(role: str, raw: Mapping[str, Any], path: SpecPath, folder: Path | None, most: int) -> list[Given]:
    """Every combination of a recipe's settings. Raises SpecError."""
    name = _named(raw, "recipe", RECIPES, path)
    try:
        cls = dataset.recipe(name)
    except PluginError as error:
        raise SpecError(Problem((*path, "recipe"), str(error))) from error
    if cls.provides != role:
        text = f"{name} provides {cls.provides}, not {role}; put it under data.{cls.provides}, or name another recipe"
        raise SpecError(Problem((*path, "recipe"), text))
    seed = _seed(raw.get("seed"), (*path, "seed"))
    raw = {field: value for field, value in raw.items() if field != "seed"}
    points = _expanded(raw, "recipe", cls, path, folder, most)
    return [Given(name, point.settings, seed, point.axes) for point in points]


def _told(given: Sequence[Given], added: Sequence[Given], several: bool) -> list[DataVariant]:
    """All data of a role, each with what tells it from the others."""
    told = several or any(each.recipe.lesson is not None for each in given)
    every = [*given, *added]
    shown = [(each.recipe.label() if told else "", {"recipe": each.intact.name, **each.axes}) for each in every]
    return [
        DataVariant(each.name, each.recipe, each.seed, each.axes, name.strip() if told or len(every) > 1 else "")
        for each, name in zip(every, grid.labels(shown), strict=True)
    ]


def _seed(given: Any, path: SpecPath) -> int | None:
    """The data's own seed. Raises SpecError for anything but a whole number from 0 on."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 2**32):
        return given
    text = f"must be a whole number from 0 to 2^32 - 1; got {given!r}; without it the trial's seed is taken"
    raise SpecError(Problem(path, text))


@dataclass(frozen=True)
class Detecting:
    """One detector with all its settings given."""

    detector: Detector
    identity: dict[str, Any]
    """detector, version, settings."""
    label: str
    path: SpecPath
    """Where the spec asks for it."""


def read_detectors(
    raws: Sequence[Mapping[str, Any]], folder: Path | None, most: int
) -> tuple[list[Detecting], list[Problem]]:
    """Every combination of every entry, and everything wrong."""
    found: list[tuple[str, grid.Point]] = []
    problems: list[Problem] = []
    for index, raw in enumerate(raws):
        from experiments.detector import detector  # it brings numpy, which most plans do without

        path: SpecPath = ("detect", index)
        try:
            name = _named(raw, "detector", DETECTORS, path)
            found += [(name, point) for point in _expanded(raw, "detector", detector(name), path, folder, most)]
        except PluginError as error:
            problems.append(Problem((*path, "detector"), str(error)))
        except SpecError as error:
            problems += error.problems
    names = grid.labels([(point.settings.label(), point.axes) for _, point in found])
    return [
        Detecting(
            point.settings,
            {"detector": name, "version": point.settings.version, "settings": identity_of(point.settings)},
            label,
            point.path,
        )
        for (name, point), label in zip(found, names, strict=True)
    ], problems


def _named(raw: Mapping[str, Any], key: str, package: str, path: SpecPath) -> str:
    """The method or recipe that `raw` names. Raises SpecError with what exists."""
    allowed = plugin.names(package)
    if key not in raw:
        near = [name for name in raw if plugin.nearest(name, [key])]
        hint = f"; did you mean {key!r} where it says {near[0]!r}?" if near else ""
        raise SpecError(Problem(path, f"{key} is required and missing; allowed: {', '.join(allowed)}{hint}"))
    name = raw[key]
    if isinstance(name, list):
        raise SpecError(Problem((*path, key), f"one {key} each; got {name!r}; write an entry for each"))
    if not isinstance(name, str):
        raise SpecError(Problem((*path, key), unknown(key, name, allowed)))
    return name


def _expanded(
    raw: Mapping[str, Any], key: str, cls: Any, path: SpecPath, folder: Path | None, most: int
) -> list[grid.Point]:
    rest = {name: value for name, value in raw.items() if name != key}
    size = grid.count(rest)
    if size > most:
        raise SpecError(
            Problem(
                path,
                f"a grid of {size:,} combinations, more than limits.trials allows ({most:,} a seed); make it smaller",
            )
        )
    return grid.expand(rest, cls, path, folder)


def read_interventions(
    raws: Sequence[Entry], roles: Collection[str], baselines: Sequence[str], folder: Path | None, most: int
) -> tuple[Found, list[Problem]]:
    """Every combination of every entry, then the baselines that are missing, and everything wrong."""
    settings: list[Setting] = []
    problems: list[Problem] = []
    first: dict[str, SpecPath] = {}
    for index, raw in enumerate(raws):
        path: SpecPath = ("interventions", index)
        try:
            entries = _entry(raw, roles, baselines, path, folder, most)
        except SpecError as error:
            problems += error.problems
            continue
        for setting in entries:
            text = canonical(setting.identity)
            if text in first:
                where = ".".join(map(str, first[text]))
                values = ", ".join(f"{name} {value!r}" for name, value in setting.axes.items())
                problems.append(
                    Problem(path, f"the same trial as one of {where} ({values or setting.label}); leave one out")
                )
            first.setdefault(text, path)
        settings += entries
    found = Found()
    if not problems:
        added, found.notes, problems = _baselines(settings, roles, baselines, folder)
        settings += added
    names = grid.labels([(setting.label, setting.axes) for setting in settings])
    found.settings = [replace(setting, label=name) for setting, name in zip(settings, names, strict=True)]
    return found, problems


def _entry(
    raw: Entry,
    roles: Collection[str],
    baselines: Sequence[str],
    path: SpecPath,
    folder: Path | None,
    most: int,
) -> list[Setting]:
    if not isinstance(raw, Mapping):
        return _composed(raw, roles, path, folder, most)
    name = _named(raw, "method", METHODS, path)
    cls = _method(name, (*path, "method"))
    points = _expanded(raw, "method", cls, path, folder, most)
    return [_setting(name, point.settings, roles, name in baselines, path, point.axes) for point in points]


def _composed(
    raws: Sequence[Mapping[str, Any]], roles: Collection[str], path: SpecPath, folder: Path | None, most: int
) -> list[Setting]:
    """Every combination of the parts' own grids, as one intervention each."""
    made = _method(COMPOSED, path)
    choices: list[list[tuple[dict[str, Any], dict[str, Any]]]] = []
    for place, raw in enumerate(raws):
        at = (*path, place)
        name = _named(raw, "method", METHODS, at)
        cls = _method(name, (*at, "method"))
        rest = {field: value for field, value in raw.items() if field != "dose"}
        doses = raw.get("dose") if isinstance(raw.get("dose"), list) else [raw.get("dose")]
        points = _expanded(rest, "method", cls, at, folder, most)
        for point in points:
            _taken(point.settings, roles, at)
        choices.append(
            [
                (
                    {"method": name, "version": cls.version, "dose": dose, "settings": point.settings},
                    {f"{name}.{axis}": value for axis, value in point.axes.items()},
                )
                for point in points
                for dose in doses or [None]
            ]
        )
    size = math.prod(len(choice) for choice in choices)
    if size > most:
        raise SpecError(Problem(path, f"{size:,} combinations, more than limits.trials allows ({most:,} a seed)"))
    settings = []
    for chosen in itertools.product(*choices):
        try:
            whole = made.model_validate({"parts": [part for part, _ in chosen]})
        except ValidationError as error:
            raise SpecError(*(Problem(path, problem.text) for problem in problems_of(error, made, {}))) from error
        axes = {name: value for _, own in chosen for name, value in own.items()}
        settings.append(_setting(COMPOSED, whole, roles, False, path, axes))
    return settings


def _method(name: str, path: SpecPath) -> type[Intervention]:
    try:
        return intervention.method(name)
    except PluginError as error:
        raise SpecError(Problem(path, str(error))) from error


def _taken(settings: Intervention, roles: Collection[str], path: SpecPath) -> tuple[str, ...]:
    """The kinds of data that a fit takes. Raises SpecError where the spec has none that would do."""
    try:
        return settings.takes(roles)
    except NeedsError as error:
        raise SpecError(Problem((*path, "method"), str(error))) from error


def _setting(
    name: str, settings: Intervention, roles: Collection[str], baseline: bool, path: SpecPath, axes: dict[str, Any]
) -> Setting:
    identity = {"method": name, "version": settings.version, "settings": identity_of(settings)}
    return Setting(name, settings, identity, settings.label(), _taken(settings, roles, path), baseline, path, axes)


def _baselines(
    settings: Sequence[Setting], roles: Collection[str], baselines: Sequence[str], folder: Path | None
) -> tuple[list[Setting], list[str], list[Problem]]:
    """The baselines the spec does not list itself, notes on those that cannot run, and what is wrong."""
    added: list[Setting] = []
    notes: list[str] = []
    problems: list[Problem] = []
    asked = {setting.method for setting in settings}
    for index, name in enumerate(baselines):
        path: SpecPath = ("baselines", index)
        if name in asked:
            continue
        try:
            cls = _method(name, path)
            made = grid.validated(cls, _like_the_others(cls, settings), folder)
            made.takes(roles)
        except NeedsError as error:
            notes.append(f"the baseline {name} is left out: {error}")
            continue
        except SpecError as error:
            reason = "; ".join(f"{problem.field} {problem.text}".strip() for problem in error.problems)
            problems.append(Problem(path, f"{reason}; write {name} under interventions, or leave it out of baselines"))
            continue
        added.append(_setting(name, made, roles, True, path, {}))
    return added, notes, problems


def _like_the_others(cls: type[Intervention], settings: Sequence[Setting]) -> dict[str, Any]:
    """Where a baseline vector acts: as the vector method in the middle of the layers the spec names."""
    if "layer" not in cls.model_fields:
        return {}
    vectors = [s.intervention for s in settings if "layer" in type(s.intervention).model_fields]
    placed = [vector for vector in vectors if getattr(vector, "layer", None) is not None]
    if not vectors:
        return {}
    reference = vectors[0]
    if placed:
        order = {getattr(vector, "layer"): vector for vector in reversed(placed)}  # noqa: B009
        numbered = all(isinstance(layer, int) for layer in order)
        layers = sorted(order) if numbered else list(reversed(order))
        reference = order[layers[len(layers) // 2]]
    shared = [name for name in cls.model_fields if name in type(reference).model_fields]
    return {name: getattr(reference, name) for name in shared}
