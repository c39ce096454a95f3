"""PEFT's adapters in a resident subject: put in, read out as edits of weights, and taken out again.

An adapter is read through what it computes, not through its own scaling: the difference between its map at dose 1 and
the module's own. Dose c is c times that difference, so that dose 0 is the subject exactly and -c undoes c, for tuners
too whose own scale does neither (DoRA, PiSSA, OFT, RoAd, ...; see docs/certified.md). The difference is kept as two
factors where it has low rank exactly, as a whole matrix elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.edit import Edit
from experiments.training import TrainingError
from experiments.weights import factored, matrix_shape, transposed

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from experiments.subject import Subject

ADAPTER = "orch"
LINEAR = 1e-5
"""Largest relative deviation of an adapted module from an affine map; some tuners compute in float32 only."""
CHUNK = 1024  # columns of a difference measured at once
ABSORBED = ("pissa", "olora")  # initial values of LoRA that are taken out of the base weight


@dataclass(eq=False)
class Injection:
    """An adapter inside a subject, at `dose`."""

    tuner: Any
    """PEFT's tuner; what its layers share lives in it."""
    modules: Mapping[str, nn.Module]
    """The subject's own modules, by dotted name."""
    weights: Mapping[str, Tensor]
    """Their weights as they were before."""
    layers: Mapping[str, Any]
    """PEFT's layers in their places."""
    absorbed: Mapping[str, tuple[Tensor, Tensor]]
    """(A, s B) that PEFT took out of the base weight, for the layers where it did."""
    dose: float = 1.0
    """What the subject computes with now: this multiple of the adapter's change."""

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained: float32 leaves."""
        return [parameter for parameter in self.tuner.parameters() if parameter.requires_grad]

    def edits_of(self, dose: float = 1.0) -> list[Edit]:
        """Have the next passes compute at `dose`, which 0 makes the untouched subject. There is nothing to edit."""
        self.dose = dose
        return []

    def hook(self) -> None:
        """Have every layer obey `dose`."""
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._at_dose(self.modules[name], self.weights[name]))

    def _at_dose(self, module: Any, weight: Tensor) -> Callable[..., Tensor | None]:
        from torch.nn.functional import linear

        def scaled(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.dose == 1:
                return None
            bias = None if module.bias is None else module.bias.data
            base = linear(inputs[0], weight.T if transposed(module) else weight, bias)
            return base if self.dose == 0 else base + self.dose * (output - base)

        return scaled

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A [r, d_in] and B [d_out, r] of every module, float32 copies, for LoRA that does nothing else."""
        return {name: unscaled_factors(layer) for name, layer in self.layers.items()}

    def scale(self) -> float:
        """s, by which LoRA multiplies B A in every module."""
        return float(next(iter(self.layers.values())).scaling[ADAPTER])

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's change of the subject, float32 on the CPU; `weights.weight_edits` reads them.

        `MODULE.a` [r, d_in] and `MODULE.b` [d_out, r] where it has low rank, otherwise the difference of a parameter
        under the parameter's own name and in its own shape. Raises TrainingError for an adapter that is not linear.
        """
        found: dict[str, Tensor] = {}
        self.dose = 1.0
        for name, layer in self.layers.items():
            found |= self._own_factors(name, layer) or self._measured(name, layer)
        return found

    def _own_factors(self, name: str, layer: Any) -> dict[str, Tensor] | None:
        """LoRA's own A and s B, where they are all there is to it."""
        from torch import cat, equal

        if not plain_lora(layer):
            return None
        if name not in self.absorbed and not equal(layer.get_base_layer().weight.data, self.weights[name]):
            return None
        a, b = lora_factors(layer)
        if name in self.absorbed:
            first_a, first_b = self.absorbed[name]
            a, b = cat([a, first_a]), cat([b, -first_b], dim=1)
        return {f"{name}.a": a.cpu(), f"{name}.b": b.cpu()}

    def _measured(self, name: str, layer: Any) -> dict[str, Tensor]:
        """The difference between what the layer computes and what the module computed."""
        module = self.modules[name]
        change, bias = difference(name, layer, self.weights[name], module)
        found: dict[str, Tensor] = {}
        if factors := factored(change):
            found |= {f"{name}.a": factors[0].cpu(), f"{name}.b": factors[1].cpu()}
        elif change.any():
            stored = change.T if transposed(module) else change
            found[f"{name}.weight"] = stored.float().contiguous().cpu()
        if bias.any():
            if getattr(module, "bias", None) is None:
                raise TrainingError(f"{name}: the adapter adds a bias, and the module has none to carry it")
            found[f"{name}.bias"] = bias.float().cpu()
        return found


@contextmanager
def injected(subject: Subject, modules: Mapping[str, nn.Module], config: PeftConfig, seed: int) -> Iterator[Injection]:
    """The subject with PEFT's layers in place of `modules`, their parameters float32.

    Whatever happens inside, the very module objects, weights, `requires_grad` flags and train/eval modes from before
    are put back, and random numbers go on as if nothing had happened. Raises TrainingError for what PEFT refuses.
    """
    model = subject.model
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    own = {parameter: parameter.data for module in modules.values() for parameter in module.parameters()}
    weights = {name: own[module.get_parameter("weight")] for name, module in modules.items()}
    attributes = set(vars(model))
    try:
        if isinstance(getattr(config, "init_lora_weights", None), str):  # some of these write into the weights
            for parameter, data in own.items():
                parameter.data = data.clone()
        tuner = _put_in(subject, modules, config, seed)
        found = {name: model.get_submodule(name) for name in modules}
        absorbed = {
            name: lora_factors(layer)
            for name, layer in found.items()
            if plain_lora(layer) and str(getattr(config, "init_lora_weights", "")).startswith(ABSORBED)
        }
        adapter = Injection(tuner, modules, weights, found, absorbed)
        adapter.hook()
        yield adapter
    finally:
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, data in own.items():
            parameter.data = data
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def _put_in(subject: Subject, modules: Mapping[str, nn.Module], config: PeftConfig, seed: int) -> Any:
    """PEFT's tuner around the subject's model, in eval mode. Raises TrainingError for what PEFT refuses."""
    import torch
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    kind: Any = config.peft_type
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind](subject.model, config, ADAPTER)
            cast_adapter_dtype(subject.model, ADAPTER)
            subject.model.eval()
            for name, module in modules.items():  # some layers are made, and fail when they are used
                like = module.weight
                with torch.no_grad():
                    subject.model.get_submodule(name)(like.new_zeros(1, matrix_shape(module)[1]))  # type: ignore[operator]
        except Exception as error:  # each tuner raises what it likes
            shown = str(error) or type(error).__name__
            raise TrainingError(
                f"PEFT's {getattr(kind, 'value', kind)} cannot adapt this subject: {shown}; {_instead(modules)}"
            ) from error
    return tuner


def _instead(modules: Mapping[str, nn.Module]) -> str:
    """What to change where PEFT refuses `modules`."""
    turned = sorted({name.rpartition(".")[2] for name, module in modules.items() if transposed(module)})
    if not turned:
        return "change its rank or options, or take another tuner"
    return (
        f"{', '.join(turned)} are stored transposed here, which not every tuner takes: use lora, or one that "
        "docs/certified.md certifies on GPT-2"
    )


def plain_lora(layer: Any) -> bool:
    """Whether the layer adds s B A to its weight and does nothing else."""
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer) and ADAPTER not in layer.lora_variant and not layer.lora_bias[ADAPTER]


def unscaled_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] of a LoRA layer, float32 copies."""
    a, b = (part[ADAPTER].weight.detach().float().clone() for part in (layer.lora_A, layer.lora_B))
    return a, b


def lora_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and s B [d_out, r] of a LoRA layer, float32 copies."""
    a, b = unscaled_factors(layer)
    return a, layer.scaling[ADAPTER] * b


def difference(name: str, layer: Any, weight: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """What an adapted module adds to the map of `module`, whose weight was `weight`: [d_out, d_in], [d_out], float64.

    Measured on the unit vectors, in float64 throughout, so that it is what PEFT's own forward pass computes. Raises
    TrainingError where that is not an affine map.
    """
    import torch

    exact = copy.deepcopy(layer).double()
    before = (weight.T if transposed(module) else weight).double()
    d_in = before.shape[1]
    changes = torch.empty_like(before)
    with torch.no_grad():
        shift = exact(before.new_zeros(1, d_in))[0]
        for start in range(0, d_in, CHUNK):
            stop = min(start + CHUNK, d_in)
            units = before.new_zeros(stop - start, d_in)
            units[:, start:stop].fill_diagonal_(1)
            changes[:, start:stop] = (exact(units) - shift).T - before[:, start:stop]
        probe = torch.randn(4, d_in, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(before.device)
        expected = probe @ (before + changes).T
        deviation = float((exact(probe) - shift - expected).norm() / expected.norm())
    if not deviation <= LINEAR:
        raise TrainingError(
            f"{name}: the adapter is not linear in its input (relative deviation {deviation:.1g}), so it has no weight "
            f"difference to be dosed; choose another tuner or other options"
        )
    own = getattr(module, "bias", None)
    return changes, shift if own is None else shift - own.data.double()
