"""The error table of a judge: one row for each rubric, kind of estimate, split and arm of its labelled answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agents.rubric import Rubric
from evals import judge_error
from evals.judge_error import Limits
from evals.labelled import Reading
from evals.stats import Array

ARMS = ("all", "base", "treated")
Kind = Literal["rate", "score"]


@dataclass(frozen=True)
class ErrorRow:
    """What a judge's verdicts by one rubric are worth. None is not computable. Intervals are of 95 %."""

    role: str
    rubric: str
    """Digest of the rubric."""
    kind: Kind
    """rate: verdicts, by a threshold. score: the judge's numbers."""
    threshold: float | None
    """A verdict is "yes" from here on; None for scores."""
    split: str
    arm: str
    n: int
    """Answers with a verdict, on which all else rests."""
    positives: int
    questions: int
    unscored: int
    mass: float | None
    """Mean probability of all readable verdicts together, where the judge gives probabilities; unscored ones too."""
    tpr: float | None
    tpr_low: float | None
    tpr_high: float | None
    tnr: float | None
    tnr_low: float | None
    tnr_high: float | None
    slope: float | None
    """By how much the judge moves when the truth moves by 1: J of verdicts, a regression's slope of scores."""
    slope_low: float | None
    slope_high: float | None
    auroc: float | None
    auroc_low: float | None
    auroc_high: float | None
    agreement: float | None
    kappa: float | None
    alpha: float | None
    spearman: float | None
    """Of the judge's number and the reference, where answers have one."""
    bias: float | None
    """Mean of judge minus truth."""
    bias_low: float | None
    bias_high: float | None
    length_r: float | None
    """Rank correlation of the judge's number and the answer's length, among answers of one label."""
    length_p: float | None
    turned_flips: float | None
    """Share of verdicts that change when the choices come in the opposite order."""
    turned_shift: float | None
    """Mean change of the judge's number then."""
    arms_p: float | None
    """p of the same errors in both arms, which a correction of a difference of arms takes for granted."""
    refused: str | None
    """Why no estimate may be corrected by these errors."""


def table(
    found: Sequence[Reading], rubrics: Mapping[str, Rubric], thresholds: Mapping[str, Sequence[float]]
) -> list[ErrorRow]:
    """Rows of every rubric in `rubrics`, for verdicts at each of its `thresholds` and for scores."""
    rows = []
    for role, rubric in rubrics.items():
        of_role = [one for one in found if one.label.rubric == role]
        kinds: list[float | None] = [*thresholds[role], *([None] if _has_truths(of_role, rubric) else [])]
        for threshold in kinds:
            for split in dict.fromkeys(one.label.split for one in of_role):
                in_split = [one for one in of_role if one.label.split == split]
                rows += [_row(role, rubric, threshold, split, arm, in_split) for arm in ARMS]
    return rows


def middle(rubric: Rubric) -> float:
    """The threshold between a rubric's lowest and highest verdict."""
    ends = rubric.scale or (min(rubric.choices.values()), max(rubric.choices.values()))
    return sum(ends) / 2


def _has_truths(found: Sequence[Reading], rubric: Rubric) -> bool:
    """Whether true scores are known: choices have values, scales need references."""
    return rubric.scale is None or all(one.label.reference is not None for one in found)


def _row(
    role: str, rubric: Rubric, threshold: float | None, split: str, arm: str, found: Sequence[Reading]
) -> ErrorRow:
    of_arm = [one for one in found if arm in ("all", one.label.arm)]
    read = [one for one in of_arm if one.verdict.value is not None]
    values = np.array([one.verdict.value for one in read], float)
    labels = np.array([true(one, threshold, rubric) for one in read], bool)
    questions = [one.label.question for one in read]
    area = judge_error.auroc(values, labels)
    if threshold is None:
        judged, truth = values, np.array([score_of(one, rubric) for one in read], float)
        attenuation = judge_error.slope(judged, truth, questions)
        shares: tuple[Limits | None, Limits | None] = (None, None)
    else:
        judged, truth = (values >= threshold).astype(float), labels.astype(float)
        tpr = judge_error.share(judged[labels], _of(questions, labels.tolist()))
        tnr = judge_error.share(1 - judged[~labels], _of(questions, (~labels).tolist()))
        attenuation, shares = judge_error.youden(tpr, tnr), (tpr, tnr)
    length = judge_error.within(values, [one.label.words for one in read], labels)
    rate = threshold is not None
    return ErrorRow(
        role, rubric.digest, "rate" if rate else "score", threshold, split, arm,
        len(read), int(labels.sum()), len(set(questions)), len(of_arm) - len(read), _mass(of_arm),
        *_three(shares[0]), *_three(shares[1]), *_three(attenuation), *_three(area),
        _number((judged == truth).mean()) if rate and read else None,
        _number(judge_error.kappa(judged, truth)) if rate and read else None,
        _number(judge_error.alpha(judged, truth)) if rate and read else None,
        _number(_spearman(values, read)),
        *_three(judge_error.bias(judged, truth, questions) if read else None),
        _number(length.r), _number(length.p),
        *_turned(read, threshold),
        _arms_p(read, judged, truth, labels, rate) if arm == "all" else None,
        judge_error.refusal(attenuation, area) if read else f"no verdict on any of {len(of_arm)} answers",
    )  # fmt: skip


def true(one: Reading, threshold: float | None, rubric: Rubric) -> bool:
    """Whether the answer is a "yes": its reference at the threshold where it has one, else its label."""
    reference = one.label.reference
    if threshold is None or rubric.scale is None or reference is None:
        return one.label.label == 1
    return reference >= threshold


def score_of(one: Reading, rubric: Rubric) -> float:
    """The true score: the reference on a scale, the highest or lowest value of choices."""
    if rubric.scale is not None and one.label.reference is not None:
        return one.label.reference
    values = rubric.choices.values()
    return max(values) if one.label.label else min(values)


def _mass(found: Sequence[Reading]) -> float | None:
    masses = [one.verdict.mass for one in found if one.verdict.mass is not None]
    return sum(masses) / len(masses) if masses else None


def _of(questions: Sequence[str], kept: Iterable[bool]) -> list[str]:
    return [question for question, keep in zip(questions, kept, strict=True) if keep]


def _spearman(values: Array, read: Sequence[Reading]) -> float:
    references = [one.label.reference for one in read]
    if any(each is None for each in references):
        return math.nan
    return judge_error.within(values, np.array(references, float), np.zeros(len(read))).r


def _turned(read: Sequence[Reading], threshold: float | None) -> tuple[float | None, float | None]:
    pairs = [
        (one.verdict.value, one.turned.value)
        for one in read
        if one.turned is not None and one.turned.value is not None and one.verdict.value is not None
    ]
    if not pairs:
        return None, None
    first, second = np.array(pairs).T
    flips = None if threshold is None else _number(((first >= threshold) != (second >= threshold)).mean())
    return flips, _number((second - first).mean())


def _arms_p(read: Sequence[Reading], judged: Array, truth: Array, labels: Array, rate: bool) -> float | None:
    treated = np.array([one.label.arm == "treated" for one in read], bool)
    if rate:
        return _number(judge_error.arms_differ(judged, truth, treated))
    return _number(judge_error.within(judged - truth, treated, labels).p)


def _three(found: Limits | None) -> tuple[float | None, float | None, float | None]:
    if found is None:
        return None, None, None
    return _number(found.value), _number(found.low), _number(found.high)


def _number(value: float | Array) -> float | None:
    """A finite float, or None."""
    return float(value) if math.isfinite(float(value)) else None
