"""PEFT's tuners by the names that papers give them, and the config that each one gets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from experiments.plugin import nearest
from experiments.training import TrainingError
from experiments.weights import matrix_shape, transposed

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from experiments.subject import Subject

TunerName = Literal[
    "lora", "rslora", "dora", "pissa", "olora", "delora", "ia3", "vera", "road", "oft", "boft", "hra", "loha", "lokr",
    "randlora", "shira", "gralora", "miss", "fourierft", "vblora", "c3a",
]  # fmt: skip
Option = bool | int | float | str | tuple[str | int, ...] | None


@dataclass(frozen=True)
class Tuner:
    """One way of adapting a weight: PEFT's name for it, and what is set where `options` leave it open."""

    peft_type: str
    preset: Mapping[str, Option] = field(default_factory=dict)
    rank: str | None = "r"
    """The option that is its rank; None where it has none."""


TUNERS: dict[str, Tuner] = {name: Tuner(name.upper()) for name in get_args(TunerName)} | {
    "rslora": Tuner("LORA", {"use_rslora": True}),
    "dora": Tuner("LORA", {"use_dora": True}),
    "pissa": Tuner("LORA", {"init_lora_weights": "pissa"}),
    "olora": Tuner("LORA", {"init_lora_weights": "olora"}),
    "oft": Tuner("OFT", {"use_cayley_neumann": False}, None),  # the series is orthogonal to a few digits only
    "boft": Tuner("BOFT", rank=None),
    "ia3": Tuner("IA3", rank=None),
    "road": Tuner("ROAD", rank=None),
    "fourierft": Tuner("FOURIERFT", rank=None),
    "c3a": Tuner("C3A", rank=None),
}
SETTLED = {
    **dict.fromkeys(("target_modules", "exclude_modules", "target_parameters"), "use `targets`"),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "layer_replication"), "use `layers`"),
    **dict.fromkeys(("modules_to_save", "bias", "trainable_token_indices"), "only the targets' matrices are trained"),
    "r": "use `rank`",
    "fan_in_fan_out": "it follows from the modules",
}
"""Options of PEFT that a setting of ours stands for: why they are refused."""
PRIVATE = {
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "runtime_config",
    "peft_version", "ephemeral_gpu_offload", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "alora_invocation_tokens", "arrow_config",
}  # fmt: skip
"""Options of PEFT that mean nothing inside a resident subject."""
DATA_DRIVEN = ("eva", "corda", "lora_ga", "loftq")
"""Ways of starting LoRA that PEFT prepares from data or quantised weights, outside of the adapter."""


def tuner_config(
    name: str, subject: Subject, modules: Mapping[str, nn.Module], rank: int | None, options: Mapping[str, Option]
) -> PeftConfig:
    """PEFT's config for tuner `name` on `modules`.

    Raises TrainingError for a tuner this PEFT does not have, a rank it has no place for, an option that does not exist
    or that a setting stands for, and whatever else PEFT refuses.
    """
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    tuner = TUNERS.get(name)
    if tuner is None:
        raise TrainingError(f"unknown tuner {name!r}{nearest(name, list(TUNERS))}; allowed: {', '.join(TUNERS)}")
    known = {str(getattr(kind, "value", kind)): kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    if tuner.peft_type not in known:
        raise TrainingError(f"tuner {name}: PEFT {peft.__version__} has no {tuner.peft_type}; install a newer one")
    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[known[tuner.peft_type]]
    fields = {each.name for each in dataclasses.fields(kind)}
    check_options(name, kind.__name__, options, fields)
    chosen: dict[str, Any] = {"target_modules": list(modules), **tuner.preset, **fitted(name, subject, modules)}
    chosen |= {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    if rank is not None:
        if tuner.rank is None:
            raise TrainingError(f"tuner {name} has no rank; got {rank}; leave `rank` out and use its `options`")
        chosen[tuner.rank] = rank
    if "feedforward_modules" in fields:
        chosen["feedforward_modules"] = named(modules, chosen["feedforward_modules"])
    if "fan_in_fan_out" in fields:
        chosen["fan_in_fan_out"] = any(transposed(module) for module in modules.values())
    try:
        made: PeftConfig = kind(**chosen)
    except Exception as error:  # each config class raises what it likes
        raise TrainingError(f"tuner {name}: PEFT refuses its settings: {error}") from error
    return made


def check_options(tuner: str, kind: str, options: Mapping[str, Option], fields: set[str]) -> None:
    """Raise TrainingError for an option of `tuner` that PEFT's config class `kind` lacks, or that is not to be set."""
    allowed = sorted(fields - set(SETTLED) - PRIVATE)
    for option, value in options.items():
        if option in SETTLED and option in fields:
            raise TrainingError(f"option {option!r} of tuner {tuner} is not to be set: {SETTLED[option]}")
        if option not in allowed:
            raise TrainingError(
                f"tuner {tuner} has no option {option!r}{nearest(option, allowed)}; {kind} takes {', '.join(allowed)}"
            )
        if option == "init_lora_weights" and value in DATA_DRIVEN:
            raise TrainingError(f"option {option} = {value!r} of tuner {tuner} needs a preparation that we do not make")
        if "dropout" in option and value:
            raise TrainingError(f"option {option!r} of tuner {tuner}: adapters are trained without dropout; leave it 0")


def fitted(name: str, subject: Subject, modules: Mapping[str, nn.Module]) -> dict[str, Option]:
    """Options whose value in PEFT suits some models only, made to suit `modules`."""
    if name == "ia3":  # the paper scales what the MLP's last matrix reads, and what the others write
        down = subject.architecture.family.places["down"].module
        return {"feedforward_modules": tuple(each for each in modules if each.endswith("." + down))}
    if name == "road":
        return {"group_size": math.gcd(64, *(matrix_shape(module)[0] for module in modules.values()))}
    return {}


def named(modules: Mapping[str, nn.Module], wanted: Sequence[str]) -> list[str]:
    """Full names of the modules whose full or last names are `wanted`. Raises TrainingError for one that is none."""
    known = sorted({each.rpartition(".")[2] for each in modules})
    for name in wanted:
        if name not in known and name not in modules:
            near = nearest(name, known)
            raise TrainingError(f"feedforward_modules: {name!r} is no target{near}; allowed: {', '.join(known)}")
    return [each for each in modules if each in wanted or each.rpartition(".")[2] in wanted]
