"""Linear transport of activations: every number of the activation is scaled and shifted towards the positives'.

With a and b the sides' activations, centred and sorted number by number, T(h) = omega h + beta is the line of least
squares through the sorted samples, which is the affine map that takes the one distribution nearest to the other:

    omega = sum a_(i) b_(i) / sum a_(i)^2,    beta = mean(b) - omega mean(a),    h + c (T(h) - h) at dose c

(Linear-AcT: Rodriguez et al. 2024, "Controlling language and diffusion models by transporting activations",
https://arxiv.org/abs/2410.23054.) A mean shift alone is the special case omega = 1, `mean_diff`. Several
layers are fitted on the untouched subject, not one after the other behind the maps of those below; no number is
clipped to the range that was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.contrast import FitError, contrast
from experiments.depth import layers
from experiments.directions import Direction
from experiments.edit import Add, Edit, Scale, Site
from experiments.intervention import State

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Pair
    from experiments.engine import Engine

FEWEST = 2  # a line needs two points


class LinearAct(Direction):
    """Scale and shift every number of the activation as optimal transport from negatives to positives would."""

    version: ClassVar[int] = 1

    def fit(self, engine: Engine, data: Sequence[Pair], seed: int) -> State:
        """For each layer `SITE.scale` [d], omega - 1, and `SITE.shift` [d], beta.

        Facts, by site: `norm` of the mean shift, and `explained`, the share of the sorted positives' variance that lies
        on the lines. Raises DepthError or SubjectError for a layer or site the subject lacks, FitError for fewer than
        two pairs and for activations that are not finite.
        """
        shows = contrast(engine, data, self.tokens)
        if shows.n < FEWEST:
            raise FitError(f"{shows.n} pair is not enough for a line through the sorted activations; give at least 2")
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for layer in layers(self.layer, engine.subject.n_layers):
            evidence = shows.at(Site(self.site, layer))
            scale, shift, found = transport(evidence.negative.double(), evidence.positive.double())
            if not (scale.isfinite().all() and shift.isfinite().all()):
                raise FitError(f"activations at {evidence.site} are not finite; use a wider dtype, or another layer")
            tensors |= {f"{evidence.site}.scale": scale.float(), f"{evidence.site}.shift": shift.float()}
            facts[str(evidence.site)] = found
        return State(tensors, {"n": shows.n, "at": facts})

    def edits(self, state: State, dose: float) -> list[Edit]:
        found: list[Edit] = []
        for name in state.facts["at"] if dose else ():
            site, tensors = Site.parse(name), state.tensors
            found.append(Scale(site, dose * tensors[f"{name}.scale"], self.positions))
            found.append(Add(site, dose * tensors[f"{name}.shift"], self.positions))
        return found


def transport(source: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
    """omega - 1 and beta [d] of the map from `source` to `goal`, both [n, d]; a number that never varies is shifted."""
    import torch

    a, b = (each.sort(0).values - each.mean(0) for each in (source, goal))
    spread = (a * a).sum(0)
    omega = torch.where(spread > 0, (a * b).sum(0) / spread.clamp_min(torch.finfo(spread.dtype).tiny), 1.0)
    shift = goal.mean(0) - omega * source.mean(0)
    left = ((b - omega * a) ** 2).sum() / (b * b).sum().clamp_min(torch.finfo(spread.dtype).tiny)
    return omega - 1, shift, {"norm": (goal.mean(0) - source.mean(0)).norm().item(), "explained": 1 - left.item()}
