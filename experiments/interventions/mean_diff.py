"""Mean difference: v = mean over pairs of h(positive) - h(negative), one vector [d] at one site.

The baseline that most others are measured against: contrastive activation addition (Rimsky et al. 2023,
https://arxiv.org/abs/2312.06681); averaged over response tokens it is the persona vector of Chen et al. 2025
(https://arxiv.org/abs/2507.21509).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.directions import Direction

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence


class MeanDiff(Direction):
    """The mean difference of two personas' activations, added to the residual stream."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        return evidence.differences.mean(0)
