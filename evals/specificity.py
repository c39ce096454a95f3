"""Specificity: how much of an intervention's change landed on its target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from evals.stats import Array, Estimate


def specificity(target: ArrayLike, others: ArrayLike, members: Array) -> dict[str, Any]:
    """|target| / (|target| + mean |others|) of mean effects; target [S, n], others [S, n, k] (NaN = unscored).

    Returns value, low, high (95 %; two-way jackknife over families and seeds, clipped to [0, 1]) and others, which is
    mean |others|; all None where they cannot be computed. Noise makes |mean| positive, so with noisy `others` the value
    errs low and the interval wide.
    """
    stacked = np.concatenate([np.asarray(target, float)[..., None], np.asarray(others, float)], -1)
    scored = ~np.isnan(stacked)
    keep = np.r_[True, scored[..., 1:].any(axis=(0, 1))]
    stacked, scored = np.moveaxis(stacked[..., keep], -1, 0), np.moveaxis(scored[..., keep], -1, 0)
    nothing = {"value": None, "low": None, "high": None, "others": None}
    if stacked.shape[0] < 2:
        return nothing
    sums, counts = np.nan_to_num(stacked) @ members, scored.astype(float) @ members  # [1 + k, S, C]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = sums.sum(-1) / counts.sum(-1)
        value = _share(means.mean(-1))
        less_family = (sums.sum(-1, keepdims=True) - sums) / (counts.sum(-1, keepdims=True) - counts)
        by_family = _share(less_family.mean(1))
    if not math.isfinite(value):
        return nothing
    moved = float(np.abs(means.mean(-1)[1:]).mean())
    seeds = means.shape[1]
    variances, dfs = [_jackknife(by_family)], [members.shape[1] - 1]
    if seeds > 1:
        variances.append(_jackknife(_share((means.sum(1, keepdims=True) - means) / (seeds - 1))))
        dfs.append(seeds - 1)
    low, high = Estimate(value, np.array(variances), np.asarray(dfs, float)).interval()
    if not math.isfinite(low):
        return {"value": float(value), "low": None, "high": None, "others": moved}
    return {"value": float(value), "low": max(float(low), 0.0), "high": min(float(high), 1.0), "others": moved}


def _share(means: Array) -> Array:
    """|first| / (|first| + mean |rest|) along the leading axis."""
    size = np.abs(means)
    with np.errstate(invalid="ignore", divide="ignore"):
        return size[0] / (size[0] + size[1:].mean(0))


def _jackknife(leave_one_out: Array) -> float:
    """Variance of a statistic from its leave-one-out values; NaN from fewer than two."""
    count = len(leave_one_out)
    if count < 2:
        return math.nan
    return float((count - 1) / count * ((leave_one_out - leave_one_out.mean()) ** 2).sum())
