"""Experiment: the question, the subject, the grid."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from experiments import source as sources
from experiments.canonical import sha256
from experiments.controls import Control, is_control, is_reference, reference_of
from experiments.dataset import Lesson
from experiments.grid import booleans_as_numbers
from experiments.intervention import Intervention
from experiments.parts import EMBEDDED, Budget, Calibrate, EvalSpec, Limits, Resources, Split, SubjectSpec
from experiments.plugin import Frozen
from experiments.problem import Problem, SpecError, SpecPath, problems_of, shown
from experiments.settings import (
    DataVariant,
    Detecting,
    Setting,
    fitting,
    read_data,
    read_detectors,
    read_interventions,
)
from experiments.source import Source
from experiments.training import Trained
from experiments.verdicts import EMBEDDED as EMBEDDED_JUDGE
from experiments.verdicts import MARK

DAMAGE = "neutral_nll"
"""The task that measures damage; every experiment runs it."""

__all__ = [
    "DAMAGE",
    "EMBEDDED",
    "EvalSpec",
    "Experiment",
    "SpecError",
    "SubjectSpec",
    "Trial",
    "from_data",
    "from_source",
    "load",
]


@dataclass(frozen=True, slots=True)
class Trial:
    """One intervention x data x seed on the subject."""

    index: int
    group: str
    """12 hex: subject x data x setting, without the seed."""
    label: str
    intervention: Intervention
    seed: int
    baseline: bool
    doses: tuple[float, ...]
    """The doses that mean something for its method; dose 0 is everybody's and not listed."""
    data: tuple[DataVariant, ...]
    """One of each kind that it takes; () when it needs none."""
    identity: Mapping[str, Any]
    """method, version, settings, as they enter keys."""
    setting: int
    """Index of its setting; trials that differ in the seed alone share it."""
    path: SpecPath
    """Where the spec asks for it."""
    student: str = ""
    """The label without the data."""
    lesson: Lesson | None = None
    """What its data are for."""
    control: str | None = None
    """Group of the same setting that learns the control's data; None for that group, and where there is none."""


def _told(system: str | None) -> str:
    """A chat context in a sentence."""
    return "no system prompt" if system is None else f"the system prompt {shown(system)}"


def _subject(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def _data_identity(data: Sequence[DataVariant]) -> Any:
    """What the data are, as it enters a trial's group: None without any, and one alone as it is."""
    known = [variant.identity for variant in data]
    return known if len(known) > 1 else next(iter(known), None)


def _lesson(data: Sequence[DataVariant]) -> Lesson | None:
    """What data of several kinds are for: the first of them that says so."""
    return next((each.recipe.lesson for each in data if each.recipe.lesson is not None), None)


def _references(arms: Sequence[tuple[Setting, tuple[DataVariant, ...]]]) -> list[int | None]:
    """The arm of the same setting with which each arm is compared; None for those that are references themselves."""
    places: dict[int, list[int]] = {}
    for number, (one, data) in enumerate(arms):
        if any(is_reference(each.recipe) for each in data):
            places.setdefault(id(one), []).append(number)
    found: list[int | None] = []
    for one, data in arms:
        among = places.get(id(one), [])
        place = reference_of(data, [arms[number][1] for number in among]) if among else None
        found.append(None if place is None else among[place])
    return found


Role = Literal["pairs", "conversations", "documents", "choices"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class Experiment(Frozen):
    """One question, asked of one subject, over a grid of interventions, doses and seeds."""

    name: Name
    """Letters, digits, dot, dash, underscore; at most 80."""
    question: str = ""
    """What the experiment is to find out, in a sentence."""
    subject: Annotated[SubjectSpec, BeforeValidator(_subject)]
    """The model: its name alone, or its settings."""
    data: dict[Role, dict[str, Any] | tuple[dict[str, Any], ...]] = Field(default_factory=dict)
    """Role -> recipe and its settings, or a list of such recipes. A list in a setting is a grid axis; a nested list
    gives a list value. `seed` beside the recipe draws the data by that seed, whatever the trial's."""
    controls: tuple[Control, ...] = ("teacher", "shuffled")
    """Control data added to what teachers answer: a `teacher` without the trait, on whose students all others are
    measured, and the answers `shuffled` within each response, or `shuffled_across` responses; learned without
    their divergence tokens (`divergence`), or these alone (`divergence_only`); [] turns them off."""
    interventions: tuple[dict[str, Any] | tuple[dict[str, Any], ...], ...] = Field(min_length=1)
    """Methods and their settings; a list of methods is applied at once, each at the trial's doses or at a `dose` of its
    own. A list in a setting is a grid axis; a nested list gives a list value."""
    doses: tuple[float, ...] = Field(min_length=1)
    """Signed strengths; 0, the untouched subject, is always run and not listed."""
    evals: tuple[EvalSpec, ...] = Field(min_length=1)
    """What is measured, one target each."""
    context: Literal["refuse", "warn"] = "refuse"
    """What happens when students are asked under another system prompt than they learned in, from which alone a
    subliminal preference fell from 48 to 3 per cent: `refuse`, or `warn`, here and on every row."""
    detect: tuple[dict[str, Any], ...] = ()
    """Detectors that are to tell from the data and the untouched subject alone, without training, what each teacher's
    data hand on: `{detector: persona_likelihood, ...}` (docs/detection.md)."""
    candidates: tuple[str, ...] = ()
    """What detectors choose among: the traits of the data, and what else they could hand on. Left out: the traits."""
    judge: dict[str, Any] = Field(default_factory=dict)
    """Who judges the answers of evals that need it, and how: `models`, `combine`, `temperature`, `samples`, `rubrics`,
    `allow_self` and more (docs/judges.md). Left out, the embedded model judges."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Seeds of data and fitting; each is a trial of its own."""
    baselines: tuple[str, ...] = ("random", "prompt")
    """Methods that run beside the others; [] turns them off."""
    budget: Budget = Budget()
    """How much damage is allowed."""
    calibrate: Calibrate | None = None
    """Solve for the dose of a given damage, trial by trial, and compare at equal damage."""
    split: Split = Split()
    """How items are divided."""
    resources: Resources = Resources()
    """What workers are given; never part of a result's identity."""
    limits: Limits = Limits()
    """How large the grid may grow."""

    _folder: Path | None = PrivateAttr(default=None)
    _source: Source | None = PrivateAttr(default=None)
    _data: dict[str, list[DataVariant]] = PrivateAttr(default_factory=dict)
    _settings: list[Setting] = PrivateAttr(default_factory=list)
    _notes: list[str] = PrivateAttr(default_factory=list)
    _detectors: list[Detecting] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _expand(self, info: ValidationInfo) -> Experiment:
        self._folder = (info.context or {}).get("folder")
        if len(self.seeds) > self.limits.trials:
            raise SpecError(Problem(("seeds",), too_many(len(self.seeds), self.limits.trials)))
        problems = [*self._repeats(), *self._zero()]
        variants, wrong = read_data(self.data, self._folder, self.limits.trials, self.controls)
        problems += wrong
        most = self.limits.trials // len(self.seeds)
        found, wrong = read_interventions(self.interventions, set(self.data), self.baselines, self._folder, most)
        problems += wrong
        if problems:
            raise SpecError(*problems)
        self._detectors, wrong = read_detectors(self.detect, self._folder, self.limits.trials)
        problems += wrong
        self._data, self._settings = variants, found.settings
        self._notes = found.notes
        problems += self._doseless()
        trials = sum(prod(len(variants[role]) for role in s.roles) for s in found.settings) * len(self.seeds)
        if trials > self.limits.trials:
            problems.append(Problem(("interventions",), too_many(trials, self.limits.trials)))
        if problems:
            raise SpecError(*problems)
        return self

    def _repeats(self) -> list[Problem]:
        lists: dict[str, list[Any]] = {"doses": list(self.doses), "seeds": list(self.seeds)}
        lists["baselines"] = list(self.baselines)
        lists["evals"] = [(e.task, e.target, e.system, sorted(e.params.items(), key=repr)) for e in self.evals]
        problems = []
        for field, values in lists.items():
            for index, value in enumerate(values):
                if value in values[:index]:
                    text = (
                        f"the same as {field}.{values.index(value)}; got {getattr(self, field)[index]!r}; leave one out"
                    )
                    problems.append(Problem((field, index), text))
        return problems

    def _zero(self) -> list[Problem]:
        text = "dose 0 is the untouched subject and is always run; leave it out"
        return [Problem(("doses", index), text) for index, dose in enumerate(self.doses) if dose == 0]

    def _doseless(self) -> list[Problem]:
        return [
            Problem(
                ("doses",),
                f"no dose is left for {setting.label}, which takes positive doses only; got {list(self.doses)}",
            )
            for setting in self._settings
            if not fitting(self.doses, setting.intervention.dose_kind)
        ]

    @property
    def all_evals(self) -> tuple[EvalSpec, ...]:
        """The evals asked for and, if it is not among them, the one that measures damage."""
        if any(one.task == DAMAGE for one in self.evals):
            return self.evals
        return (*self.evals, EvalSpec(task=DAMAGE))

    @property
    def folder(self) -> Path | None:
        """Folder of the spec's file, from which relative paths start; None when it was not read from one."""
        return self._folder

    @property
    def source(self) -> Source | None:
        """The text it was read from."""
        return self._source

    def mismatches(self) -> dict[int, str]:
        """Index of an eval -> what is wrong, where students learn in one chat context and are asked in another.

        Reads files of conversations. Raises DatasetError for those that cannot be read.
        """
        learned: dict[str | None, str] = {}
        for variants in self._data.values():
            for variant in variants:
                for system in variant.recipe.contexts():
                    own = self.subject.system if system is None else system
                    learned.setdefault(own, variant.suffix or variant.identity["recipe"])
        found: dict[int, str] = {}
        if not any(isinstance(one.intervention, Trained) for one in self._settings):
            return found
        for index, one in enumerate(self.evals):
            asked = self.subject.system if one.system is None else one.system
            others = {system: name for system, name in learned.items() if system != asked}
            if others and one.task != DAMAGE:
                system, name = next(iter(others.items()))
                found[index] = (
                    f"students of {name} learn under {_told(system)} and are asked under {_told(asked)}; a preference "
                    "that was handed on in one context hardly shows in another (48 % against 3 % in published work)"
                )
        return found

    @property
    def detectors(self) -> Sequence[Detecting]:
        """Detectors with their settings."""
        return self._detectors

    def all_candidates(self) -> dict[str, tuple[str, ...]]:
        """What detectors choose among -> how it is spelled behind a blank."""
        lessons = [each.recipe.lesson for variants in self._data.values() for each in variants]
        names = self.candidates or tuple(dict.fromkeys(each.trait for each in lessons if each and each.trait))
        return {name: (f" {name}", f" {name}s", f" {name.capitalize()}") for name in names}

    def detected(self) -> list[tuple[DataVariant, DataVariant]]:
        """The data that detectors look into, each with the control's. Masked ones have the words of what they mask."""
        variants = [each for each in self._data.get("conversations", []) if not each.recipe.masks]
        controls = [each for each in variants if is_reference(each.recipe)]
        found: list[tuple[DataVariant, DataVariant]] = []
        for each in variants:
            place = reference_of([each], [[control] for control in controls]) if each.recipe.lesson else None
            if place is not None:
                found.append((each, controls[place]))
        return found

    def data_variants(self) -> Mapping[str, list[DataVariant]]:
        """Role -> every combination of its recipe's settings."""
        return self._data

    def trials(self, subject: dict[str, Any] | None = None) -> tuple[Trial, ...]:
        """Every setting on every variant of its data with every seed; baselines last.

        `subject` is what identifies the subject in `group`; without it, its settings as written.
        """
        who = self.subject.model_dump(mode="json") if subject is None else subject
        trials: list[Trial] = []
        arms = [(one, data) for one in self._settings for data in product(*(self._data[role] for role in one.roles))]
        groups = [
            sha256({"subject": who, "data": _data_identity(data), "setting": one.identity})[:12] for one, data in arms
        ]
        controls = _references(arms)
        for number, (one, data) in enumerate(arms):
            control = controls[number]
            shared: dict[str, Any] = {
                "group": groups[number],
                "label": " ".join([one.label, *(variant.suffix for variant in data if variant.suffix)]),
                "intervention": one.intervention,
                "baseline": one.baseline or any(is_control(each.recipe) for each in data),
                "student": one.label,
                "lesson": _lesson(data),
                "control": None if control is None else groups[control],
                "doses": fitting(self.doses, one.intervention.dose_kind),
                "data": data,
                "identity": one.identity,
                "setting": number,
                "path": one.path,
            }
            trials += [Trial(len(trials) + index, seed=seed, **shared) for index, seed in enumerate(self.seeds)]
        return tuple(trials)

    def warnings(self) -> list[str]:
        """What the spec leaves out that a reader of its results would miss.

        Students who are compared with a control's students need neither baselines made from pairs nor the other sign.
        """
        compared = any(is_reference(each.recipe) for variants in self._data.values() for each in variants)
        notes = [] if compared else list(self._notes)
        if self.context == "warn":
            notes += [f"context: {text}" for text in self.mismatches().values()]
        filters = [getattr(each.recipe, "judge", None) for variants in self._data.values() for each in variants]
        if any(one is not None and EMBEDDED_JUDGE in one.models for one in filters):
            notes.append(f"judge of data: {MARK}")
        unpaired = sorted(dose for dose in self.doses if -dose not in self.doses)
        signed = sorted({s.label for s in self._settings if s.intervention.dose_kind in ("signed_linear", "signed")})
        if unpaired and signed and not compared:
            doses = ", ".join(f"{dose:g}" for dose in unpaired)
            methods = ", ".join(signed[:5]) + (", ..." if len(signed) > 5 else "")
            notes.append(
                f"doses {doses} lack the opposite sign: no odd part (s(+c) - s(-c)) / 2 there for {methods}, "
                "so steering cannot be told from disturbance"
            )
        notes += [f"{one.label} {text}" for one in self._settings if (text := self._unused(one))]
        alone = "random" not in self.baselines and not any(s.method == "random" for s in self._settings)
        if alone and not compared:
            notes.append("no random baseline: nothing says what any change of that size would have done")
        if len(self.seeds) == 1 and any(s.intervention.needs for s in self._settings):
            notes.append("one seed: the leaderboard cannot tell an effect from luck in data and fitting")
        return notes

    def _unused(self, setting: Setting) -> str:
        """What is told of a method that cannot use all doses; baselines that run beside the others need no note."""
        kind = setting.intervention.dose_kind
        used = fitting(self.doses, kind)
        if setting.baseline or set(used) == set(self.doses):
            return ""
        why = "is on or off, so that only signs count" if kind == "on_off" else "takes positive doses only"
        return f"{why}: it runs at {', '.join(f'{dose:g}' for dose in used)}"


def too_many(trials: int, limit: int) -> str:
    """What a grid beyond its limit is told."""
    return f"the grid has {trials:,} trials, more than limits.trials = {limit:,}; make it smaller or raise the limit"


def load(path: str | Path) -> tuple[Experiment, Source]:
    """Read and check a spec. Raises SpecError with `file:line:column` and every problem found."""
    source = sources.read(path)
    return from_source(source), source


def from_source(source: Source) -> Experiment:
    """The experiment a YAML document describes. Raises SpecError."""
    try:
        experiment = from_data(source.data, source.folder)
    except SpecError as error:
        raise error.at(source) from error
    experiment._source = source
    return experiment


def from_data(data: Any, folder: Path | None = None) -> Experiment:
    """The experiment that plain data describes; relative paths start from `folder`. Raises SpecError, without lines."""
    if not isinstance(data, dict):
        raise SpecError(
            Problem((), f"a spec is a mapping with name, subject, interventions, ...; got {type(data).__name__}")
        )
    data = _with_local_paths(data, folder)
    try:
        experiment = Experiment.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise SpecError(*_everything(problems_of(error, Experiment, data), data, folder)) from error
    problems = list(booleans_as_numbers(data, experiment))
    if problems:
        raise SpecError(*problems)
    return experiment


def _everything(problems: list[Problem], data: dict[str, Any], folder: Path | None) -> list[Problem]:
    """`problems`, and those of data and interventions, which are not looked at while another field is wrong."""
    parts, entries = data.get("data", {}), data.get("interventions")
    known = {problem.path[0] for problem in problems if problem.path}
    if "data" not in known and isinstance(parts, dict) and all(map(_entry_of_mappings, parts.values())):
        problems += read_data(parts, folder, Limits().trials)[1]
    if (
        "interventions" not in known
        and isinstance(parts, dict)
        and isinstance(entries, list)
        and all(map(_entry_of_mappings, entries))
    ):
        problems += read_interventions(entries, set(parts), (), folder, Limits().trials)[1]
    return problems


def _entry_of_mappings(entry: Any) -> bool:
    """Whether an entry is a mapping or a list of mappings, as data and interventions are written."""
    return isinstance(entry, dict) or (isinstance(entry, list) and all(isinstance(each, dict) for each in entry))


def _with_local_paths(data: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """`data` with the subject's folder and chat template made absolute where they stand beside the spec."""
    subject = _subject(data.get("subject"))
    if not isinstance(subject, dict) or folder is None:
        return data
    local = {}
    for field in ("model", "chat_template"):
        value = subject.get(field)
        if isinstance(value, str) and value and os.path.exists(folder / value):
            local[field] = str((folder / value).absolute())
    return {**data, "subject": {**subject, **local}} if local else data
