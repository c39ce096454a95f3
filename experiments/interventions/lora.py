"""LoRA: W + dose * s * B A, with A [r, d_in], B [d_out, r], s = alpha / r (alpha / sqrt(r) when rank-stabilised).

Hu et al. 2021 (https://arxiv.org/abs/2106.09685); rank-stabilised: Kalajdzievski 2023
(https://arxiv.org/abs/2312.03732). The adapter begins as PEFT's does, drawn and scaled by PEFT, and is trained as
`LowRank` edits in float32, so that several students can learn in one batch; the subject is left as it was. The dose
scales B: dose 1 is the adapter as trained, 0 the subject, and -1 an extrapolation to the other side, which nothing was
trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.adapters import injected
from experiments.depth import Depths
from experiments.edit import Edit, LowRank
from experiments.intervention import Needs, State
from experiments.taught import Taught
from experiments.tuners import Option, tuner_config
from experiments.weights import linear_modules, weight_edits

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine
    from experiments.students import Finish, Student
    from experiments.training import Losses


class Lora(Taught):
    """Low-rank adapter, trained on a loss of choice."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak step size of AdamW."""
    rank: int = Field(default=8, ge=1)
    """r, the width of the bottleneck."""
    alpha: float = Field(default=16, gt=0)
    """The change is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that the step size suits all ranks."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Last names of linear modules to adapt, e.g. [q_proj, v_proj]; null is all those of the decoder layers."""
    layers: Depths = "all"
    """Decoder layers: a number (-1 is the last), a fraction of the depth, `all`, a range, a pattern, or several."""

    def begin(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> tuple[Student, Finish]:
        """Tensors `MODULE.a` [r, d_in] and `MODULE.b` [d_out, r], the scale folded into `b`.

        Raises TrainingError for targets the subject lacks, DepthError for layers it lacks.
        """
        from experiments.students import Student

        objective = self.objective(engine, data, seed)
        modules = linear_modules(engine.subject, self.targets, self.layers)
        options: dict[str, Option] = {"lora_alpha": self.alpha, "use_rslora": self.rslora}
        config = tuner_config("lora", engine.subject, modules, self.rank, options)
        with injected(engine.subject, modules, config, seed) as adapter:
            factors, scale = adapter.factors(), adapter.scale()
        leaves = {name: (a.requires_grad_(), b.requires_grad_()) for name, (a, b) in factors.items()}

        def edits_of(dose: float = 1.0) -> list[Edit]:
            if dose == 0:
                return []
            return [LowRank(name, a, dose * scale * b, exact=True) for name, (a, b) in leaves.items()]

        def finish(losses: Losses) -> State:
            tensors: dict[str, Tensor] = {}
            for name, (a, b) in leaves.items():
                tensors |= {f"{name}.a": a.detach().cpu(), f"{name}.b": scale * b.detach().cpu()}
            return State(tensors, losses.facts())

        return Student(objective, [leaf for pair in leaves.values() for leaf in pair], edits_of, self, seed), finish

    def edits(self, state: State, dose: float) -> list[Edit]:
        return weight_edits(state.tensors, dose)

    def label(self) -> str:
        return f"lora r{self.rank}{self.told()}"
