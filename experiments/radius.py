"""How long a vector has to be to matter: the radius at which its effect stops being linear.

The rule of deep causal transcoding (Mack 2024, code of the post): with random unit vectors v, the mean change D they
cause downstream and its Jacobian J at zero,

    ratio(R) = sqrt(mean over v of |D(R v) - R J v|^2 / |R J v|^2)

grows from 0, where D is its own linear part, and R is where it reaches 0.5. Below, layers above merely pass the vector
on; far beyond, text falls apart.

The published search is a bracket [0.001, 100], which fits no subject whose activations are much larger or smaller than
the post's. Here it starts far above the norm of what is at the source and halves R until the ratio falls below 0.5.

In bfloat16 D(R v) / R is off by rounding, the more the smaller R is, and squares add it up: with SmolLM2-135M the plain
ratio lay between 0.53 and 11 at all radii. So D(R v) is read at two radii closer than curvature could tell apart. What
they differ by is the rounding of one reading; that of the untouched activations, which both subtract, is taken to be as
large; and the ratio is what is left. In float32 nothing is taken away.
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
LOWEST, HIGHEST = -10, 4  # powers of two of the norm at the source
APART = 1 / 64  # relative distance of the two radii from the one they stand for
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
        ends = radius * (1 - APART), radius * (1 + APART)
        changes = [effect.mean_changes(put(end * vectors)) / end for end in ends]
        size = linear.square().sum(1)
        apart = sum((change - linear).square().sum(1) for change in changes) / 2
        rounding = (changes[0] - changes[1]).square().sum(1)  # of one reading twice: its own, and the base's
        return max(0.0, float(((apart - rounding) / size).mean())) ** 0.5

    seen, above = [], 0.0
    for power in range(HIGHEST, LOWEST - 1, -1):
        radius = scale * 2.0**power
        seen.append(ratio(radius))
        if above and seen[-1] < RATIO:
            found = exp(brentq(lambda x: ratio(exp(x)) - RATIO, log(radius), log(above), xtol=PRECISION))
            return Calibration(found, ratio(found))
        above = radius if seen[-1] >= RATIO else 0.0
    raise FitError(
        f"no radius found: over radii {radius:.3g} to {scale * 2.0**HIGHEST:.3g} the relative nonlinearity is "
        f"{min(seen):.3g} to {max(seen):.3g} and never rises through {RATIO}; set `radius`, or other layers"
    )
