"""A spec as a graph of content-addressed nodes: dataset -> fit -> (calibrate ->) answer -> score -> compare."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from experiments.canonical import plain_of, sha256
from experiments.spec import Experiment, Trial
from orchestrator import preflight
from orchestrator.bench import Bench
from orchestrator.identity import SHORT, Shared, node_key
from orchestrator.preflight import Describe, Identify, PlannedEval
from orchestrator.supplies import Add, Method, Supplies, Who, roles_of

STAGE_VERSIONS = {
    "dataset": 1,
    "fit": 1,
    "generate": 1,
    "calibrate": 2,
    "interpret": 1,
    "answer": 1,
    "judge": 1,
    "score": 1,
    "compare": 3,
}
"""Bump one when the same params and inputs would now give another result."""


@dataclass(frozen=True, eq=False)
class Node:
    """One unit of work. `params` and `inputs` are its identity; `runtime` says where things are."""

    stage: str
    version: int
    params: Mapping[str, Any]
    inputs: Mapping[str, str]
    """Role -> key of the node whose result it reads."""
    label: str
    """For people: the method and where it acts, the eval. Neither unique nor part of the key."""
    runtime: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """64 hex. Raises CanonicalError when `params` hold what cannot be written canonically."""
        known: str | None = self.__dict__.get("_key")
        if known is None:
            known = self.__dict__["_key"] = node_key(self.stage, self.version, self.params, self.inputs)
        return known

    @property
    def short(self) -> str:
        """The digits of the key that are shown."""
        return self.key[:SHORT]

    @property
    def name(self) -> str:
        """`fit[mean_diff L14]:3fa9c1d2b7e4`."""
        return f"{self.stage}[{self.label}]:{self.short}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Graph(Protocol):
    """What is walked and published as one experiment."""

    @property
    def name(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def nodes(self) -> Mapping[str, Node]:
        """By key, inputs first: everything that `compare` rests on, as far as it is run or named."""

    @property
    def trials(self) -> Sized: ...
    @property
    def compare(self) -> str: ...


@dataclass(frozen=True)
class PlannedTrial:
    """A trial and the keys of its nodes."""

    trial: Trial
    data: tuple[str, ...]
    """Keys of the datasets it takes."""
    fit: str
    unit: str | None
    """Key of the node that says what a dose of 1 is; None where doses are those of the method."""
    scores: Mapping[tuple[int, float], str]
    """(index of the eval, dose) -> key of the score; dose 0 is in `Plan.base`."""


@dataclass(frozen=True)
class Plan:
    """Everything an experiment needs, in an order in which inputs come first."""

    experiment: Experiment
    subject: Mapping[str, Any]
    """Identity of the subject."""
    evals: tuple[PlannedEval, ...]
    nodes: Mapping[str, Node]
    trials: tuple[PlannedTrial, ...]
    base: Mapping[int, str]
    """Index of the eval -> key of the untouched subject's score."""
    compare: str

    @property
    def name(self) -> str:
        """The experiment's."""
        return self.experiment.name

    @property
    def question(self) -> str:
        """The experiment's."""
        return self.experiment.question


def plan(experiment: Experiment, identify: Identify | None = None, describe: Describe | None = None) -> Plan:
    """The graph of `experiment`. Reads the spec's files for their digests; loads no weights, starts nothing.

    `identify` and `describe` default to those of `preflight.py`; layers are checked where `identify` is the default.
    Raises SpecError for a subject, a layer, an eval, a target or a task setting that does not exist.
    """
    with collector_paused():
        outline = preflight.outline if identify is None else None
        found = preflight.check(experiment, identify or preflight.identify, describe or preflight.describe, outline)
        return _Planner(experiment, found).plan()


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection while a hundred thousand objects are made and none is thrown away."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Planner:
    """What is made once and shared by many nodes."""

    def __init__(self, experiment: Experiment, checked: preflight.Checked) -> None:
        self.experiment = experiment
        self.nodes: dict[str, Node] = {}
        self.subject = Shared(checked.subject)
        self.evals = checked.evals
        self.bench = checked.bench
        self.subject_spec = experiment.subject.model_dump(mode="json")
        self.who = Who(self.subject, self.subject_spec)
        others = {text: Who(Shared(identity), spec) for text, (identity, spec) in checked.others.items()}
        self.supplies = Supplies(self.add, others, checked.sittings, experiment.resources.students)
        self.texts = preflight.calibration_texts() if experiment.calibrate else {}
        self.asked = [
            self.who
            if each.spec.system is None
            else others[preflight.asked_as(experiment, each.spec).model_dump_json()]
            for each in self.evals
        ]
        self.answer_params = [
            {
                "subject": who.identity,
                "task": each.spec.task,
                "task_version": each.facts.version,
                "settings": Shared(each.facts.identity),
            }
            for each, who in zip(self.evals, self.asked, strict=True)
        ]

    def add(
        self, stage: str, params: Mapping[str, Any], inputs: Mapping[str, str], label: str, runtime: Mapping[str, Any]
    ) -> str:
        node = Node(stage, STAGE_VERSIONS[stage], params, inputs, label, runtime)
        key = node.key
        self.nodes.setdefault(key, node)
        return key

    def plan(self) -> Plan:
        base = {index: self.base(index) for index in range(len(self.evals))}
        trials = tuple(self.trial(trial) for trial in self.experiment.trials(self.subject))
        compare = self.compare(trials, base, self.detections())
        return Plan(self.experiment, self.subject, self.evals, self.nodes, trials, base, compare)

    def base(self, index: int) -> str:
        """Key of the untouched subject's score: dose 0 of every trial."""
        each = self.evals[index]
        runtime: dict[str, Any] = {
            "subject": self.asked[index].spec,
            "arguments": each.facts.runtime,
            "method": None,
            "settings": None,
        }
        label = f"{each.spec.label()} base"
        if each.facts.rubrics:
            runtime["judged"] = True
        answer = self.add("answer", self.answer_params[index], {}, label, runtime)
        return self.score(each, answer, label)

    def score(self, each: PlannedEval, answer: str, label: str) -> str:
        """Key of the score of an answer, which judges have read before where the eval needs them."""
        if self.bench is None or not each.facts.rubrics:
            return self.add("score", {}, {"answer": answer}, label, {"task": each.spec.task})
        scoring = {"task_version": each.facts.version, "scoring": each.facts.scoring}
        runtime = {"task": each.spec.task, "arguments": each.facts.runtime}
        return judged_score(self.add, self.bench, answer, label, scoring, runtime)

    def trial(self, trial: Trial) -> PlannedTrial:
        made = self._setting(trial)
        method, settings = made.name, made.settings
        data = self.data(trial)
        fit = self.supplies.fit(made, data, trial.seed, self.who)
        unit = self.calibrate(trial, fit, data, method, settings)
        scores: dict[tuple[int, float], str] = {}
        state = {"state": fit} | ({} if unit is None else {"unit": unit})
        for index, each in enumerate(self.evals):
            label = f"{each.spec.label()} {trial.label}"
            runtime: dict[str, Any] = {
                "subject": self.asked[index].spec,
                "arguments": each.facts.runtime,
                "method": method,
                "settings": settings,
            }
            if each.facts.rubrics:
                runtime["judged"] = True
            for dose in trial.doses:
                params = {**self.answer_params[index], "dose": dose}
                answer = self.add("answer", params, state, label, runtime)
                scores[index, dose] = self.score(each, answer, label)
        return PlannedTrial(trial, tuple(data.values()), fit, unit, scores)

    def calibrate(
        self, trial: Trial, fit: str, data: Mapping[str, str], method: str, settings: Mapping[str, Any]
    ) -> str | None:
        """Key of the node that finds the trial's dose; None where the spec does not ask for it."""
        wanted = self.experiment.calibrate
        if wanted is None:
            return None
        params = {
            "subject": self.subject,
            "wanted": wanted.model_dump(mode="json"),
            "texts": self.texts,
            "dev": self.experiment.split.dev,
            "kind": trial.intervention.dose_kind,
        }
        inputs = {"state": fit} | (dict(data) if wanted.orient else {})
        runtime = {"subject": self.subject_spec, "method": method, "settings": settings}
        return self.add("calibrate", params, inputs, trial.label, runtime)

    def judged(self, each: PlannedEval) -> dict[str, Any]:
        """By whom and how an eval's answers are judged; nothing for one that is not."""
        if self.bench is None or not each.facts.rubrics:
            return {}
        return {**judges(self.bench, each.spec.task), "scoring": each.facts.scoring}

    def _setting(self, trial: Trial) -> Method:
        """What nodes hold of a trial's method: made once for all its seeds."""
        if getattr(self, "_of", None) != trial.setting:
            identity = {**trial.identity, "settings": Shared(trial.identity["settings"])}
            plain = plain_of(trial.intervention)
            self._made = Method(identity["method"], trial.intervention, identity, plain, trial.label)
            self._of = trial.setting
        return self._made

    def data(self, trial: Trial) -> dict[str, str]:
        """Role -> key of the data that a trial takes."""
        return roles_of(
            {
                each.recipe.provides: self.supplies.dataset(
                    each.identity["recipe"],
                    each.recipe,
                    each.identity,
                    trial.seed if each.seed is None else each.seed,
                    self.who,
                )
                for each in trial.data
            }
        )

    def detections(self) -> list[tuple[dict[str, Any], str]]:
        """(what is looked into and by whom, key) of every detector on every teacher's data."""
        experiment, found = self.experiment, []
        candidates = {name: list(spelled) for name, spelled in experiment.all_candidates().items()}
        for data, control in experiment.detected():
            seeds = experiment.seeds if data.seed is None else (data.seed,)
            trait = data.recipe.lesson.trait if data.recipe.lesson else None
            for one, seed in product(experiment.detectors, seeds):
                inputs = {
                    name: self.supplies.dataset(each.identity["recipe"], each.recipe, each.identity, seed, self.who)
                    for name, each in (("data", data), ("control", control))
                }
                params = {"subject": self.subject, **one.identity, "candidates": candidates, "seed": seed}
                plain = plain_of(one.detector)
                runtime = {"subject": self.subject_spec, "detector": one.identity["detector"], "settings": plain}
                key = self.add("interpret", params, inputs, f"{one.label} on {data.suffix}", runtime)
                shuffled = data.recipe.is_control
                about = {"detector": one.label, "data": data.suffix, "trait": trait, "shuffled": shuffled, "seed": seed}
                found.append((about, key))
        return found

    def compare(
        self,
        trials: tuple[PlannedTrial, ...],
        base: Mapping[int, str],
        detections: Sequence[tuple[dict[str, Any], str]],
    ) -> str:
        """ONE node that reads everything: role `base/EVAL`, `TRIAL/EVAL/DOSE` or `detect/NUMBER`."""
        inputs = {f"base/{index}": key for index, key in base.items()}
        for planned in trials:
            for (index, dose), key in planned.scores.items():
                inputs[f"{planned.trial.index}/{index}/{dose!r}"] = key
        inputs |= {f"detect/{number}": key for number, (_, key) in enumerate(detections)}
        experiment = self.experiment
        mismatches = experiment.mismatches() if experiment.context == "warn" else {}
        params = {
            "budget": experiment.budget.model_dump(mode="json"),
            "split": experiment.split.model_dump(mode="json"),
            "evals": [
                {
                    "task": each.spec.task,
                    "target": each.facts.identity.get("target"),
                    "version": each.facts.version,
                    "higher_is": each.facts.higher_is,
                    **self.judged(each),
                    **({"notes": [f"context: {mismatches[index]}"]} if index in mismatches else {}),
                }
                for index, each in enumerate(self.evals)
            ],
            "trials": [_row(planned.trial) for planned in trials],
        }
        if detections:
            params["detections"] = [about for about, _ in detections]
        runtime = {"experiment": experiment.name, "question": experiment.question}
        return self.add("compare", params, inputs, experiment.name, runtime)


def judged_score(
    add: Add, bench: Bench, answer: str, label: str, scoring: Mapping[str, Any], runtime: Mapping[str, Any]
) -> str:
    """Key of the score of an answer that the bench reads before; `runtime`: the task and its arguments."""
    task = runtime["task"]
    params = {**bench.identity, "rubrics": bench.rubrics[task]}
    judged = add("judge", params, {"answer": answer}, label, {**bench.runtime, "task": task})
    return add("score", scoring, {"answer": answer, "judged": judged}, label, runtime)


def judges(bench: Bench, task: str) -> dict[str, Any]:
    """What a `compare` node says of who judges a task, and by what."""
    about = {"digest": sha256(bench.identity), "models": bench.runtime["judge"]["models"], "itself": bench.itself}
    return {"judge": about, "rubrics": bench.rubrics[task]}


def _row(trial: Trial) -> dict[str, Any]:
    row = {
        "group": trial.group,
        "label": trial.label,
        "method": trial.identity["method"],
        "seed": trial.seed,
        "baseline": trial.baseline,
        "dose_kind": trial.intervention.dose_kind,
        "doses": trial.doses,
    }
    if trial.lesson is not None:
        row |= {"trait": trial.lesson.trait, "lesson": trial.lesson.name, "student": trial.student}
        row["shared"] = any(each.seed is not None for each in trial.data)
        if trial.control is not None:
            row["reference"] = trial.control
    return row
