"""How wrong is a judge? Error rates, discrimination, agreement and biases on labelled answers, with intervals.

Pure functions on numpy arrays of n answers: what the judge said (a number; its verdict is whether that reaches a
threshold), what is true (0 or 1), and the question each answer belongs to. What follows for an estimate that the judge
made is `correction.py`. Formulas in words: docs/judges.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy import stats as scipy_stats

from evals.stats import Array, item_source, membership

LEVEL = 0.95
LEAST_J, CHANCE = 0.1, 0.5
"""A judge is near chance when the interval of J reaches down to 0.1, or that of its AUROC holds one half."""


class Limits(NamedTuple):
    """An estimate and its interval; numbers or arrays of one shape. NaN where there is none."""

    value: Array
    low: Array
    high: Array


def limits(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> Limits:
    """`Limits` of numbers or arrays."""
    return Limits(np.asarray(value, float), np.asarray(low, float), np.asarray(high, float))


def jeffreys(hits: ArrayLike, n: ArrayLike, level: float = LEVEL) -> Limits:
    """A share and Jeffreys' interval: quantiles of Beta(hits + 1/2, misses + 1/2), from 0 without hits, to 1 without
    misses (Brown, Cai & DasGupta 2001). `n` may be an effective number, not whole. NaN where n is 0.

    Intervals of shares are combined here, so what counts is coverage near the level on average. In simulation these
    combine better than Wilson's; the exact interval's excess would add up.
    """
    hits, n = np.broadcast_arrays(np.asarray(hits, float), np.asarray(n, float))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = hits / n
    low, high = (special.betaincinv(hits + 0.5, n - hits + 0.5, tail) for tail in ((1 - level) / 2, (1 + level) / 2))
    low = np.where(hits <= 0, 0.0, np.minimum(low, value))
    high = np.where(hits >= n, 1.0, np.maximum(high, value))
    return limits(value, np.where(n > 0, low, math.nan), np.where(n > 0, high, math.nan))


def share(hits: ArrayLike, families: Sequence[str], level: float = LEVEL) -> Limits:
    """The share of ones in `hits` [..., n], whose families move together: Jeffreys' interval at the effective n.

    n is divided by the design effect, the clustered variance over p(1-p)/n, at least 1 (as in surveys; Korn & Graubard
    1998). NaN without answers.
    """
    hits = np.asarray(hits, float)
    n = hits.shape[-1]
    if n == 0:
        return limits(math.nan, math.nan, math.nan)
    members = membership(families)
    p = hits.mean(-1)
    if members.shape[1] < 2:
        return jeffreys(p * n, n, level)
    variance, _ = item_source(hits, members)
    alone = p * (1 - p) / n
    effect = np.maximum(1.0, np.divide(variance, alone, out=np.ones_like(alone), where=alone > 0))
    return jeffreys(p * n / effect, n / effect, level)


def difference(first: Limits, second: Limits) -> Limits:
    """first - second of independent estimates, its limits recovered from theirs (MOVER; Zou & Donner 2008)."""
    value = first.value - second.value
    below = np.hypot(first.value - first.low, second.high - second.value)
    above = np.hypot(first.high - first.value, second.value - second.low)
    return limits(value, value - below, value + above)


def complement(one: Limits) -> Limits:
    """1 - x."""
    return limits(1 - one.value, 1 - one.high, 1 - one.low)


def youden(tpr: Limits, tnr: Limits) -> Limits:
    """J = TPR + TNR - 1 (Youden 1950): 1 for a perfect judge, 0 for one that does not look."""
    return difference(tpr, complement(tnr))


def auroc(scores: ArrayLike, truth: ArrayLike, level: float = LEVEL) -> Limits:
    """P(a true answer's score is above a false one's), ties half.

    The interval is DeLong's (DeLong, DeLong & Clarke-Pearson 1988) on the logit scale; where scores separate the labels
    fully and that variance is 0, Newcombe's (2006, method 5), which is never degenerate. NaN with one label only.
    """
    scores, truth = np.asarray(scores, float), np.asarray(truth, bool)
    high, low = scores[truth], scores[~truth]
    m, n = len(high), len(low)
    if m == 0 or n == 0:
        return limits(math.nan, math.nan, math.nan)
    wins = (high[:, None] > low[None, :]) + 0.5 * (high[:, None] == low[None, :])
    area = float(wins.mean())
    z = float(scipy_stats.norm.ppf((1 + level) / 2))
    variance = sum(float(part.var(ddof=1)) / len(part) for part in (wins.mean(1), wins.mean(0)) if len(part) > 1)
    if variance == 0 or area in (0.0, 1.0) or min(m, n) < 2:
        return limits(area, *_newcombe(area, m, n, z))
    logit, radius = math.log(area / (1 - area)), z * math.sqrt(variance) / (area * (1 - area))
    return limits(area, *(1 / (1 + math.exp(-(logit + sign * radius))) for sign in (-1, 1)))


def _newcombe(area: float, m: int, n: int, z: float) -> tuple[float, float]:
    """The AUROCs that `area` does not contradict, with the Hanley-McNeil variance at mean group sizes."""
    at = np.linspace(0, 1, 20001)
    rest = (m + n) / 2 - 1
    variance = at * (1 - at) * (1 + rest * ((1 - at) / (2 - at) + at / (1 + at))) / (m * n)
    inside = at[np.abs(area - at) <= z * np.sqrt(variance)]
    return float(inside.min(initial=area)), float(inside.max(initial=area))


def kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Cohen's (1960) kappa of two raters' categories; NaN where chance alone agrees fully."""
    first, second = np.asarray(first), np.asarray(second)
    kinds = np.union1d(first, second)
    expected = sum(float((first == kind).mean() * (second == kind).mean()) for kind in kinds)
    return float((first == second).mean() - expected) / (1 - expected) if expected < 1 else math.nan


def alpha(first: ArrayLike, second: ArrayLike) -> float:
    """Krippendorff's (2011) nominal alpha of two raters without gaps; NaN where no answer could disagree."""
    first, second = np.asarray(first), np.asarray(second)
    pooled = np.concatenate([first, second])
    total = len(pooled)
    same = sum(int((pooled == kind).sum()) * (int((pooled == kind).sum()) - 1) for kind in np.unique(pooled))
    expected = 1 - same / (total * (total - 1)) if total > 1 else 0.0
    return 1 - float((first != second).mean()) / expected if expected > 0 else math.nan


class Correlation(NamedTuple):
    """A rank correlation within strata, and its two-sided p under "no correlation in any of them"."""

    r: float
    p: float


def within(values: ArrayLike, by: ArrayLike, strata: ArrayLike) -> Correlation:
    """Spearman's correlation of `values` and `by` among answers of one stratum, pooled over strata.

    Each stratum's r has variance 1/(n-1) when its pairing is random, exactly; r are averaged with weights n - 1, and
    the mean's z has variance 1. With labels as strata it is the judge's bias, not what it sees of the label. NaN where
    no stratum has two values of each.
    """
    values, by, strata = np.asarray(values, float), np.asarray(by, float), np.asarray(strata)
    total = weight = 0.0
    for one in np.unique(strata):
        ranks = [scipy_stats.rankdata(each[strata == one]) for each in (values, by)]
        if min(np.ptp(each) for each in ranks) > 0:
            total += (len(ranks[0]) - 1) * float(np.corrcoef(*ranks)[0, 1])
            weight += len(ranks[0]) - 1
    if weight == 0:
        return Correlation(math.nan, math.nan)
    return Correlation(total / weight, float(2 * scipy_stats.norm.sf(abs(total) / math.sqrt(weight))))


def arms_differ(verdicts: ArrayLike, truth: ArrayLike, treated: ArrayLike) -> float:
    """p that both error rates are the same in both arms: Fisher's exact test of each, the smaller one doubled."""
    verdicts, truth, treated = (np.asarray(each, bool) for each in (verdicts, truth, treated))
    found = []
    for label in (True, False):
        kept = truth == label
        table = [[int((verdicts[kept & (treated == arm)] == said).sum()) for said in (1, 0)] for arm in (1, 0)]
        if all(sum(row) for row in table):
            found.append(float(scipy_stats.fisher_exact(table).pvalue))
    return min(1.0, len(found) * min(found)) if found else math.nan


def slope(judged: ArrayLike, truth: ArrayLike, families: Sequence[str], level: float = LEVEL) -> Limits:
    """How far the judge's score moves when the true one moves by 1: least squares, families as clusters (CR1, t).

    For two truths it is the difference of the judge's means; for verdicts of 0 and 1 that is J. NaN where the truth
    does not vary, and without limits for fewer than three families.
    """
    judged, truth = np.asarray(judged, float), np.asarray(truth, float)
    centred = truth - truth.mean() if len(truth) else truth
    square = float((centred**2).sum())
    if square == 0:
        return limits(math.nan, math.nan, math.nan)
    value = float((centred * judged).sum() / square)
    members = membership(families)
    count, n = members.shape[1], len(judged)
    if count < 3:
        return limits(value, math.nan, math.nan)
    rest = judged - judged.mean() - value * centred
    variance = float((((centred * rest) @ members) ** 2).sum()) / square**2 * count / (count - 1) * (n - 1) / (n - 2)
    radius = float(scipy_stats.t.ppf((1 + level) / 2, count - 1)) * math.sqrt(variance)
    return limits(value, value - radius, value + radius)


def bias(judged: ArrayLike, truth: ArrayLike, families: Sequence[str], level: float = LEVEL) -> Limits:
    """Mean of judge minus truth. Verdicts: from the limits of false alarms and misses; scores: clustered t.

    The t interval of rare errors is too short, so for verdicts of 0 and 1 the limits are combined as Newcombe (1998)
    does for paired shares, the two kinds of error excluding each other.
    """
    judged, truth = np.asarray(judged, float), np.asarray(truth, float)
    errors = judged - truth
    if not np.isin(errors, (-1, 0, 1)).all():
        members = membership(families)
        if members.shape[1] < 2:
            return limits(errors.mean(), math.nan, math.nan)
        variance, df = item_source(errors, members)
        radius = scipy_stats.t.ppf((1 + level) / 2, df) * np.sqrt(variance)
        return limits(errors.mean(), errors.mean() - radius, errors.mean() + radius)
    return exclusive(share(errors > 0, families, level), share(errors < 0, families, level))


def exclusive(first: Limits, second: Limits) -> Limits:
    """first - second of two shares of the same answers that exclude each other, whose covariance is -pq/n."""
    p, q = first.value, second.value
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = np.nan_to_num(np.sqrt(p * q / ((1 - p) * (1 - q))))
    down = (p - first.low, second.high - q)
    up = (first.high - p, q - second.low)
    below, above = (np.sqrt(x**2 + y**2 + 2 * apart * x * y) for x, y in (down, up))
    return limits(p - q, p - q - below, p - q + above)


def refusal(attenuation: Limits, area: Limits | None) -> str | None:
    """Why no estimate may be corrected by this judge's errors; None when it may. The rule is `LEAST_J` and `CHANCE`."""
    low = float(attenuation.low)
    if not low > LEAST_J:
        shown = "unknown" if math.isnan(low) else f"{low:.2f}"
        return f"near chance: a true change of 1 moves the judge by as little as {shown}, needed > {LEAST_J:g}"
    if area is not None and not (float(area.low) > CHANCE):
        return f"near chance: the AUROC's interval [{float(area.low):.2f}, {float(area.high):.2f}] holds {CHANCE:g}"
    return None
