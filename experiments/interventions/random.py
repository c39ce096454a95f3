"""Random direction: isotropic Gaussian, at the norm of the mean difference of the same pairs.

What any perturbation of that size does: a method that does not beat it has found nothing. The pairs give the norm
only; the seed gives the direction, which is not turned towards the positive side, because that would already be
steering.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from experiments.directions import Direction

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence


class Random(Direction):
    """A random direction with the norm of the mean difference: the norm-matched null."""

    oriented: ClassVar[bool] = False

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randn(evidence.positive.shape[1], generator=generator, dtype=torch.float64)
