"""What is checked of a spec beyond its own text before anything runs: subject, data, evals, and where methods act."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from experiments.files import digest_all
from experiments.problem import Problem, SpecError, SpecPath
from experiments.spec import EvalSpec, Experiment, SubjectSpec
from orchestrator import places
from orchestrator.bench import Bench, appointed
from orchestrator.filters import Sitting, sittings
from orchestrator.places import Usable, misplaced, spoken

if TYPE_CHECKING:
    from experiments.dataset import Recipe
    from experiments.outline import Outline


class Facts(Protocol):
    """A checked eval, as `evals.task.TaskFacts` has it."""

    @property
    def version(self) -> int: ...
    @property
    def higher_is(self) -> str: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def runtime(self) -> dict[str, Any]: ...
    @property
    def rubrics(self) -> tuple[str, ...]: ...
    @property
    def scoring(self) -> dict[str, Any]: ...


Describe = Callable[[str, str | None, Mapping[str, Any]], Facts]
Identify = Callable[[SubjectSpec], dict[str, Any]]


@dataclass(frozen=True)
class PlannedEval:
    """An eval of the spec and what its task says about it."""

    spec: EvalSpec
    facts: Facts


def identify(spec: SubjectSpec) -> dict[str, Any]:
    """`experiments.subject.identify`, imported when it is needed."""
    from experiments.subject import identify

    return identify(spec)


def describe(task: str, target: str | None, params: Mapping[str, Any]) -> Facts:
    """`evals.task.describe`, imported when it is needed."""
    from evals.task import describe

    return describe(task, target, params)


def outline(spec: SubjectSpec) -> Outline:
    """`experiments.outline.outline`, imported when it is needed."""
    from experiments.outline import outline

    return outline(spec)


@dataclass(frozen=True)
class Checked:
    """What a plan needs to know beyond the spec's text."""

    subject: dict[str, Any]
    """Identity of the subject."""
    others: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
    """Settings of a teacher's own subject, as JSON -> its identity, and the settings as data."""
    evals: tuple[PlannedEval, ...]
    bench: Bench | None
    """Who judges; None where nothing is judged."""
    sittings: Mapping[str, Sitting]
    """Who judges what teachers say, by `filters.key`."""


def check(
    experiment: Experiment, identify: Identify, describe: Describe, outline: Callable[[SubjectSpec], Outline] | None
) -> Checked:
    """What the spec names beyond itself, checked. Raises SpecError with everything that is wrong.

    Without `outline`, for a subject of which nothing but its identity is known, layers and sites are not looked at.
    """
    subject: dict[str, Any] = {}
    problems: list[Problem] = []
    try:
        subject = identify(experiment.subject)
    except ValueError as error:
        problems.append(Problem(("subject",), str(error)))
    usable, unusable = _usable(experiment)
    problems += unusable or _out_of_context(experiment)
    problems += _undetectable(experiment)
    problems += _unheard(experiment, usable)
    others, wrong = _others(experiment, usable, identify)
    problems += wrong
    if subject and outline is not None:
        try:
            problems += misplaced(experiment, usable, outline, others)
        except ValueError as error:
            problems.append(Problem(("subject",), str(error)))
    sat, wrong = sittings(experiment, usable, subject, identify)
    problems += wrong
    evals, wrong = _described(experiment, describe)
    problems += wrong
    bench: Bench | None = None
    roles = {each.spec.task: each.facts.rubrics for each in evals if each.facts.rubrics}
    if roles:
        try:
            bench = appointed(experiment, roles, subject, identify)
        except SpecError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(Problem(("judge",), str(error)))
    elif experiment.judge:
        problems.append(Problem(("judge",), "none of the evals is judged; leave it out, or add an eval that is"))
    if problems:
        found = SpecError(*problems)
        raise found.at(experiment.source) if experiment.source else found
    return Checked(subject, others, evals, bench, sat)


def _undetectable(experiment: Experiment) -> list[Problem]:
    """Detectors whose files cannot be read, and a spec that gives them nothing to look into."""
    problems = []
    for one in experiment.detectors:
        try:
            one.detector.check()
        except ValueError as error:
            problems.append(Problem(one.path, str(error)))
    if experiment.detectors and not experiment.detected():
        text = "no conversations of a teacher with a control teacher beside them; add data whose recipe has a teacher"
        problems.append(Problem(("detect",), text))
    elif experiment.detectors and len(experiment.all_candidates()) < 2:
        names = ", ".join(experiment.all_candidates()) or "none"
        problems.append(Problem(("candidates",), f"{names}; detectors choose among two at least: name more"))
    return problems


def _out_of_context(experiment: Experiment) -> list[Problem]:
    """Evals that ask students in another chat context than they learned in, unless the spec allows it."""
    if experiment.context == "warn":
        return []
    fix = "ask in the same one (`system` of the eval, the subject or the data), or write `context: warn`"
    return [Problem(("evals", index, "system"), f"{text}; {fix}") for index, text in experiment.mismatches().items()]


def _unheard(experiment: Experiment, usable: Usable) -> list[Problem]:
    """Teachers, and writers of documents, behind a provider that inspect does not know."""
    problems: dict[SpecPath, Problem] = {}
    for role, each in spoken(usable):
        if each.model is not None:
            from evals import model_names

            if fault := model_names.fault(each.model):
                path = places.model(each.model, experiment, role)  # its control speaks with the same model
                problems.setdefault(path, Problem(path, f"teacher {each.name}: the model {each.model!r} {fault}"))
    return list(problems.values())


def _others(
    experiment: Experiment, usable: Usable, identify: Identify
) -> tuple[dict[str, tuple[dict[str, Any], dict[str, Any]]], list[Problem]]:
    """Subjects beside the experiment's own: those of teachers, and its own under an eval's system prompt."""
    wanted: list[tuple[SpecPath, str, SubjectSpec]] = [
        (("evals", index, "system"), "", asked_as(experiment, one))
        for index, one in enumerate(experiment.evals)
        if one.system is not None
    ]
    for role, each in spoken(usable):
        if each.subject is not None:
            wanted.append((("data", role), f"teacher {each.name}: ", each.subject))
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    problems: dict[Problem, None] = {}
    for path, who, spec in wanted:
        if spec.model_dump_json() in found:
            continue
        try:
            found[spec.model_dump_json()] = identify(spec), spec.model_dump(mode="json")
        except ValueError as error:
            problems[Problem(path, f"{who}{error}")] = None
    return found, list(problems)


def asked_as(experiment: Experiment, one: EvalSpec) -> SubjectSpec:
    """The subject in the context of an eval."""
    return experiment.subject if one.system is None else experiment.subject.model_copy(update={"system": one.system})


def _usable(experiment: Experiment) -> tuple[list[tuple[str, Recipe]], list[Problem]]:
    """The recipes whose files can be read, each with its role, and what is wrong with the others."""
    found: list[tuple[str, Recipe]] = []
    problems: dict[Problem, None] = {}
    for role, variants in experiment.data_variants().items():
        for variant in variants:
            try:
                variant.recipe.check()
            except ValueError as error:
                problems[Problem(("data", role), str(error))] = None
            else:
                found.append((role, variant.recipe))
    return found, list(problems)


def _described(experiment: Experiment, describe: Describe) -> tuple[tuple[PlannedEval, ...], list[Problem]]:
    """Each eval checked by its task, and what is wrong."""
    found: list[PlannedEval] = []
    problems: list[Problem] = []
    for index, spec in enumerate(experiment.all_evals):
        try:
            facts = describe(spec.task, spec.target, _with_local_files(spec.params, experiment.folder))
        except ValueError as error:
            path = ("evals", index) if index < len(experiment.evals) else ("evals",)
            problems.append(Problem(path, str(error)))
            continue
        found.append(PlannedEval(spec, facts))
    return tuple(found), problems


def _with_local_files(params: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Task settings in which a file that stands beside the spec has its absolute path."""

    def local(value: Any) -> Any:
        named = isinstance(value, str) and folder is not None and ("/" in value or "." in value)
        return str(place) if named and (place := Path(folder or ".") / value).is_file() else value

    return {name: local(value) for name, value in params.items()}


def calibration_texts() -> dict[str, str]:
    """sha256 of the texts that doses are calibrated on, which enter a result's key."""
    from evals.tasks.neutral_nll import BUILTIN_DATA
    from experiments.datasets._bank import PROMPTS

    return {"prompts_sha256": digest_all([PROMPTS]), "passages_sha256": digest_all([BUILTIN_DATA])}
