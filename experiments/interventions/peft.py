"""Any of PEFT's tuners: W + dose * (W' - W), where W' is what the trained adapter makes of W.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), PiSSA (Meng et al. 2024), DeLoRA (Bini et
al. 2025), IA3 (Liu et al. 2022), VeRA (Kopiczko et al. 2023), RoAd (Liao and Monz 2024), OFT (Qiu et al. 2023), BOFT
(Liu et al. 2023), HRA (Yuan et al. 2024), LoHa and LoKr (Yeh et al. 2023), RandLoRA (Albert et al. 2025), and more. The
adapter is PEFT's own, trained inside the subject, read out and taken out again: the subject is left as it was. Whatever
a tuner's own scale does, a dose here is that multiple of the whole weight difference: 1 is the adapter as trained, 0
the subject, -1 an extrapolation to the other side. docs/certified.md says what was checked for which tuner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.adapters import injected
from experiments.depth import Depths
from experiments.edit import Edit
from experiments.intervention import Needs, State
from experiments.taught import Taught
from experiments.tuners import Option, TunerName, tuner_config
from experiments.weights import linear_modules, weight_edits

if TYPE_CHECKING:
    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine


class Peft(Taught):
    """An adapter of PEFT's, trained on a loss of choice, applied as a multiple of its weight difference."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak step size of AdamW. Tuners differ: multiplicative ones (ia3, road, vera) take ten times that of LoRA."""
    tuner: TunerName = "dora"
    """How weights are adapted: a tuner of PEFT's, or a way of using its LoRA (rslora, dora, pissa, olora)."""
    rank: int | None = Field(default=None, ge=1)
    """The tuner's rank; null is PEFT's own default. Refused for tuners that have none (ia3, road, oft, boft, ...)."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Last names of linear modules to adapt, e.g. [[q_proj, v_proj]]; null is all those of the decoder layers."""
    layers: Depths = "all"
    """Decoder layers: a number (-1 is the last), a fraction of the depth, `all`, a range, a pattern, or several."""
    options: dict[str, Option] = Field(default_factory=dict)
    """Other options of the tuner by PEFT's names, e.g. {lora_alpha: 16}; they must exist in its config class."""

    def fit(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> State:
        """Tensors as `experiments.adapters.Injection.tensors` names them.

        Raises TrainingError for targets the subject lacks, a tuner or option PEFT lacks, whatever PEFT refuses, and a
        loss that is not finite; DepthError for layers the subject lacks.
        """
        from experiments.students import Student, train

        objective = self.objective(engine, data, seed)
        modules = linear_modules(engine.subject, self.targets, self.layers)
        config = tuner_config(self.tuner, engine.subject, modules, self.rank, self.options)
        with injected(engine.subject, modules, config, seed) as adapter:
            losses = train(engine, Student(objective, adapter.parameters, adapter.edits_of, self, seed))
            tensors = adapter.tensors()
        return State(tensors, losses.facts())

    def edits(self, state: State, dose: float) -> list[Edit]:
        return weight_edits(state.tensors, dose)

    def label(self) -> str:
        return f"peft {self.tuner}" + (f" r{self.rank}" if self.rank else "") + self.told()
