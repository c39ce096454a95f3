"""Where a spec writes what is wrong: layers and sites that a subject does not have, and models that nobody serves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.nested import Part
from experiments.problem import Problem, SpecPath
from experiments.speech import Teacher, teachers

if TYPE_CHECKING:
    from experiments.dataset import Recipe
    from experiments.outline import Outline
    from experiments.parts import SubjectSpec
    from experiments.spec import Experiment

Outlines = Callable[["SubjectSpec"], "Outline"]
Usable = Sequence[tuple[str, "Recipe"]]
"""Roles, and recipes whose files can be read: only these can tell who speaks in them."""


def misplaced(experiment: Experiment, usable: Usable, outline: Outlines, known: Collection[str]) -> list[Problem]:
    """One problem for each place of the spec that its subject does not have.

    `known`: the teachers' own subjects, as JSON, that exist. Raises ValueError where the experiment's has no outline.
    """
    own = outline(experiment.subject)
    written: dict[str, Any] = {str(role): raw for role, raw in experiment.data.items()}
    found: dict[SpecPath, list[str]] = {}

    def tell(path: SpecPath, text: str) -> None:
        texts = found.setdefault(path, [])
        if text not in texts:
            texts.append(text)

    for trial in {trial.setting: trial for trial in experiment.trials()}.values():
        for name, text in trial.intervention.misplaced(own).items():
            tell((*trial.path, name), text)
    for one in experiment.detectors:
        for name, text in one.detector.misplaced(own).items():
            tell((*one.path, name), text)
    for role, teacher in spoken(usable):
        if teacher.subject is not None and teacher.subject.model_dump_json() not in known:
            continue  # a subject that does not exist is a problem of its own
        try:
            theirs = own if teacher.subject is None else outline(teacher.subject)
        except ValueError as error:
            tell(("data", role), f"teacher {teacher.name}: {error}")
            continue
        whose = "" if teacher.subject is None else f" ({teacher.subject.model}, the teacher's own)"
        for name, text in _wrong(teacher, theirs).items():
            tell((*_place(teacher, written[role], ("data", role)), *name.split(".")), text + whose)
    return [
        Problem(path, texts[0] + (f"; {len(texts) - 1:,} more in this grid" if len(texts) > 1 else ""))
        for path, texts in found.items()
    ]


def spoken(usable: Usable) -> Iterator[tuple[str, Teacher]]:
    """Role -> everyone who speaks in its data."""
    for role, recipe in usable:
        for teacher in teachers(recipe):
            yield role, teacher


def _wrong(teacher: Teacher, outline: Outline) -> dict[str, str]:
    return {} if teacher.intervention is None else teacher.intervention.settings.misplaced(outline)


def _place(teacher: Teacher, raw: Any, path: SpecPath) -> SpecPath:
    """Where the spec writes the teacher's intervention; `path` itself where it is not written below it."""
    for place, written in _interventions(raw, path):
        part = Part.model_validate(written["intervention"])
        if (written.get("name"), _moved(part)) == (teacher.name, _moved(teacher.intervention)):
            return (*place, "intervention")
    return path


def _interventions(raw: Any, path: SpecPath) -> Iterator[tuple[SpecPath, Mapping[str, Any]]]:
    """Everyone below `raw` that has an intervention, as it was written."""
    if isinstance(raw, Mapping) and isinstance(raw.get("intervention"), Mapping):
        yield path, raw
    inner: Any = ()
    if isinstance(raw, Mapping):
        inner = raw.items()
    elif isinstance(raw, list | tuple):
        inner = enumerate(raw)
    for name, item in inner:
        yield from _interventions(item, (*path, name))


def _moved(part: Part | None) -> Any:
    """An intervention as data, files by their names: where they lie has been looked up in one of two that are held
    against each other."""

    def bare(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name
        if isinstance(value, dict):
            return {name: bare(item) for name, item in value.items()}
        return [bare(item) for item in value] if isinstance(value, list | tuple) else value

    return None if part is None else bare(part.model_dump())


def model(name: str, experiment: Experiment, role: str) -> SpecPath:
    """Where the spec's data of a role have `name` for a `model` or for one of the `models`; else the role itself."""
    path: SpecPath = ("data", role)
    written: dict[str, Any] = {str(role): raw for role, raw in experiment.data.items()}
    leaves = _leaves(written.get(role), path)
    return next((place for place, value in leaves if value == name and _says_model(place)), path)


def _says_model(place: SpecPath) -> bool:
    return place[-1] == "model" or place[-2:-1] == ("models",)


def _leaves(raw: Any, path: SpecPath) -> Iterator[tuple[SpecPath, Any]]:
    """Everything below `raw` that has nothing below itself, and where it stands."""
    if isinstance(raw, Mapping):
        inner: Any = raw.items()
    elif isinstance(raw, list | tuple):
        inner = enumerate(raw)
    else:
        yield path, raw
        return
    for name, item in inner:
        yield from _leaves(item, (*path, name))
