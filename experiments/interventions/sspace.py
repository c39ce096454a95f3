"""Direction in the layer's own singular basis: the mean difference, kept where the layer's weight can write.

With W = U S V' the weight whose output goes to the site [d, d_in], times the gain of the norm behind it where there is
one (Gemma 2 and 3), and c = U' mean(D), the direction is the sum of the `rank` chosen columns of U times their
coefficients in c. The other coordinates of the mean difference are dropped: they are noise, or what other layers write.
`select` chooses by singular value, or by how far the pairs agree on a coordinate.

InnerPiSSA's reference direction is mean(D U) (wassname, 2025); with all columns kept this is `mean_diff`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from experiments.contrast import FitError
from experiments.directions import Direction
from experiments.edit import Site, SiteName

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.contrast import Evidence

WRITERS: dict[SiteName, tuple[SiteName, SiteName]] = {
    "resid": ("down", "mlp_out"),
    "mlp_out": ("down", "mlp_out"),
    "attn_out": ("o", "attn_out"),
}
"""Site -> the matrix that writes to it, and what that has become where it is added to the stream; for sites that are
not a matrix's output themselves."""


class Sspace(Direction):
    """The mean difference within chosen singular directions of the weight that writes to the site."""

    version: ClassVar[int] = 3

    rank: int | None = Field(default=None, ge=1)
    """Singular directions kept; null is a quarter of those the weight has."""
    select: Literal["task", "singular"] = "task"
    """Keep those on which the pairs agree most (|mean| / standard error), or those of the largest singular values."""

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        import torch

        basis = torch.linalg.svd(weight(evidence), full_matrices=False).U
        rank = self.rank or max(1, basis.shape[1] // 4)
        if rank > basis.shape[1]:
            raise FitError(f"rank {rank} at {evidence.site}: the weight has {basis.shape[1]} singular directions")
        inside = evidence.differences @ basis
        mean, n = inside.mean(0), len(inside)
        chosen = torch.arange(rank)
        if self.select == "task":
            if n < 2:
                raise FitError("select: task needs the spread over pairs; give at least 2, or use select: singular")
            error = inside.std(0) / n**0.5
            chosen = (mean.abs() / error.clamp_min(torch.finfo(error.dtype).tiny)).topk(rank).indices
        return basis[:, chosen] @ mean[chosen]


def weight(evidence: Evidence) -> Tensor:
    """[d, d_in] float64 of the matrix whose output goes to the site. Raises FitError where there is none."""
    import torch
    from transformers.pytorch_utils import Conv1D

    site, subject = evidence.site, evidence.subject
    matrix, added = WRITERS.get(site.name, (site.name, site.name))
    point = subject.point(Site(matrix, site.layer))
    if not isinstance(point.module, torch.nn.Linear | Conv1D):
        raise FitError(f"{site}: no weight writes there; sspace takes resid, attn_out, mlp_out and the projections")
    found = point.module.weight.detach().double().cpu()
    found = found.T if isinstance(point.module, Conv1D) else found
    behind = subject.point(Site(added, site.layer)).module
    if behind is not point.module:
        found = gain(behind, found)[:, None] * found
    if point.part is None:
        return found
    return found[point.part.cpu() if isinstance(point.part, torch.Tensor) else point.part]


def gain(norm: nn.Module, matrix: Tensor) -> Tensor:
    """[d] float64: what an RMS norm behind `matrix` [d, d_in] multiplies each channel by, up to a common factor."""
    import torch

    like = next(norm.parameters())
    with torch.no_grad():
        found: Tensor = norm(like.new_ones(matrix.shape[0]))
    return found.double().cpu()
