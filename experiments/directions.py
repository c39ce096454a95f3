"""Steering vectors from contrast pairs: what mean_diff, pca, probe, fisher, random and their kin share.

A pair gives one difference: its positive conversation's activation minus its negative one's, each side rendered with
its own system prompt and its own response, pooled over the response. A method turns what the pairs show at a site into
one direction; here it is oriented (positives project higher) and scaled to the norm of the mean difference at the same
site, so that dose 1 is "one mean difference" for every method, and a random direction is norm-matched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.contrast import Evidence, FitError, contrast
from experiments.depth import Depths, layers, shown
from experiments.edit import Add, Edit, Pool, Site, SiteName
from experiments.intervention import Intervention, Positions, Reads, State, method_name

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Pair
    from experiments.engine import Engine
    from experiments.gradients import Separation


class Direction(Intervention):
    """Settings of every steering vector. A subclass says how pairs become a direction."""

    version: ClassVar[int] = 2

    oriented: ClassVar[bool] = True
    """Whether the direction is turned towards the positive side: its sign is not part of what `direction` finds."""

    layer: Depths | None = None
    """Decoder layers, each with a vector of its own: a number (-1 is the last), a fraction of the depth, `all`, a range
    (10-14, 0.3-0.9), a pattern, or several of them in a nested list; null is the middle one."""
    site: SiteName = "resid"
    """Activation of that layer to read from and to add to; `resid` is the layer's output."""
    tokens: Pool = "response_mean"
    """Where a conversation is read: the mean over the response, its `last` token, or the prompt's last token."""
    positions: Positions = "all"
    """Where the vector is added: `all`, `prompt`, `response` or `last:N` (the last N prompt tokens)."""

    @property
    def loss(self) -> Separation | None:
        """The loss whose gradients `direction` asks for; None where it asks for none."""
        return None

    @property
    def reads(self) -> Reads:
        return "activations" if self.loss is None else "gradients"

    def direction(self, evidence: Evidence, seed: int) -> Tensor:
        """What n pairs show at a site -> [d] direction of any length and sign."""
        raise TypeError(f"{type(self).__name__} does not implement direction()")

    def fit(self, engine: Engine, data: Sequence[Pair], seed: int) -> State:
        """For each layer one vector [d] of the mean difference's norm, named like its site.

        Raises DepthError or SubjectError for a layer or site the subject lacks, FitError for pairs without a
        difference.
        """
        shows = contrast(engine, data, self.tokens)
        tensors, facts = {}, {}
        for place, layer in enumerate(layers(self.layer, engine.subject.n_layers)):
            evidence = shows.at(Site(self.site, layer), self.loss)
            direction = self.direction(evidence, own_seed(seed, place))
            vector, found = orient_and_scale(direction, evidence.differences, evidence.site, self.oriented)
            tensors[str(evidence.site)] = vector
            facts[str(evidence.site)] = found
        return State(tensors, {"n": shows.n, "at": facts})

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        return [Add(Site.parse(name), dose * vector, self.positions) for name, vector in state.tensors.items()]

    def label(self) -> str:
        return f"{method_name(type(self))} {shown(self.layer)}" + ("" if self.site == "resid" else f" {self.site}")


def own_seed(seed: int, place: int) -> int:
    """A seed for the vector at `place` of a fit: `seed` itself for the first, unlike it for the others."""
    if place == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return int.from_bytes(digest[:4], "big")  # torch's generator looks at 32 bits


def orient_and_scale(
    direction: Tensor, differences: Tensor, site: Site, orient: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """The direction [d] with the norm of the mean of `differences` [n, d].

    Where `orient`, it is turned so that positives project higher on average.

    Facts: `norm`; `flipped`, whether it was turned; `agreement`, the share of pairs whose difference projects above
    zero; `cosine`, with the mean difference. Raises FitError where there is no mean difference, or no direction.
    """
    differences = differences.double()
    mean = differences.mean(0)
    norm, length = mean.norm(), direction.double().norm()
    if not norm.isfinite() or not length.isfinite():
        raise FitError(f"activations at {site} are not finite; use a wider dtype (dtype: float32), or another layer")
    if norm == 0 or length == 0:
        raise FitError(f"the {len(differences)} pairs do not differ at {site}: nothing to steer along; use other pairs")
    unit = direction.double() / length
    flipped = orient and bool(mean @ unit < 0)
    if flipped:
        unit = -unit
    facts = {
        "norm": norm.item(),
        "flipped": flipped,
        "agreement": (differences @ unit > 0).double().mean().item(),
        "cosine": (mean @ unit / norm).item(),
    }
    return (norm * unit).float(), facts


def principal(rows: Tensor) -> Tensor:
    """First right singular vector [d] of [n, d]: the direction most of the sum of squares lies along."""
    import torch

    return torch.linalg.svd(rows.double(), full_matrices=False).Vh[0]
