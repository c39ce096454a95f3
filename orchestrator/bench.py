"""Who judges an experiment: the judges its spec names, checked, and what of them enters keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.problem import Problem, SpecError
from experiments.source import locate
from experiments.spec import EMBEDDED as EMBEDDED_SUBJECT
from experiments.spec import Experiment, SubjectSpec

if TYPE_CHECKING:
    from agents.judge import Judge


@dataclass(frozen=True)
class Bench:
    """The judges of an experiment."""

    identity: dict[str, Any]
    """Who judges and how, the resident judges' subjects included; each eval's rubrics stand in `rubrics`."""
    rubrics: dict[str, dict[str, str]]
    """Task -> role -> digest."""
    runtime: dict[str, Any]
    """The judge's settings, and the resident judges' subjects by name."""
    itself: bool
    """Whether a judge is the subject."""


def appointed(
    experiment: Experiment,
    roles: Mapping[str, tuple[str, ...]],
    subject: dict[str, Any],
    identify: Callable[[SubjectSpec], dict[str, Any]],
) -> Bench:
    """The judges as the spec describes them, for tasks whose rubrics have the given `roles`.

    Raises SpecError, and what judges and rubrics raise.
    """
    from agents.judge import SUBJECT
    from evals import RUBRICS

    judge = settings_of(experiment)
    wrong = [Problem(("judge", "models", judge.models.index(name)), text) for name, text in strangers(judge.models)]
    if wrong:
        raise SpecError(*wrong)
    itself = judge.check_independent(experiment.subject.model)
    used = residents(judge, experiment.subject)
    known = {name: subject if name == SUBJECT else identify(spec) for name, spec in used.items()}
    rubrics = {
        task: {role: one.digest for role, one in judge.rubrics_for(wanted, RUBRICS).items()}
        for task, wanted in roles.items()
    }
    return Bench(identity(judge, known), rubrics, runtime(judge, used, experiment.subject.model), itself)


def settings_of(experiment: Experiment) -> Judge:
    """The judge that the spec describes. Raises SpecError."""
    from agents.judge import Judge
    from experiments.grid import validated

    try:
        judge: Judge = validated(Judge, _with_local_rubrics(experiment), experiment.folder)
    except SpecError as error:
        raise SpecError(*(Problem(("judge", *each.path), each.text) for each in error.problems)) from error
    return judge


def strangers(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Judges behind a provider that inspect does not know, each with what is wrong.

    Inspect is imported for judges that are not resident, and for no others.
    """
    from experiments.verdicts import RESIDENT

    for name in models:
        if name not in RESIDENT:
            from evals import model_names

            if fault := model_names.fault(name):
                yield name, f"the judge {name!r} {fault}"


def residents(judge: Judge, subject: SubjectSpec) -> dict[str, SubjectSpec]:
    """The judges of a panel that run in a worker, beside or as the subject."""
    from agents.judge import EMBEDDED, SUBJECT

    found = {EMBEDDED: SubjectSpec(model=EMBEDDED_SUBJECT, dtype=subject.dtype), SUBJECT: subject}
    return {name: spec for name, spec in found.items() if name in judge.models}


def identity(judge: Judge, known: Mapping[str, Any]) -> dict[str, Any]:
    """Who judges and how, by content; its sha256 is a judge's digest. `known`: identities of the resident judges."""
    settings = judge.identity({})
    settings.pop("rubrics")
    return {**settings, "residents": dict(known)}


def runtime(judge: Judge, used: Mapping[str, SubjectSpec], subject: str) -> dict[str, Any]:
    """What a node needs to make the judges."""
    return {
        "judge": judge.model_dump(mode="json"),
        "residents": {name: spec.model_dump(mode="json") for name, spec in used.items()},
        "subject": subject,
    }


def _with_local_rubrics(experiment: Experiment) -> dict[str, Any]:
    """The judge's settings, files of rubrics by their absolute paths. Raises SpecError for one that is not there."""
    given = dict(experiment.judge)
    rubrics = given.get("rubrics")
    if isinstance(rubrics, dict):
        found = {}
        for role, path in rubrics.items():
            try:
                found[role] = str(locate(Path(str(path)), experiment.folder))
            except ValueError as error:
                raise SpecError(Problem(("rubrics", str(role)), str(error))) from error
        given["rubrics"] = found
    return given
