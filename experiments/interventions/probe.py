"""Probe direction: the weights of a logistic regression that tells positive from negative activations.

Minimises |w|^2 / 2 + C sum_i log(1 + exp(-y_i (w x_i + b))) over w [d] and b, as scikit-learn's LogisticRegression
does, by Newton steps in double precision. The penalty keeps w in the span of the n activations, so that a step solves
for min(n, d) + 1 numbers. A probe finds what separates the sides, which need not be what moves the subject:
in AxBench (Wu et al. 2025, https://arxiv.org/abs/2501.17148) it is among the best detectors and the worst steering
vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.contrast import FitError
from experiments.directions import Direction

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence

STEPS = 100
LEFT = 1e-12  # share of the loss that a step still gains at the minimum
HALVINGS = 40


class Probe(Direction):
    """Normal of the plane that a logistic regression puts between positive and negative activations."""

    version: ClassVar[int] = 3

    c: float = Field(default=1.0, gt=0)
    """C, the inverse strength of the penalty |w|^2 / 2."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        import torch

        both = torch.cat([evidence.positive, evidence.negative])
        if not both.isfinite().all():
            raise FitError(f"activations at {evidence.site} are not finite; use a wider dtype (dtype: float32)")
        found = logistic(both, len(evidence.positive), self.c)
        if found is None:
            raise FitError(f"the probe at {evidence.site} did not converge; use a smaller c (now {self.c:g})")
        return found


def logistic(x: Tensor, n_positive: int, c: float) -> Tensor | None:
    """Weights [d] of the regression on rows `x` [n, d], of which the first `n_positive` are positive; None where
    Newton's method does not reach the minimum.

    Activations are centred first; b, which bears no penalty, takes that up, so that w is the same.
    """
    import torch
    from torch.nn.functional import softplus

    x = x.double() - x.double().mean(0)
    left, values, basis = torch.linalg.svd(x, full_matrices=False)
    rows = torch.cat([left * values, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    rows[n_positive:] *= -1
    penalty = torch.ones(rows.shape[1], dtype=torch.float64)
    penalty[-1] = 0
    v = torch.zeros_like(penalty)  # w in the basis, and b
    for _ in range(STEPS):
        wrong = (-(rows @ v)).sigmoid()
        gradient = penalty * v - c * rows.T @ wrong
        curvature = rows.T @ ((c * wrong * (1 - wrong))[:, None] * rows) + penalty.diag()
        curvature[-1, -1] += torch.finfo(torch.float64).eps  # b's own curvature is gone where all sides are far apart
        step = torch.linalg.solve(curvature, gradient)

        def worth(at: Tensor) -> Tensor:
            return (penalty * at).square().sum() / 2 + c * softplus(-(rows @ at)).sum()

        before, slope, length = worth(v), gradient @ step, 1.0
        if slope <= LEFT * before:
            return basis.T @ (v - step)[:-1]
        for _ in range(HALVINGS):
            if worth(v - length * step) <= before - 1e-4 * length * slope:
                break
            length /= 2
        v = v - length * step
    return None
