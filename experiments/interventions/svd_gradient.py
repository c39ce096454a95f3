"""Gradient direction: the first right singular vector of per-pair gradients.

Row i of G [n, d] is g- minus g+, the two sides' gradients of the separation loss (see `experiments/gradients.py`): the
change at this site that would drive the sides of pair i apart. The direction along which most of these wishes lie is a
first-order answer to "what here makes the difference later", where principal components ask what differs here.

The published form (`svd_steer`, wassname/repeng) takes the gradients of all sides as they are and subtracts their mean,
and with it the wish that all pairs share; `published: true` gives it, hinge included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from experiments.directions import Direction, principal
from experiments.gradients import Separation

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence


class SvdGradient(Direction):
    """First right singular vector of the pairs' gradients of how far their sides lie apart at a later layer."""

    target: int | None = Field(default=None, ge=0)
    """Layer behind which the separation is read; null is the third from the top."""
    published: bool = False
    """Both sides' gradients, centred, of the loss with the published hinge."""

    @property
    def loss(self) -> Separation:
        return Separation(self.target, "published" if self.published else "none")

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        import torch

        positive, negative = (each.double() for each in evidence.gradients(self.loss))
        if not self.published:
            return principal(negative - positive)
        both = torch.cat([positive, negative])
        return principal(both - both.mean(0))
