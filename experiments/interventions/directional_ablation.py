"""Directional ablation: h - dose * B B' h at every chosen layer, B being directions along which the sides differ.

Dose 1 takes out of the residual stream what the subject says along the direction, and adds nothing (Arditi et al. 2024,
https://arxiv.org/abs/2406.11717); dose -1 doubles it. Unlike a vector, it does nothing to a text that has nothing of
the direction.

The published form ablates every layer's writes; that is the same as ablating the residual stream behind every layer
but for the embedding, which this leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.contrast import FitError, contrast
from experiments.depth import Depths, layers, shown
from experiments.edit import Edit, Pool, Project, Site, SiteName
from experiments.intervention import Intervention, Positions, Reads, State

if TYPE_CHECKING:
    from experiments.dataset import Pair
    from experiments.engine import Engine
    from experiments.intervention import DoseKind


class DirectionalAblation(Intervention):
    """Take the sides' mean difference, or the leading directions of their differences, out of the subject."""

    dose_kind: ClassVar[DoseKind] = "signed_linear"

    layer: Depths | None = None
    """The layer where the direction is read, one only; null is the middle one."""
    layers: Depths = "all"
    """The layers behind which it is ablated."""
    site: SiteName = "resid"
    """Activation that is read and ablated."""
    components: int = Field(default=1, ge=1)
    """Directions: 1 is the mean difference alone; more add the leading directions of the differences beside it."""
    tokens: Pool = "response_mean"
    """Where a conversation is read: the mean over the response, its `last` token, or the prompt's last token."""
    positions: Positions = "all"
    """Where it acts: `all`, `prompt`, `response` or `last:N` (the last N prompt tokens)."""

    @property
    def reads(self) -> Reads:
        return "activations"

    def fit(self, engine: Engine, data: Sequence[Pair], seed: int) -> State:
        """`basis` [components, d], orthonormal, its first row along the mean difference; fact `share`: how much of the
        differences' sum of squares it holds.

        Raises DepthError, SubjectError for a layer or site the subject lacks; FitError for pairs without a difference,
        more components than pairs, and more than one layer to read.
        """
        import torch

        n_layers = engine.subject.n_layers
        read = layers(self.layer, n_layers)
        if len(read) != 1:
            raise FitError(f"layer {self.layer!r} means {len(read)} layers; the direction is read at one of them")
        sites = [Site(self.site, layer) for layer in layers(self.layers, n_layers)]
        for site in sites:
            engine.subject.point(site)
        differences = contrast(engine, data, self.tokens).at(Site(self.site, read[0])).differences
        if self.components > len(differences):
            raise FitError(
                f"components {self.components}: {len(differences)} pairs show at most that many directions; ask for "
                "fewer, or give more pairs"
            )
        mean = differences.mean(0)
        if not mean.isfinite().all() or not mean.any():
            raise FitError(f"the {len(differences)} pairs have no finite difference at {self.site}@{read[0]}")
        rest = torch.linalg.svd(differences, full_matrices=False).Vh[: self.components]
        basis, triangle = torch.linalg.qr(torch.cat([mean[None], rest]).T)
        kept = triangle.diag().abs() > 1e-9 * triangle.abs().max()
        ahead = triangle.diag().sign()  # QR is free to turn a column round
        found = (basis * ahead)[:, kept][:, : self.components].T.contiguous().float()
        if len(found) < self.components:
            raise FitError(f"components {self.components}: the pairs show {len(found)} directions; ask for fewer")
        share = ((differences @ found.double().T) ** 2).sum() / (differences**2).sum()
        facts = {"read": read[0], "n": len(differences), "share": share.item(), "at": list(map(str, sites))}
        return State({"basis": found}, facts)

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        basis = state.tensors["basis"]
        return [Project(Site.parse(name), basis, -dose, self.positions) for name in state.facts["at"]]

    def label(self) -> str:
        where = "" if self.layers == "all" else f" at {shown(self.layers)}"
        return f"directional_ablation {shown(self.layer)}{where}"
