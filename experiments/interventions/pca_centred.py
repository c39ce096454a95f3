"""Principal direction of the centred differences: the first right singular vector of D - mean(D), D being [n, d].

This is what repeng's default `pca_diff` computes (https://github.com/vgel/repeng), because scikit-learn's PCA subtracts
the mean of its input. **It removes exactly the mean difference**: what is left is how the contrast varies between
pairs. Where the contrast is one constant shift, the direction is noise; it works on text in so far as the shift's size
varies from pair to pair. Kept as the baseline that published comparisons use; `pca` is the uncentred one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.contrast import FitError
from experiments.directions import Direction, principal

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Evidence


class PcaCentred(Direction):
    """First principal direction of the differences after their mean is subtracted (repeng's default)."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        differences = evidence.differences
        if len(differences) < 2:
            raise FitError(
                "pca_centred subtracts the mean difference, so that one pair leaves nothing; give at least 2"
            )
        return principal(differences - differences.mean(0))
