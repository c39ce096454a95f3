"""What a judge's estimate would be without the judge's errors, with intervals that carry both uncertainties.

Rogan-Gladen: with TPR, TNR and J = TPR + TNR - 1 known from labelled answers, a rate p is (p - (1 - TNR)) / J and a
difference of rates d is d / J (Rogan & Gladen 1978). It holds wherever the labelled answers err like the judged ones,
whatever their share of true ones. Prediction-powered: mean - bias, the bias being measured on labelled answers that are
a random sample of the judged ones (Angelopoulos et al. 2023, arXiv 2301.09633); it needs no J.

Limits are recovered from the limits of the parts (MOVER, Zou & Donner 2008): a value x is in the interval when 0 is in
the interval of p - x TPR - (1 - x) FPR. Coverage in simulation: docs/judges.md, benchmarks/judge_correction.py. Lang &
Reiczigel's (2014) interval was tried there too and covers less evenly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from evals.judge_error import Limits, complement, difference, limits
from evals.stats import Array


class Corrected(NamedTuple):
    """A rate as it came out, which may lie outside of [0, 1], and clipped."""

    raw: Limits
    clipped: Limits


def rate(judged: Limits, tpr: Limits, tnr: Limits) -> Corrected:
    """The true rate behind a judged one. Limits are infinite where the judge's errors allow any rate."""
    fpr = complement(tnr)
    j = tpr.value - fpr.value
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (judged.value - fpr.value) / j
    parts = (judged.value - judged.low, tpr.high - tpr.value, fpr.high - fpr.value)
    low = _root(judged.value - fpr.value, j, *parts, -1.0)
    parts = (judged.high - judged.value, tpr.value - tpr.low, fpr.value - fpr.low)
    high = _root(judged.value - fpr.value, j, *parts, 1.0)
    raw = limits(value, low, high)
    return Corrected(raw, limits(*(np.clip(each, 0, 1) for each in raw)))


def change(judged: Limits, attenuation: Limits) -> Limits:
    """The true difference behind a judged one, when both arms are judged with the same errors: judged / attenuation.

    `attenuation` is J for rates, the judge's slope for scores. Limits are infinite where it may be 0.
    """
    nothing = np.zeros(())
    j, low, high = attenuation
    with np.errstate(divide="ignore", invalid="ignore"):
        value = judged.value / j
    below = np.where(judged.low > 0, high - j, j - low)  # which limit of J counts depends on the sign of the limit
    above = np.where(judged.high > 0, j - low, high - j)
    return limits(
        value,
        _root(judged.value, j, judged.value - judged.low, below, nothing, -1.0),
        _root(judged.value, j, judged.high - judged.value, above, nothing, 1.0),
    )


def _root(b: Array, j: Array, of_p: Array, of_tpr: Array, of_fpr: Array, sign: float) -> Array:
    """The x on one side with (b - x j)^2 = of_p^2 + x^2 of_tpr^2 + (1 - x)^2 of_fpr^2; infinite where there is none."""
    square = j**2 - of_tpr**2 - of_fpr**2
    half = b * j - of_fpr**2
    rest = b**2 - of_p**2 - of_fpr**2
    inside = half**2 - square * rest
    bounded = (square > 0) & (j > 0) & (inside >= 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (half + sign * np.sqrt(np.maximum(inside, 0))) / square
    return np.where(bounded, found, sign * np.inf)


def prediction_powered(judged: Limits, bias: Limits) -> Limits:
    """The true mean: the judge's mean over all answers, less its bias on labelled ones drawn from the same answers."""
    return difference(judged, bias)


def prediction_powered_change(judged: Limits, treated: Limits, base: Limits) -> Limits:
    """The true difference of two arms, each with its own bias of the judge: judged - (bias treated - bias base)."""
    return difference(judged, difference(treated, base))
