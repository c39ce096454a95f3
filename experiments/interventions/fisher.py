"""Natural gradient: v = (F + lambda I)^-1 g, the mean gradient g [d] preconditioned by a Fisher matrix F [d, d].

g is the mean over pairs of the gradient that drives the two sides apart (`experiments/gradients.py`). Kinds of F, from
per-sample gradients g_i:
    empirical    sum_i g_i g_i' / n                                        (Kunstner et al. 2019, arXiv:1905.12558)
    covariance   sum_i (g_i - g)(g_i - g)' / (n - 1)
    improved     sum_i w_i g_i g_i' / n, w_i = 1 / (|dl_i / dh_i|^2 + 1e-6), h_i where the loss is read
                                                                           (Wu et al. 2024, arXiv:2406.06420)
`dual` forms give each side a matrix of its own, v+ = (F+ + lambda I)^-1 g+ and v- likewise: `positive`, `negative`,
their `difference`, or their `mean`. Large directions of F are those along which the loss is touchy anyway; dividing by
them turns towards what is specific to the contrast, and lambda says from which size on.

The inverse is never formed: with F = X'X and the thin singular value decomposition X = U S V',
(F + lambda I)^-1 g = V (S^2 + lambda)^-1 V'g + (g - V V'g) / lambda, at the cost of n^2 d for n < d.

Norms of published vectors varied by orders of magnitude with lambda, so that doses meant nothing; here every direction
is scaled to the mean difference's norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from experiments.contrast import FitError
from experiments.directions import Direction
from experiments.gradients import Separation

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence

Kind = Literal["empirical", "covariance", "improved"]
RANK = 1e-12  # singular values below this share of the largest are zero
FLOOR = 1e-6


class Fisher(Direction):
    """Mean gradient of the sides' separation, divided by the Fisher matrix of the gradients."""

    kind: Kind = "empirical"
    """Which Fisher matrix."""
    damping: float = Field(default=0.01, ge=0)
    """lambda as a share of F's mean eigenvalue tr F / d, so that it means the same at every layer."""
    dual: Literal["none", "mean", "positive", "negative", "difference"] = "none"
    """One matrix for the pairs' gradients, or one for each side and what is made of the two vectors."""
    target: int | None = Field(default=None, ge=0)
    """Layer behind which the separation is read; null is the third from the top."""
    published: bool = False
    """Add the published hinge on log-probabilities to the loss."""

    @property
    def loss(self) -> Separation:
        return Separation(self.target, "published" if self.published else "none")

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        positive, negative = (each.double() for each in evidence.gradients(self.loss))
        try:
            if self.dual == "none":
                return natural_gradient(negative - positive, self.kind, self.damping)
            apart = [natural_gradient(side, self.kind, self.damping) for side in (-positive, negative)]
        except FitError as error:
            raise FitError(f"{error} (at {evidence.site})") from error
        ahead, back = apart
        return {"mean": ahead + back, "positive": ahead, "negative": back, "difference": ahead - back}[self.dual]


def natural_gradient(gradients: Tensor, kind: Kind, damping: float, reads: Tensor | None = None) -> Tensor:
    """(F + lambda I)^-1 g [d] for per-sample gradients [n, d], lambda being `damping` times F's mean eigenvalue.

    `reads` [n]: norms |dl_i / dh_i| for the improved kind; None where they are all 1, as those of a distance are.
    Raises FitError for gradients that are all zero, and for lambda = 0 where F is singular.
    """
    import torch

    n, d = gradients.shape
    mean = gradients.mean(0)
    rows = gradients / n**0.5
    if kind == "covariance":
        if n < 2:
            raise FitError("a covariance needs at least 2 pairs")
        rows = (gradients - mean) / (n - 1) ** 0.5
    elif kind == "improved":
        norms = torch.ones(n, dtype=gradients.dtype) if reads is None else reads
        rows = rows / (norms.square() + FLOOR).sqrt()[:, None]
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    if not values[0] > 0:
        raise FitError("the gradients are zero: nothing to divide by; choose a layer below the loss's target")
    damp = damping * values.square().sum() / d
    inside = basis @ mean
    if damp > 0:
        return basis.T @ (inside / (values.square() + damp)) + (mean - basis.T @ inside) / damp
    if n < d or values[-1] <= RANK * values[0]:
        rank = int((values > RANK * values[0]).sum())
        raise FitError(f"the Fisher matrix is singular (rank {rank} of {d}) and damping is 0; set damping above 0")
    return basis.T @ (inside / values.square())
