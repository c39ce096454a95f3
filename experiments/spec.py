"""Experiment: the question, the subject, the grid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, ValidationInfo, model_validator

from experiments import source as sources
from experiments.canonical import sha256
from experiments.dataset import Recipe
from experiments.grid import booleans_as_numbers
from experiments.intervention import Intervention
from experiments.plugin import Frozen
from experiments.problem import Problem, SpecError, SpecPath, problems_of
from experiments.settings import DataVariant, Setting, fitting, read_data, read_interventions
from experiments.source import Source

EMBEDDED = "smollm2-135m-instruct"
DAMAGE = "neutral_nll"
"""The task that measures damage; every experiment runs it."""


class SubjectSpec(Frozen):
    """Which language model, and in which chat context it is met."""

    model: str
    """Embedded name (`smollm2-135m-instruct`), hub id (`org/name`) or a local folder."""
    revision: str | None = None
    """Hub revision; pin a commit, so that the result has one meaning."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto` takes what the processor is good at; the choice is recorded and enters the key."""
    system: str | None = None
    """System prompt of every conversation; null leaves the chat template's own default in force."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's chat template (base models have none)."""


class EvalSpec(Frozen):
    """One task with one target. Settings of the task stand beside `task` and `target`."""

    task: str
    """Name of a file in `evals/tasks/`."""
    target: str | None = None
    """What the intervention is meant to move, for tasks that measure several things."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Settings of the task; written without this word, beside `task`."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"task": data}
        if not isinstance(data, dict):
            return data
        inner = data.get("params") or {}
        loose = {name: value for name, value in data.items() if name not in cls.model_fields}
        if isinstance(data.get("target"), list):
            raise SpecError(Problem(("target",), f"one target per eval; got {data['target']!r}; add another eval"))
        if not isinstance(inner, dict) or not loose:
            return data
        return {name: value for name, value in data.items() if name not in loose} | {"params": {**inner, **loose}}

    def label(self) -> str:
        """`daily_dilemmas/honesty`."""
        return self.task + (f"/{self.target}" if self.target else "")


class Budget(Frozen):
    """How much damage a dose may do and still be chosen."""

    delta_nll: float = Field(default=0.2, ge=0)
    """Most that the NLL of held-out neutral text may rise, nats per token."""


class Split(Frozen):
    """How items are divided between choosing a dose and reporting it."""

    dev: float = Field(default=0.5, gt=0, lt=1)
    """Share of the item families that choose the dose; results are reported on the others."""


class Resources(Frozen):
    """What one worker is given. Null leaves the choice to the machine."""

    gpu: float | None = Field(default=None, ge=0)
    """GPUs of one worker; 0.5 shares one between two."""
    cpu: int | None = Field(default=None, ge=1)
    """Processor cores of one worker."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory set aside for one worker, GiB."""
    workers: int | None = Field(default=None, ge=1)
    """Workers at once."""


class Limits(Frozen):
    """What stops a slip of the pen from becoming a month of computing."""

    trials: int = Field(default=1000, ge=1)
    """Most trials (settings x seeds) the grid may have."""


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
    role: str | None
    """Role of its data; None when it needs none."""
    data: Recipe | None
    identity: Mapping[str, Any]
    """method, version, settings, as they enter keys."""
    data_identity: Mapping[str, Any] | None
    """recipe, version, settings, as they enter keys."""
    setting: int
    """Index of its setting; trials that differ in the seed alone share it."""
    path: SpecPath
    """Where the spec asks for it."""


def _subject(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


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
    data: dict[Literal["pairs", "conversations"], dict[str, Any]] = Field(default_factory=dict)
    """Role -> recipe and its settings. A list in a setting is a grid axis; a nested list gives a list value."""
    interventions: tuple[dict[str, Any], ...] = Field(min_length=1)
    """Methods and their settings. A list in a setting is a grid axis; a nested list gives a list value."""
    doses: tuple[float, ...] = Field(min_length=1)
    """Signed strengths; 0, the untouched subject, is always run and not listed."""
    evals: tuple[EvalSpec, ...] = Field(min_length=1)
    """What is measured, one target each."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Seeds of data and fitting; each is a trial of its own."""
    baselines: tuple[str, ...] = ("random", "prompt")
    """Methods that run beside the others; [] turns them off."""
    budget: Budget = Budget()
    """How much damage is allowed."""
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

    @model_validator(mode="after")
    def _expand(self, info: ValidationInfo) -> Experiment:
        self._folder = (info.context or {}).get("folder")
        problems = [*self._repeats(), *self._zero()]
        variants, wrong = read_data(self.data, self._folder, self.limits.trials)
        problems += wrong
        most = self.limits.trials // len(self.seeds)
        found, wrong = read_interventions(self.interventions, set(self.data), self.baselines, self._folder, most)
        problems += wrong
        if problems:
            raise SpecError(*problems)
        self._data, self._settings = variants, found.settings
        self._notes = found.notes
        problems += self._doseless()
        trials = sum(len(variants.get(s.role or "", [None])) for s in found.settings) * len(self.seeds)
        if trials > self.limits.trials:
            problems.append(Problem(("interventions",), too_many(trials, self.limits.trials)))
        if problems:
            raise SpecError(*problems)
        return self

    def _repeats(self) -> list[Problem]:
        lists: dict[str, list[Any]] = {"doses": list(self.doses), "seeds": list(self.seeds)}
        lists["baselines"] = list(self.baselines)
        lists["evals"] = [(e.task, e.target, sorted(e.params.items(), key=repr)) for e in self.evals]
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
                f"no dose is left for {setting.label}: its doses are positive only; got {list(self.doses)}; add a positive one",
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

    def data_variants(self) -> Mapping[str, list[DataVariant]]:
        """Role -> every combination of its recipe's settings."""
        return self._data

    def trials(self, subject: dict[str, Any] | None = None) -> tuple[Trial, ...]:
        """Every setting on every variant of its data with every seed; baselines last.

        `subject` is what identifies the subject in `group`; without it, its settings as written.
        """
        who = self.subject.model_dump(mode="json") if subject is None else subject
        trials: list[Trial] = []
        arms = [(one, variant) for one in self._settings for variant in (self._data[one.role] if one.role else [None])]
        for number, (one, variant) in enumerate(arms):
            data = variant.identity if variant else None
            shared: dict[str, Any] = {
                "group": sha256({"subject": who, "data": data, "setting": one.identity})[:12],
                "label": f"{one.label} {variant.suffix}".rstrip() if variant else one.label,
                "intervention": one.intervention,
                "baseline": one.baseline,
                "doses": fitting(self.doses, one.intervention.dose_kind),
                "role": one.role,
                "data": variant.recipe if variant else None,
                "identity": one.identity,
                "data_identity": data,
                "setting": number,
                "path": one.path,
            }
            trials += [Trial(len(trials) + index, seed=seed, **shared) for index, seed in enumerate(self.seeds)]
        return tuple(trials)

    def warnings(self) -> list[str]:
        """What the spec leaves out that a reader of its results would miss."""
        notes = list(self._notes)
        unpaired = sorted(dose for dose in self.doses if -dose not in self.doses)
        signed = sorted({s.label for s in self._settings if s.intervention.dose_kind in ("signed_linear", "signed")})
        if unpaired and signed:
            notes.append(
                f"doses {', '.join(f'{dose:g}' for dose in unpaired)} lack the opposite sign: no odd part (s(+c) - s(-c)) / 2 "
                f"at that strength for {', '.join(signed[:5])}{'...' if len(signed) > 5 else ''}, so steering cannot be told "
                "from disturbance there"
            )
        if "random" not in self.baselines and not any(s.method == "random" for s in self._settings):
            notes.append("no random baseline: nothing says what any change of that size would have done")
        if len(self.seeds) == 1 and any(s.intervention.needs for s in self._settings):
            notes.append("one seed: the leaderboard cannot tell an effect from luck in data and fitting")
        return notes


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
    if "data" not in known and _all_mappings(parts.values() if isinstance(parts, dict) else None):
        problems += read_data(parts, folder, Limits().trials)[1]
    if "interventions" not in known and isinstance(parts, dict) and _all_mappings(entries):
        problems += read_interventions(entries, set(parts), (), folder, Limits().trials)[1]
    return problems


def _all_mappings(values: Any) -> bool:
    return values is not None and not isinstance(values, str) and all(isinstance(value, dict) for value in values)


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
