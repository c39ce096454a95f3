"""LoRA: W + dose * s * B A, with A [r, d_in], B [d_out, r], s = alpha / r (alpha / sqrt(r) when rank-stabilised).

Hu et al. 2021 (https://arxiv.org/abs/2106.09685); rank-stabilised: Kalajdzievski 2023
(https://arxiv.org/abs/2312.03732). The adapter is PEFT's, trained inside the subject, read out as `LowRank` edits and
taken out again: the subject is left as it was. The dose scales B: dose 1 is the adapter as trained, 0 the subject, and
-1 an extrapolation to the other side, which nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.depth import Depths, layers
from experiments.edit import Edit, LowRank
from experiments.intervention import Needs, State
from experiments.training import Trained, TrainingError, conversations_of, train

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.dataset import Conversation, Pair
    from experiments.engine import Engine
    from experiments.subject import Subject

ADAPTER = "orch"


class Lora(Trained):
    """Low-rank adapter trained by PEFT to make the positive responses likely in the subject's own context."""

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

    def fit(self, engine: Engine, data: Sequence[Pair | Conversation], seed: int) -> State:
        """Tensors `MODULE.a` [r, d_in] and `MODULE.b` [d_out, r], the scale folded into `b`.

        Raises TrainingError for targets or layers the subject lacks, and for a loss that is not finite.
        """
        modules = linear_modules(engine.subject, self.targets, self.layers)
        with adapted(engine.subject, modules, self, seed) as factors:
            parameters = [factor for a, b, _ in factors.values() for factor in (a, b)]
            losses = train(engine, conversations_of(data), parameters, tuple, self, seed)
            tensors = {}
            for name, (a, b, scale) in factors.items():
                tensors[f"{name}.a"] = a.detach().cpu().clone()
                tensors[f"{name}.b"] = (scale * b.detach()).cpu()
        return State(tensors, losses.facts())

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        names = [name.removesuffix(".a") for name in state.tensors if name.endswith(".a")]
        return [LowRank(name, state.tensors[f"{name}.a"], dose * state.tensors[f"{name}.b"]) for name in names]

    def label(self) -> str:
        return f"lora r{self.rank}"


def linear_modules(
    subject: Subject, targets: Sequence[str] | None = None, depths: Depths = "all"
) -> dict[str, nn.Module]:
    """Linear modules of the decoder layers by dotted name, those that `targets` and `depths` leave.

    Raises TrainingError for a target no module has as its last name, DepthError for a layer that does not
    exist.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {
        name: module
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and 0 <= subject.layer(name) < subject.n_layers
    }
    known = sorted({name.rpartition(".")[2] for name in found})
    missing = [target for target in targets or () if target not in known]
    if missing:
        raise TrainingError(f"targets {missing}: no such linear modules in this subject; allowed: {', '.join(known)}")
    wanted = layers(depths, subject.n_layers)
    return {
        name: module
        for name, module in found.items()
        if (targets is None or name.rpartition(".")[2] in targets) and subject.layer(name) in wanted
    }


@contextmanager
def adapted(
    subject: Subject, modules: dict[str, nn.Module], settings: Lora, seed: int
) -> Iterator[dict[str, tuple[Tensor, Tensor, float]]]:
    """The subject with PEFT's LoRA layers in place of `modules`; gives (A, B, scale) by module name, float32,
    trainable.

    Whatever happens inside, the very module objects, `requires_grad` flags and train/eval modes from before are put
    back.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from transformers.pytorch_utils import Conv1D

    model = subject.model
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # annotated int, used as any number
        use_rslora=settings.rslora,
        target_modules=list(modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),  # GPT-2 stores W transposed
    )
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    attributes = set(vars(model))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            LoraModel(model, config, ADAPTER)
        model.eval()
        injected = {name: model.get_submodule(name) for name in modules}
        factors = {}
        for name, layer in injected.items():
            a, b = layer.lora_A[ADAPTER].float().weight, layer.lora_B[ADAPTER].float().weight
            factors[name] = (a, b, float(layer.scaling[ADAPTER]))
        yield factors
    finally:
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
