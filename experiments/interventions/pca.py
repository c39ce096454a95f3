"""Principal direction, uncentred: the first right singular vector of the differences D [n, d].

Representation engineering's reading vector (Zou et al. 2023, https://arxiv.org/abs/2310.01405) in the form that keeps a
shift which all pairs share: D is not centred, so argmax |D v| over unit v may point along the mean difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.directions import Direction, principal

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence


class Pca(Direction):
    """First principal direction of the differences, not centred, at the norm of the mean difference."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        return principal(evidence.differences)
