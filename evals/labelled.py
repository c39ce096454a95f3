"""A judge over labelled answers: one verdict each, and one more with the choices turned where a rubric has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from agents.judge import Judge, Verdict
from agents.prompt import Case
from agents.rubric import Rubric
from evals import provider
from evals.asking import Grader, scores_exactly, verdict
from evals.collector import collector
from evals.labels import Label

Tell = Callable[[int, int], None]


def _nobody(done: int, total: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Reading:
    """What the judge said of one labelled answer."""

    label: Label
    verdict: Verdict
    turned: Verdict | None = None
    """The same with the choices offered in the opposite order; None for rubrics with a scale."""


async def readings(
    labels: Sequence[Label],
    rubrics: Mapping[str, Rubric],
    judge: Judge,
    graders: Sequence[Grader],
    tell: Tell = _nobody,
) -> list[Reading]:
    """Every answer's verdict by the rubric it is labelled for, in the order of `labels`. `tell` hears done and total.

    Raises JudgeError when a judge does not answer, RubricError for a further text that a label lacks.
    """
    found: dict[str, Reading] = {}
    for role, rubric in rubrics.items():
        of_role = [one for one in labels if one.rubric == role]
        verdicts = await _all(of_role, rubric, judge, graders)
        other: Sequence[Verdict | None] = [None] * len(of_role)
        if rubric.choices:
            other = await _all(of_role, turned(rubric), judge, graders)
        for one, first, second in zip(of_role, verdicts, other, strict=True):
            found[one.id] = Reading(one, first, second)
        tell(len(found), len(labels))
    return [found[one.id] for one in labels if one.id in found]


async def _all(labels: Sequence[Label], rubric: Rubric, judge: Judge, graders: Sequence[Grader]) -> list[Verdict]:
    """All at once; the engines of resident judges are told how many will ask, so that they see them together."""
    for _, model in graders:
        if scores_exactly(model, judge):
            collector(provider.arm(model.api.model_name).engine).expect(len(labels))
    cases = (Case(one.question, one.answer, one.fields) for one in labels)
    return list(await asyncio.gather(*(verdict(case, rubric, judge, graders) for case in cases)))


def turned(rubric: Rubric) -> Rubric:
    """The rubric with its choices offered in the opposite order. They mean the same, so its digest is the same."""
    return replace(rubric, choices=dict(reversed(list(rubric.choices.items()))))


def save(found: Sequence[Reading], path: Path) -> None:
    """Write readings as JSON lines: the answer's id, and the verdicts with every vote as it came."""
    lines = (
        {"id": one.label.id, "verdict": asdict(one.verdict), "turned": one.turned and asdict(one.turned)}
        for one in found
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
