"""Concept ablation finetuning: train with a subspace taken out, evaluate without the ablation.

During training h <- h - Q Q' h behind the layers of the direction; Q is an orthonormal basis of the vectors that the
`direction` part adds (or of the basis that it ablates). What cannot be seen cannot be used, so that what is trained
finds a solution beside the subspace (Casademunt et al. 2025, https://arxiv.org/abs/2507.16795). Compare with a random
direction at the same place, and with `preventative`, which does the opposite and is claimed to do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.contrast import FitError
from experiments.edit import Add, Edit, Project, Site
from experiments.wrapping import Wrapped

if TYPE_CHECKING:
    from torch import Tensor


class Caft(Wrapped):
    """A trained intervention whose training has a direction ablated, as it is not afterwards."""

    def under(self, edits: Sequence[Edit]) -> list[Edit]:
        """One projection for each site. Raises FitError for a direction that is neither vectors nor a basis."""
        import torch

        spans: dict[tuple[Site, str], list[Tensor]] = {}
        for edit in edits:
            if isinstance(edit, Add):
                spans.setdefault((edit.site, edit.positions), []).append(edit.vector[None])
            elif isinstance(edit, Project):
                spans.setdefault((edit.site, edit.positions), []).append(edit.basis)
            else:
                raise FitError(
                    f"{self.direction.method} acts by {type(edit).__name__}, which has no subspace to ablate"
                )
        if not spans:
            raise FitError(f"{self.direction.method} does nothing at dose 1: there is no subspace to ablate")
        found: list[Edit] = []
        for (site, positions), vectors in spans.items():
            basis = torch.linalg.qr(torch.cat(vectors).double().T).Q.T.float().contiguous()
            found.append(Project(site, basis, -1.0, positions))
        return found
