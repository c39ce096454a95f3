"""Bias set: one trained vector per site and layer, h += b, with no other change.

The smallest trained intervention: BitFit (Ben Zaken et al. 2021, https://arxiv.org/abs/2106.10199) on biases that need
not exist in the subject, and a steering vector that is learned (Cao et al. 2024, https://arxiv.org/abs/2406.00045).
Biases start at zero and are optimised as `Add` edits through the engine, so that what is trained is what is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, field_validator

from experiments.depth import Depths, layers, shown
from experiments.edit import Add, Edit, Site, SiteName
from experiments.intervention import Needs, Positions, State
from experiments.taught import Taught

if TYPE_CHECKING:
    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine
    from experiments.students import Finish, Student
    from experiments.subject import Subject
    from experiments.training import Losses


class BiasSet(Taught):
    """Bias vectors at chosen sites of chosen layers, trained to make responses likely or on another loss."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")

    learning_rate: float = Field(default=0.01, gt=0)
    """Peak step size of AdamW."""
    sites: tuple[SiteName, ...] = Field(default=("resid",), min_length=1)
    """Activations that get a bias: any of q, k, v, attn_in, mlp_in, mlp_out, resid and the other sites."""
    layers: Depths = "all"
    """Decoder layers: a number (-1 is the last), a fraction of the depth, `all`, a range, a pattern, or several."""
    positions: Positions = "all"
    """Where the biases are added: `all`, `prompt`, `response` or `last:N` (the last N prompt tokens)."""

    @field_validator("sites")
    @classmethod
    def _different(cls, given: tuple[SiteName, ...]) -> tuple[SiteName, ...]:
        if len(set(given)) < len(given):
            raise ValueError(f"{list(given)} names one twice; each must differ")
        return given

    def begin(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> tuple[Student, Finish]:
        """A tensor [d] for each site, named like it.

        Raises SubjectError for a site the subject lacks, TrainingError for data the loss cannot learn from, FitError
        for pairs without a difference.
        """
        import torch

        from experiments.students import Student

        subject = engine.subject
        biases = {
            site: torch.zeros(subject.point(site).width, device=subject.device, requires_grad=True)
            for site in self.at(subject)
        }

        def edits_of(dose: float = 1.0) -> list[Edit]:
            if dose == 0:
                return []
            return [Add(site, dose * bias, self.positions) for site, bias in biases.items()]

        def finish(losses: Losses) -> State:
            return State({str(site): bias.detach().cpu() for site, bias in biases.items()}, losses.facts())

        goal = self.objective(engine, data, seed)
        return Student(goal, list(biases.values()), edits_of, self, seed), finish

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        return [Add(Site.parse(name), dose * bias, self.positions) for name, bias in state.tensors.items()]

    def at(self, subject: Subject) -> list[Site]:
        """Every site that gets a bias, layer by layer."""
        return [Site(name, layer) for layer in layers(self.layers, subject.n_layers) for name in self.sites]

    def label(self) -> str:
        where = "" if self.layers == "all" else f" {shown(self.layers)}"
        return f"bias_set {'+'.join(self.sites)}{where}{self.told()}"
