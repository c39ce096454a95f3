"""Full finetuning: W + dose * D, with D the sum of all updates to W.

The reference that adapters and steering vectors are stand-ins for. Every chosen matrix has a float32 master copy of its
change, so that small updates survive in a bfloat16 subject, and is trained as a `Dense` edit through the engine: the
subject's own weights are never written. Dose 1 is the finetuned subject, 0 the subject, and between and beyond lie
interpolation and extrapolation of weights (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089).

Memory while training is 16 bytes for each trained parameter (change, gradient, and two moments of AdamW), beside the
subject and its activations, and 2 or 4 more for the copy in the subject's dtype; the state takes 4. For all decoder
matrices of a 135M-parameter model that is 1.9 GB and 0.4 GB; choose `targets` and `layers` for larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.depth import Depths, shown
from experiments.edit import Dense, Edit
from experiments.intervention import Needs, State
from experiments.taught import Taught
from experiments.weights import linear_modules, weight_edits

if TYPE_CHECKING:
    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine
    from experiments.students import Finish, Student
    from experiments.training import Losses


class Sft(Taught):
    """Weights of the decoder layers trained on a loss of choice, applied as a multiple of their change."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")

    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak step size of AdamW."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Last names of linear modules to train, e.g. [[o_proj, down_proj]]; null is all those of the decoder layers."""
    layers: Depths = "all"
    """Decoder layers: a number (-1 is the last), a fraction of the depth, `all`, a range, a pattern, or several."""

    def begin(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> tuple[Student, Finish]:
        """The change of each weight under the parameter's name, in its shape, float32.

        Raises TrainingError for targets the subject lacks, DepthError for layers it lacks.
        """
        import torch

        from experiments.students import Student

        objective = self.objective(engine, data, seed)
        modules = linear_modules(engine.subject, self.targets, self.layers)
        changes = {
            f"{name}.weight": torch.zeros_like(module.get_parameter("weight"), dtype=torch.float32, requires_grad=True)
            for name, module in modules.items()
        }

        def edits_of(dose: float = 1.0) -> list[Edit]:
            if dose == 0:
                return []
            return [Dense(name, change if dose == 1 else dose * change) for name, change in changes.items()]

        def finish(losses: Losses) -> State:
            return State({name: change.detach().cpu() for name, change in changes.items()}, losses.facts())

        return Student(objective, list(changes.values()), edits_of, self, seed), finish

    def edits(self, state: State, dose: float) -> list[Edit]:
        return weight_edits(state.tensors, dose)

    def label(self) -> str:
        return "sft" + ("" if self.layers == "all" else f" {shown(self.layers)}") + self.told()
