"""How long a vector has to be to matter: the radius at which its effect stops being linear.

The rule of deep causal transcoding (Mack 2024, code of the post): with random unit vectors v, the mean change D they
cause downstream and its Jacobian J at zero,

    ratio(R) = sqrt(mean over v of |D(R v) - R J v|^2 / |R J v|^2)

grows from 0, where D is its own linear part, and R is where it reaches 0.5. Below, layers above merely pass the vector
on; far beyond, text falls apart.

The published search is a bracket [0.001, 100], which fits no subject whose activations are much larger or smaller than
the post's. Here it starts from the norm of what is at the source, goes up by factors of four from far below it, and
takes the first crossing from below: in bfloat16 the ratio is large for tiny R too, because D(R v) is then rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.contrast import FitError

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.downstream import Arms, Downstream

RATIO = 0.5
SAMPLES = 30
LOWEST, HIGHEST = -5, 3  # powers of four of the norm at the source
PRECISION = 1e-3  # of the logarithm of R


@dataclass(frozen=True)
class Calibration:
    """The radius, and the ratio there."""

    radius: float
    ratio: float


def calibrate(effect: Downstream, put: Arms, vectors: Tensor, scale: float) -> Calibration:
    """The radius at which `vectors` [n, d] of norm 1 reach the ratio, starting from `scale`.

    Raises FitError where the ratio does not cross 0.5.
    """
    from math import exp, log

    from scipy.optimize import brentq

    linear = effect.push(put, vectors)

    def ratio(radius: float) -> float:
        change = effect.mean_changes(put(radius * vectors))
        apart = (change / radius - linear).square().sum(1) / linear.square().sum(1)
        return float(apart.mean().sqrt())

    radii = [scale * 4.0**power for power in range(LOWEST, HIGHEST + 1)]
    low, seen = 0.0, []
    for radius in radii:
        seen.append(ratio(radius))
        if low and seen[-1] >= RATIO:
            found = exp(brentq(lambda x: ratio(exp(x)) - RATIO, log(low), log(radius), xtol=PRECISION))
            return Calibration(found, ratio(found))
        low = radius if seen[-1] < RATIO else 0.0
    raise FitError(
        f"no radius found: over radii {radii[0]:.3g} to {radii[-1]:.3g} the relative nonlinearity lies between "
        f"{min(seen):.3g} and {max(seen):.3g} and never rises through {RATIO}; set `radius`, or other layers"
    )
