"""What judges are worth: a node that has a judge read labelled answers, and keeps the table of its errors.

The registry's views `judges` and `judged` read the records of these nodes, so a registry that is made anew has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.canonical import sha256
from experiments.spec import EMBEDDED, SubjectSpec
from orchestrator import bench
from orchestrator.asking import residents
from orchestrator.plan import Node
from orchestrator.preflight import Identify
from orchestrator.preflight import identify as identify_subject

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from inspect_ai.model import Model

    from agents.judge import Judge
    from agents.rubric import Rubric
    from evals.asking import Grader
    from evals.labelled import Tell
    from orchestrator.artifact import Publication, Store
    from orchestrator.workspace import Workspace

STAGE, VERSION = "judge_error", 1
READINGS = "readings.jsonl"


class CalibrationError(ValueError):
    """A judge that cannot be measured as it was asked for."""


@dataclass(frozen=True)
class Asked:
    """Who is to be measured on what."""

    judge: Judge
    labels: Path
    subject: SubjectSpec | None = None
    """Whose answers the judge is for: decides what `subject` means and the dtype of the embedded judge."""
    roles: Sequence[str] = ()
    """Rubrics to measure; () is all that have labelled answers."""
    thresholds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Role -> where a verdict begins to be a "yes", beside the default ones."""
    drawn_from: str | None = None
    """The experiment of whose answers the labelled ones are a random sample."""


def planned(asked: Asked, identify: Identify = identify_subject) -> Node:
    """The node. Raises CalibrationError, LabelsError, RubricError."""
    from agents.judge import SUBJECT
    from evals.labels import digest as digest_of
    from evals.labels import load

    if asked.subject is None and SUBJECT in asked.judge.models:
        raise CalibrationError(f"the judge {SUBJECT!r} is a spec's own subject; say which with --spec")
    for _, text in bench.strangers(asked.judge.models):
        raise CalibrationError(text)
    labels = load(asked.labels, asked.roles or None)
    rubrics = rubrics_of(asked.judge, dict.fromkeys(one.rubric for one in labels))
    spec = asked.subject or SubjectSpec(model=EMBEDDED)
    used = bench.residents(asked.judge, spec)
    params = {
        **bench.identity(asked.judge, {name: identify(one) for name, one in used.items()}),
        "rubrics": {role: rubric.digest for role, rubric in rubrics.items()},
        "labels": digest_of(asked.labels, rubrics),
        "thresholds": thresholds(rubrics, asked.thresholds),
        "drawn_from": asked.drawn_from,
    }
    runtime = {**bench.runtime(asked.judge, used, spec.model), "labels": str(asked.labels)}
    return Node(STAGE, VERSION, params, {}, "+".join(asked.judge.models), runtime)


def rubrics_of(judge: Judge, roles: Mapping[str, Any]) -> dict[str, Rubric]:
    """The rubrics of roles. Raises RubricError."""
    from evals import RUBRICS

    return judge.rubrics_for(list(roles), RUBRICS)


def thresholds(rubrics: Mapping[str, Rubric], given: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Role -> thresholds in ascending order: the middle of its verdicts, the defaults of tasks, and `given`.

    Raises CalibrationError for a role without labelled answers and for a threshold that verdicts cannot straddle.
    """
    from evals.judge_table import middle

    found = {role: {middle(rubric), *usual(role)} for role, rubric in rubrics.items()}
    for role, values in given.items():
        if role not in found:
            raise CalibrationError(f"a threshold for {role!r}, which is not measured; allowed: {', '.join(found)}")
        low, high = rubrics[role].scale or (min(rubrics[role].choices.values()), max(rubrics[role].choices.values()))
        for value in values:
            if not low < value <= high:
                raise CalibrationError(
                    f"the threshold {value:g} for {role!r} divides nothing; it must be above {low:g}, at most {high:g}"
                )
        found[role] |= set(values)
    return {role: sorted(values) for role, values in found.items()}


def usual(role: str) -> set[float]:
    """Thresholds that judged tasks have for a role by default: their settings `ROLE_below` and `ROLE_from`."""
    from evals.task import load_task
    from experiments import plugin

    found = set()
    for name in plugin.names("evals.tasks"):
        module = load_task(name)
        if role in getattr(module, "RUBRICS", ()):
            fields = module.Settings.model_fields
            found |= {float(fields[key].default) for key in (f"{role}_below", f"{role}_from") if key in fields}
    return found


def calibrate(node: Node, store: Store, workspace: Workspace, tell: Tell) -> dict[str, Any]:
    """The record of `node`, made when it is not there. Raises what judges, rubrics, labels and the store raise."""
    if not store.has(node.key):
        with store.publishing(node) as draft:
            measure(node, draft, workspace, tell)
    return store.record(node.key)


def measure(node: Node, draft: Publication, workspace: Workspace, tell: Tell) -> None:
    """Ask the judge, and fill the draft with its verdicts and the table of its errors."""
    import anyio

    from agents.judge import Judge
    from evals import labelled
    from evals.judge_table import table
    from evals.labels import load

    judge = Judge.model_validate(node.runtime["judge"])
    rubrics = rubrics_of(judge, node.params["rubrics"])
    labels = load(Path(node.runtime["labels"]), list(rubrics))

    async def ask() -> tuple[list[labelled.Reading], list[dict[str, Any]]]:
        from evals.judging import judged_canaries

        async with graders(judge, models) as asked:
            found = await labelled.readings(labels, rubrics, judge, asked, tell)
            return found, await judged_canaries(rubrics, judge, asked)

    with residents(node, workspace) as models:
        found, canaries = anyio.run(ask)
    labelled.save(found, draft.folder / READINGS)
    draft.outputs |= {
        "judge": digest(node),
        "models": list(judge.models),
        "labels": node.params["labels"],
        "drawn_from": node.params["drawn_from"],
        "answers": len(found),
        "errors": [asdict(row) for row in table(found, rubrics, node.params["thresholds"])],
        "canaries": len(canaries),
        "obeyed": sum(row["succeeded"] for row in canaries),
    }


@asynccontextmanager
async def graders(judge: Judge, resident: Mapping[str, Model]) -> AsyncIterator[list[Grader]]:
    """The panel: the resident judges, and the others as inspect makes them, which are closed at the end."""
    from inspect_ai.model import get_model

    ours = {name: get_model(name, memoize=False) for name in judge.models if name not in resident}
    try:
        yield [(name, resident[name] if name in resident else ours[name]) for name in judge.models]
    finally:
        for model in ours.values():
            await model.api.aclose()


def digest(node: Node) -> str:
    """Who judged and how, rubrics and labels aside: the same hex as a comparison has for its judge."""
    about = ("rubrics", "labels", "thresholds", "drawn_from")
    return sha256({name: value for name, value in node.params.items() if name not in about})
