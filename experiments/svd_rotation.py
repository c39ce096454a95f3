"""The rotation adapter of `experiments/rotation.py` as a PEFT tuner.

    import experiments.svd_rotation  # registers the tuner
    model = get_peft_model(model, SvdRotationConfig(r=24, target_modules=["o_proj", "down_proj"]))
    ...
    model.save_pretrained(folder); PeftModel.from_pretrained(base, folder)

Saved with its singular bases, because a decomposition made again elsewhere may differ in signs and in the order of like
values. `set_scale(adapter, c)` of every layer sets the dose, which may be negative and is 1 at first; at 0 the layer is
its base layer exactly. PEFT has no place for tuners of others: this one puts itself under a key of its own into the
tables in which PEFT looks up config, tuner and prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from experiments.rotation import Rotate, Scaling, Shape, initial, singular_basis

PEFT_TYPE = "SVD_ROTATION"
PARAMETERS = ("theta_u", "theta_v", "lambda")


@dataclass
class SvdRotationConfig(PeftConfig):
    """Settings of the tuner. Raises RotationError (a ValueError) for blocks, angles or ranks that do not fit."""

    r: int = field(default=16, metadata={"help": "Singular directions of each weight, those of the largest values."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear modules, as for LoRA."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers; None is all."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    rotate: Rotate = field(default="both", metadata={"help": "Which bases turn: v (input), u (output), both, none."})
    scaling: Scaling = field(default="exp", metadata={"help": "How singular values change: exp, tanh, add, none."})
    max_angle: float = field(default=45.0, metadata={"help": "Degrees that no direction exceeds at dose 1."})
    block_size: int | None = field(default=None, metadata={"help": "Directions that turn among themselves."})
    init_std: float = field(default=0.002, metadata={"help": "Spread of the initial parameters."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        self.shape()

    def shape(self) -> Shape:
        return Shape(self.r, self.rotate, self.scaling, self.max_angle, self.block_size)


class SvdRotationLayer(nn.Module, BaseTunerLayer):
    """A linear module with rotations beside it: y = W x + U core V' x."""

    adapter_layer_names = tuple(f"svdrot_{name}" for name in PARAMETERS)
    other_param_names = ("svdrot_u", "svdrot_s", "svdrot_v")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SvdRotationConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shape: dict[str, Shape] = {}
        self.scaling: dict[str, float] = {}
        self.svdrot_theta_u, self.svdrot_theta_v = nn.ParameterDict(), nn.ParameterDict()
        self.svdrot_lambda = nn.ParameterDict()
        self.svdrot_u, self.svdrot_s, self.svdrot_v = (BufferDict(persistent=True) for _ in range(3))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SvdRotationConfig) -> None:
        """Add an adapter. Its tensors stay float32 whatever the weight is: rounded bases are not orthonormal."""
        weight = self.base_weight.T if self.stored_transposed else self.base_weight
        shape = self.shape[adapter_name] = config.shape()
        self.scaling[adapter_name] = 1.0
        bases = (self.svdrot_u, self.svdrot_s, self.svdrot_v)
        for place, tensor in zip(bases, singular_basis(weight, shape.rank), strict=True):
            place[adapter_name] = tensor
        for name, value in initial(shape, config.init_std).items():
            getattr(self, f"svdrot_{name}")[adapter_name] = nn.Parameter(value.to(weight.device))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def base_weight(self) -> nn.Parameter:
        return self.get_base_layer().get_parameter("weight")

    @property
    def stored_transposed(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the dose of `adapter`."""
        self.scaling[adapter] = scale

    def core(self, adapter: str) -> Tensor:
        """What is put between V' and U, [r, r]."""
        places = {name: getattr(self, f"svdrot_{name}") for name in PARAMETERS}
        parameters = {name: place[adapter] for name, place in places.items() if adapter in place}
        return self.shape[adapter].core(self.svdrot_s[adapter], parameters, self.scaling[adapter])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the weight's own layout."""
        delta = self.svdrot_u[adapter] @ self.core(adapter) @ self.svdrot_v[adapter].T
        return delta.T if self.stored_transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight. Raises ValueError, with `safe_merge`, where that is not finite."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.shape:
                continue
            weight = self.base_weight
            merged = weight.data + self.get_delta_weight(adapter).detach().to(weight.dtype)
            if safe_merge and not merged.isfinite().all():
                raise ValueError(f"adapter {adapter}: the merged weight is not finite")
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        while self.merged_adapters:
            weight = self.base_weight
            weight.data -= self.get_delta_weight(self.merged_adapters.pop()).detach().to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if adapter in self.shape and self.scaling[adapter] != 0:
                inside = linear(x.to(self.svdrot_v[adapter].dtype), self.svdrot_v[adapter].T)
                added = linear(linear(inside, self.core(adapter)), self.svdrot_u[adapter])
                result = result + added.to(result.dtype)
        return result


class SvdRotationModel(BaseTuner):
    """Puts `SvdRotationLayer` in place of the target modules."""

    prefix = "svdrot_"
    tuner_layer_cls = SvdRotationLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_: Any,
    ) -> None:
        assert isinstance(peft_config, SvdRotationConfig)
        if isinstance(target, SvdRotationLayer):
            target.update_layer(adapter_name, peft_config)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear | Conv1D):
            raise TypeError(f"{current_key} is a {type(base).__name__}; svd_rotation adapts Linear and Conv1D")
        layer = SvdRotationLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register() -> None:
    """Make PEFT know the tuner. Importing this module does it."""
    tables: Sequence[tuple[Any, Any]] = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, SvdRotationConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, SvdRotationModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, SvdRotationModel.prefix),
    )
    for table, value in tables:
        table[PEFT_TYPE] = value


register()
