"""Weighted principal direction: pairs that the subject itself finds likely count for more.

Weights w = softmax over pairs of (mean log p / temperature), log p being the mean log-probability of a response's token
under its own persona, averaged over both sides; the direction is the first right singular vector of the rows
sqrt(w_i) D_i. A pair whose words the subject would never say tells little about how it represents a contrast.

The published form (`PCAWeighted`, wassname/repeng) centres the differences with the weighted mean first, which removes
the shift that all pairs share as `pca_centred` does; `centred: true` gives it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from experiments.contrast import FitError
from experiments.directions import Direction, principal

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence


class PcaWeighted(Direction):
    """First principal direction of the differences, pairs weighted by how likely the subject finds them."""

    temperature: float = Field(default=1.0, gt=0)
    """Nats per token by which pairs must differ for their weights to differ by a factor e."""
    centred: bool = False
    """Subtract the weighted mean first, as published; it removes the shift that all pairs share."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        differences = evidence.differences
        weights = (evidence.logprobs().double() / self.temperature).softmax(0)
        if self.centred:
            if len(differences) < 2:
                raise FitError("pca_weighted with `centred` leaves nothing of one pair; give at least 2")
            differences = differences - weights @ differences
        return principal(weights.sqrt()[:, None] * differences)
