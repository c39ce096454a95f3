"""Paired statistics of one experiment: effects per item, intervals over families and seeds, corrections, choices.

Pure functions on numpy arrays. Axes are named in each docstring: n items, C families, S seeds, K doses; `...` is any
batch. Formulas, sources and their measured error rates: docs/metrics.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

SMALLEST_P = 1e-100
"""p-values below this are reported as this: quantiles of the t distribution cannot be inverted further out."""


class StatsError(ValueError):
    """Numbers that no statistic can be computed from; the message says which and what is allowed."""


def odd_part(plus: ArrayLike, minus: ArrayLike) -> Array:
    """(s(+c) - s(-c)) / 2 per item: what reverses with the sign of the dose, the steering."""
    return (np.asarray(plus, float) - np.asarray(minus, float)) / 2


def even_part(plus: ArrayLike, minus: ArrayLike, zero: ArrayLike) -> Array:
    """(s(+c) + s(-c)) / 2 - s(0) per item: what moves the same way at both signs, the side effect."""
    return (np.asarray(plus, float) + np.asarray(minus, float)) / 2 - np.asarray(zero, float)


def split(families: Sequence[str], dev: float) -> dict[str, str]:
    """Family -> "dev" or "test": families in the order of their sha256, the first round(dev * C) are dev.

    Depends on the family names only, so every arm and every run of the same items is split alike. With two or more
    families both sides get at least one. Raises StatsError unless 0 < dev < 1.
    """
    if not 0 < dev < 1:
        raise StatsError(f"the development share is {dev}; it must lie strictly between 0 and 1, e.g. 0.5")
    ordered = sorted(set(families), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    cut = math.floor(dev * len(ordered) + 0.5)
    if len(ordered) >= 2:
        cut = min(max(cut, 1), len(ordered) - 1)
    return {name: "dev" if rank < cut else "test" for rank, name in enumerate(ordered)}


def membership(families: Sequence[str]) -> Array:
    """[n, C] matrix of ones and zeros: which item belongs to which family."""
    codes = np.unique(np.asarray(families, dtype=object).astype(str), return_inverse=True)[1]
    return np.eye(int(codes.max()) + 1 if len(codes) else 0)[codes]


def clustered_variance(values: ArrayLike, members: Array) -> Array:
    """Variance of the mean of `values` [..., n] when items of one family [n, C] move together; [...].

    C/(C-1) * sum over families of (sum of residuals)^2 / n^2, the CR1 estimator of an intercept (Cameron & Miller
    2015; Miller 2024 with the finite-cluster factor). NaN with fewer than two families: there is no estimate then.
    """
    values = np.asarray(values, float)
    n, count = members.shape
    if count < 2:
        return np.full(values.shape[:-1], np.nan)
    sums = (values - values.mean(-1, keepdims=True)) @ members
    return count / (count - 1) * (sums**2).sum(-1) / n**2


def family_design(members: Array) -> tuple[float, float]:
    """(inflation, df) of the clustered variance for families of unequal size [n, C]; (1, C - 1) for equal ones.

    With unequal families the CR1 variance is too small on average and less certain than C - 1 suggests. Both follow
    from the family sizes under a working model (Bell & McCaffrey 2002; Imbens & Kolesar 2016); taken is the worse of
    two: items of a family independent, or moving as one.
    """
    sizes = members.sum(0)
    if len(sizes) < 2:
        return 1.0, 0.0
    w = sizes / sizes.sum()
    inflations, dfs = [], []
    for v in (sizes, sizes**2):  # variances of the family sums under the two models
        s, vw, ww = v.sum(), v @ w, w @ w
        trace = s - 2 * vw + s * ww  # of A = M diag(v) M', M = I - w 1' taking family sums to residual sums
        squares = v @ v - 4 * (w @ v**2) + 2 * s * (v @ w**2) + 2 * vw**2 + 2 * ww * (v @ v) - 4 * s * vw * ww
        squares += (s * ww) ** 2
        inflations.append(s / trace * (len(w) - 1) / len(w))
        dfs.append(trace**2 / squares)
    return max(1.0, *map(float, inflations)), min(len(w) - 1.0, *map(float, dfs))


def item_source(values: ArrayLike, members: Array) -> tuple[Array, float]:
    """Variance [...] of the mean of `values` [..., n] over sampled families, and its degrees of freedom."""
    inflation, df = family_design(members)
    return clustered_variance(values, members) * inflation, df


@dataclass(frozen=True)
class Estimate:
    """A mean with independent sources of variance, each with its own degrees of freedom.

    mean [...], variances [..., k], dfs [k]. A batch of estimates that share a design is one Estimate.
    """

    mean: Array
    variances: Array
    dfs: Array

    @property
    def se(self) -> Array:
        """Standard error [...]: root of the summed variances."""
        return np.sqrt(self.variances.sum(-1))

    @property
    def df(self) -> float:
        """Degrees of freedom of the scarcest source that this estimate has."""
        used = self.dfs[np.reshape(self.variances, (-1, len(self.dfs))).any(axis=0)] if len(self.dfs) else self.dfs
        return float(used.min()) if len(used) else float(self.dfs.min(initial=np.inf))

    def radius(self, alpha: float) -> Array:
        """Half width [...] of the two-sided interval: sqrt(sum of t_k^2 V_k), t_k at each source's own df.

        Its coverage is at least 1 - alpha for independent normal sources (Banerjee 1960), whatever their ratio, which
        Satterthwaite's approximation does not give with two to five seeds. One source: the ordinary t interval.
        """
        return np.sqrt((_quantile(self.dfs, alpha) ** 2 * self.variances).sum(-1))

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Confidence interval of the mean, (low, high)."""
        radius = self.radius(1 - level)
        return self.mean - radius, self.mean + radius

    def p_value(self) -> Array:
        """Two-sided p [...] of "the mean is 0": the alpha at which the interval just touches 0."""
        mean, variances = np.broadcast_arrays(np.asarray(self.mean)[..., None], self.variances)
        square: Array = np.asarray(mean[..., 0] ** 2, float)
        if len(self.dfs) == 1:
            with np.errstate(divide="ignore", invalid="ignore"):
                t = np.sqrt(square / variances[..., 0])
            p = 2 * special.stdtr(self.dfs[0], -t)
        else:
            p = _invert(square, variances, self.dfs)
        certain = np.where(square > 0, SMALLEST_P, 1.0)  # no variance at all: every item moved alike, or none did
        p = np.where(variances.sum(-1) == 0, certain, np.maximum(p, SMALLEST_P))
        return np.where(np.isnan(mean[..., 0]) | np.isnan(variances.sum(-1)), np.nan, p)

    def detectable(self, alpha: float = 0.05, power: float = 0.8) -> Array:
        """Smallest true |mean| [...] that this design finds at two-sided `alpha` with `power`; noncentral t."""
        se = self.se
        with np.errstate(divide="ignore", invalid="ignore"):
            critical = np.where(se > 0, self.radius(alpha) / se, _quantile(self.dfs, alpha).max(initial=0.0))
            df = se**4 / (self.variances**2 / self.dfs).sum(-1)
        df = np.where(se > 0, df, self.dfs.min(initial=np.inf))
        return special.nctdtrinc(df, 1 - power, critical) * se


def _quantile(dfs: Array, alpha: ArrayLike) -> Array:
    """Two-sided critical values of t with `dfs` degrees of freedom."""
    return -special.stdtrit(dfs, np.asarray(alpha, float) / 2)


def _invert(square: Array, variances: Array, dfs: Array) -> Array:
    """p with sum of t_k(p)^2 V_k = square, by bisection on log10 p (the sum falls as p grows)."""
    low = np.full(square.shape, math.log10(SMALLEST_P))
    high = np.zeros(square.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(48):
            middle = (low + high) / 2
            quantiles = _quantile(dfs, 10 ** middle[..., None]) ** 2
            too_wide = (np.where(variances > 0, quantiles, 0.0) * variances).sum(-1) > square
            low, high = np.where(too_wide, middle, low), np.where(too_wide, high, middle)
    return 10**high


def crossed_mean(effects: ArrayLike, members: Array) -> Estimate:
    """Mean of per-item `effects` [..., S, n] that S seeds measured on the same n items in C families [n, C].

    Items are crossed with seeds: the luck of the items is common to all seeds, the luck of a seed to all its items.
    So variance = clustered variance of the seed-averaged effects + variance between seed means / S: two-way clustering
    (Cameron, Gelbach & Miller 2011) without subtracting the intersection, which errs to the wide side. One seed: the
    second source is absent, and the estimate is about that one trained intervention.
    """
    effects = np.asarray(effects, float)
    seeds, means = effects.shape[-2], effects.mean(-1)
    variance, df = item_source(effects.mean(-2), members)
    variances, dfs = [variance], [df]
    if seeds > 1:
        variances.append(means.var(-1, ddof=1) / seeds)
        dfs.append(seeds - 1)
    return Estimate(means.mean(-1), np.stack(variances, -1), np.asarray(dfs, float))


def guarded_p_value(estimate: Estimate, effects: ArrayLike, members: Array) -> Array:
    """p [...] of a crossed mean: the larger of the t test's and of the one corrected for skewness (Hall 1992).

    The t test of few families finds too much when their effects have a long tail against the mean, which a small
    sample misses. effects [..., S, n] are those `estimate` was made of. Symmetric families: the t test's p.
    """
    n, count = members.shape
    plain = estimate.p_value()
    if count < 3:
        return plain
    sums = np.asarray(effects, float).mean(-2) @ members * (count / n)
    rest = sums - sums.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        skewness = (rest**3).mean(-1) / (rest**2).mean(-1) ** 1.5 * math.sqrt(count * (count - 1)) / (count - 2)
        share = np.sqrt(estimate.variances[..., 0]) / estimate.se  # what seeds add has no such skewness
        r = np.nan_to_num(skewness * share**3) / math.sqrt(count)
        t = estimate.mean / estimate.se
        mean = (t + r * t**2 / 3 + r**2 * t**3 / 27 + r / 6) * estimate.se
    corrected = Estimate(np.where(estimate.se > 0, mean, estimate.mean), estimate.variances, estimate.dfs).p_value()
    return np.maximum(plain, corrected)


def contrast(first: ArrayLike, second: ArrayLike, members: Array) -> Estimate:
    """Difference of two crossed means on the same items: first [S1, n] minus second [S2, n], paired by item.

    The item source is that of the seed-averaged differences; each side adds its own variance between seeds.
    """
    sides = [np.asarray(side, float) for side in (first, second)]
    difference = sides[0].mean(-2) - sides[1].mean(-2)
    variance, df = item_source(difference, members)
    variances, dfs = [variance], [df]
    for side in sides:
        seeds = side.shape[-2]
        if seeds > 1:
            variances.append(side.mean(-1).var(-1, ddof=1) / seeds)
            dfs.append(seeds - 1)
    return Estimate(difference.mean(-1), np.stack(variances, -1), np.asarray(dfs, float))


def holm(p_values: ArrayLike) -> Array:
    """Holm (1979) adjusted p-values along the last axis; NaN entries are no test: they stay NaN and cost nothing."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, axis=-1)  # NaN sorts last
    ordered = np.take_along_axis(p, order, -1)
    tests = (~np.isnan(p)).sum(-1, keepdims=True)
    scaled = np.minimum(ordered * np.maximum(tests - np.arange(p.shape[-1]), 1), 1.0)
    adjusted = np.where(np.isnan(ordered), np.nan, np.maximum.accumulate(np.nan_to_num(scaled), axis=-1))
    result = np.empty_like(p)
    np.put_along_axis(result, order, adjusted, -1)
    return result


def choose_dose(effects: ArrayLike, damages: ArrayLike, budget: float) -> NDArray[np.intp]:
    """Index of the dose to report, -1 when none is within the budget; doses in ascending magnitude.

    effects [..., K, S]: development mean of each seed; damages [..., K]: development damage. Among doses whose damage
    is a number no greater than `budget`, the one with the greatest root mean square over seeds of `effects`; the
    smaller dose at a tie. The size of the effects is used, never the agreement of the seeds: seeds are shared with the
    held-out items, so choosing the dose where they happen to agree would be a hidden multiple test.
    """
    sizes = np.sqrt((np.asarray(effects, float) ** 2).mean(-1))
    allowed = (np.asarray(damages, float) <= budget) & ~np.isnan(sizes)
    best = np.argmax(np.where(allowed, sizes, -1.0), axis=-1)
    return np.where(allowed.any(-1), best, -1)
