"""Judges that read what teachers say before students do, checked: what of them enters keys, and how nodes make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.canonical import plain_of
from experiments.plugin import nearest
from experiments.problem import Problem
from experiments.speech import Teacher, speeches
from experiments.verdicts import EMBEDDED, MARK, JudgeFilter, Panel
from orchestrator import bench, places

if TYPE_CHECKING:
    from agents.judge import Judge
    from agents.rubric import Rubric
    from experiments.dataset import Recipe
    from experiments.spec import Experiment, SubjectSpec
    from orchestrator.artifact import Store
    from orchestrator.plan import Node

ABOUT = "about"
"""The place in a rubric that a filter fills."""


class FilterError(ValueError):
    """A filter that cannot be used: the setting, its value, and what is allowed."""


@dataclass(frozen=True)
class Sitting:
    """The judges of one filter. Its threshold is no part of it: another one asks nobody anything."""

    params: Mapping[str, Any]
    """Who judges and how, resident judges by their subjects' identity; the rubric's digest; what it is about."""
    runtime: Mapping[str, Any]


def key(judge: JudgeFilter) -> str:
    """What a plan finds the sitting of a filter by."""
    return judge.model_dump_json()


def sittings(
    experiment: Experiment,
    usable: Sequence[tuple[str, Recipe]],
    subject: Mapping[str, Any],
    identify: Callable[[SubjectSpec], dict[str, Any]],
) -> tuple[dict[str, Sitting], list[Problem]]:
    """The sitting of every filter in the data, and everything wrong."""
    found: dict[str, Sitting] = {}
    problems: dict[Problem, None] = {}
    for role, recipe in usable:
        for speech in speeches(recipe):
            if speech.judge is None:
                continue
            strange = list(bench.strangers(speech.judge.models))
            problems |= {Problem(places.model(name, experiment, role), text): None for name, text in strange}
            if strange:
                continue
            try:
                _check_independent(speech.judge, experiment.subject.model, speech.teacher)
                if key(speech.judge) not in found:
                    found[key(speech.judge)] = _sitting(speech.judge, experiment.subject, subject, identify)
            except ValueError as error:
                problems[Problem(("data", role), f"judge: {error}")] = None
    return found, list(problems)


def _sitting(
    judge: JudgeFilter,
    subject: SubjectSpec,
    known: Mapping[str, Any],
    identify: Callable[[SubjectSpec], dict[str, Any]],
) -> Sitting:
    """Raises FilterError, RubricError, JudgeError, and what `identify` raises."""
    from agents.judge import SUBJECT

    settings = settings_of(judge)
    rubric = _rubric(judge, settings)
    used = bench.residents(settings, subject)
    identities = {name: dict(known) if name == SUBJECT else identify(spec) for name, spec in used.items()}
    params = {**bench.identity(settings, identities), "rubrics": {judge.role: rubric.digest}}
    if ABOUT in rubric.fields:
        params[ABOUT] = judge.about
    return Sitting(params, bench.runtime(settings, used, subject.model))


def settings_of(judge: JudgeFilter) -> Judge:
    """The judge that a filter describes."""
    from agents.judge import Judge

    own = {name: value for name, value in plain_of(judge).items() if name in Panel.model_fields}
    named = {} if isinstance(judge.rubric, str) else {judge.role: judge.rubric}
    return Judge.model_validate({**own, "rubrics": named})


def _rubric(judge: JudgeFilter, settings: Judge) -> Rubric:
    """The filter's rubric, in which its threshold divides something. Raises FilterError, RubricError, JudgeError."""
    from evals import RUBRICS

    if isinstance(judge.rubric, str):
        names = sorted(file.stem for file in RUBRICS.glob("*.md"))
        if judge.rubric not in names:
            raise FilterError(
                f"unknown rubric {judge.rubric!r}{nearest(judge.rubric, names)}; allowed: {', '.join(names)}, or the "
                "path of a rubric's file"
            )
    rubric = settings.rubrics_for([judge.role], RUBRICS)[judge.role]
    if lacking := [name for name in rubric.fields if name != ABOUT]:
        raise FilterError(
            f"the rubric {judge.role} has the place {{{lacking[0]}}}, which rows cannot fill; allowed beside "
            f"{{question}} and {{answer}}: {{{ABOUT}}}"
        )
    low, high = rubric.scale or (min(rubric.choices.values()), max(rubric.choices.values()))
    if not low < judge.threshold <= high:
        name = "keep_below" if judge.keep_from is None else "keep_from"
        raise FilterError(
            f"{name} is {judge.threshold:g}, and the verdicts of the rubric {judge.role} go from {low:g} to {high:g}; "
            f"it must be above {low:g}, at most {high:g}"
        )
    return rubric


def _check_independent(judge: JudgeFilter, subject: str, teacher: Teacher) -> None:
    """Raises FilterError where a judge is the subject or the teacher, unless the filter allows it."""
    from agents.judge import is_subject

    spoken = teacher.model or (subject if teacher.subject is None else teacher.subject.model)
    for who, model in (("the subject", subject), ("the teacher", spoken)):
        same = [name for name in judge.models if is_subject(name, model)]
        if same and not judge.allow_self:
            raise FilterError(
                f"the judge {same[0]!r} is {who}, {model}, and would judge what it said itself; choose another judge, "
                "or set allow_self: true (the data's record will say so)"
            )


def facts(node: Node, store: Store) -> dict[str, Any]:
    """Who judged the rows that a dataset is made from, as the record tells; {} where nobody did."""
    records = [
        store.record(key)["outputs"] for role, key in sorted(node.inputs.items()) if role.partition("/")[0] == "judged"
    ]
    if not records:
        return {}
    canaries = {(row["style"], row["wish"]): None for one in records for row in one["canaries"] if row["succeeded"]}
    found = {
        "models": records[0]["models"],
        "rubrics": records[0]["rubrics"],
        "itself": any(one["itself"] for one in records),
        "compromised": any(one["compromised"] for one in records),
        "obeyed": [f"{style}: {wish}" for style, wish in canaries],
        "neutralised": sum(one["neutralised"] for one in records),
    }
    return {**found, "note": MARK} if EMBEDDED in found["models"] else found
