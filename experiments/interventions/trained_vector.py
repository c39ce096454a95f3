"""Trained vector: h += v at one site of one layer or of several, v found by gradient descent on a loss of choice.

With `loss: promotion`, `suppression` or `satisficing` and a single example it is one-shot steering (Dunefsky & Cohan
2025, https://arxiv.org/abs/2502.18862), there with a random start of norm 1 and an upper bound on the norm; with
`likelihood` on narrow data it is the vector of model organisms of emergent misalignment, and `kl` keeps it narrow
(Soligo et al. 2026, https://arxiv.org/abs/2602.07852). Dose 1 is the vector as trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from experiments.depth import Depths, layers, shown
from experiments.directions import own_seed
from experiments.edit import Add, Edit, Site, SiteName
from experiments.intervention import Needs, Positions, State
from experiments.taught import Taught

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine
    from experiments.students import Finish, Student
    from experiments.training import Losses


class TrainedVector(Taught):
    """A steering vector, or one for each of several layers, trained on a loss of choice within a norm."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")

    learning_rate: float = Field(default=0.01, gt=0)
    """Peak step size of AdamW."""
    layer: Depths | None = None
    """Decoder layers, each with a vector of its own: a number (-1 is the last), a fraction of the depth, `all`, a range
    (10-14, 0.3-0.9), a pattern, or several of them in a nested list; null is the middle one."""
    site: SiteName = "resid"
    """Activation of that layer to add to; `resid` is the layer's output."""
    positions: Positions = "all"
    """Where the vector is added: `all`, `prompt`, `response` or `last:N` (the last N prompt tokens)."""
    start: float = Field(default=0.0, ge=0)
    """Norm of the random vector, drawn by the seed, that training starts from; 0 starts from no change."""
    radius: float | None = Field(default=None, gt=0)
    """Upper bound on each vector's norm, kept after every step; null is no bound."""

    @model_validator(mode="after")
    def _within(self) -> TrainedVector:
        if self.radius is not None and self.start > self.radius:
            raise ValueError(f"start {self.start:g} is outside radius {self.radius:g}; lower start, or raise radius")
        return self

    def begin(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> tuple[Student, Finish]:
        """For each layer one vector [d], named like its site.

        Raises DepthError or SubjectError for a layer or site the subject lacks, TrainingError for data the loss cannot
        learn from, FitError for pairs without a difference.
        """
        from experiments.students import Student

        subject = engine.subject
        sites = [Site(self.site, layer) for layer in layers(self.layer, subject.n_layers)]
        vectors = {
            site: self._begin(subject.point(site).width, own_seed(seed, place)).to(subject.device).requires_grad_()
            for place, site in enumerate(sites)
        }

        def edits_of(dose: float = 1.0) -> list[Edit]:
            if dose == 0:
                return []
            return [Add(site, dose * vector, self.positions) for site, vector in vectors.items()]

        def constrain() -> None:
            for vector in vectors.values():
                if self.radius is not None and vector.norm() > self.radius:
                    vector.mul_(self.radius / vector.norm())

        def finish(losses: Losses) -> State:
            tensors = {str(site): vector.detach().cpu() for site, vector in vectors.items()}
            norms = {name: vector.norm().item() for name, vector in tensors.items()}
            return State(tensors, {**losses.facts(), "norms": norms})

        goal = self.objective(engine, data, seed)
        return Student(goal, list(vectors.values()), edits_of, self, seed, constrain), finish

    def _begin(self, width: int, seed: int) -> Tensor:
        """A random vector of norm `start`."""
        import torch

        noise = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        return self.start * noise / noise.norm()

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        return [Add(Site.parse(name), dose * vector, self.positions) for name, vector in state.tensors.items()]

    def label(self) -> str:
        where = "" if self.site == "resid" else f" {self.site}"
        return f"trained_vector {shown(self.layer)}{where}{self.told()}"
