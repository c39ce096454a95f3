"""Probe direction: the weights of a logistic regression that tells positive from negative activations.

Minimises |w|^2 / 2 + C sum_i log(1 + exp(-y_i (w x_i + b))) over w [d] and b, as scikit-learn's LogisticRegression
does, by L-BFGS in double precision. A probe finds what separates the sides, which need not be what moves the subject:
in AxBench (Wu et al. 2025, https://arxiv.org/abs/2501.17148) it is among the best detectors and the worst steering
vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from experiments.contrast import FitError
from experiments.directions import Direction

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence

STEPS = 1000


class Probe(Direction):
    """Normal of the plane that a logistic regression puts between positive and negative activations."""

    c: float = Field(default=1.0, gt=0)
    """C, the inverse strength of the penalty |w|^2 / 2."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        import torch

        found = logistic(torch.cat([evidence.positive, evidence.negative]), evidence.positive.shape[0], self.c)
        if not found.isfinite().all():
            raise FitError(f"the probe at {evidence.site} did not converge; use a smaller c (now {self.c:g})")
        return found


def logistic(x: Tensor, n_positive: int, c: float) -> Tensor:
    """Weights [d] of the regression on rows `x` [n, d], of which the first `n_positive` are positive.

    Activations are centred first; b, which bears no penalty, takes that up, so that w is the same.
    """
    import torch
    from torch.nn.functional import softplus

    x = x.double() - x.double().mean(0)
    scale = x.norm(dim=1).mean().clamp_min(torch.finfo(torch.float64).tiny)
    y = torch.ones(len(x), dtype=torch.float64)
    y[n_positive:] = -1
    rows = x / scale  # so that L-BFGS starts at a step of sensible size; v = scale * w
    v = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [v, b], max_iter=STEPS, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (v / scale).square().sum() / 2 + c * softplus(-y * (rows @ v + b)).sum()
        value.backward()
        return value

    optimiser.step(loss)
    return (v / scale).detach()
