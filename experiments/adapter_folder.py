"""PEFT's adapter folders: `adapter_config.json` beside `adapter_model.safetensors`; LoRA, which is W += s B A."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.edit import Edit, LowRank
from experiments.exchange import Contents, ExchangeError
from experiments.files import ADAPTER_FILES
from experiments.output import whole

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = ADAPTER_FILES
PREFIX = "base_model.model."
FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
PLAIN = (True, False, None, "gaussian")
"""Initial values of LoRA that leave the base weights alone."""
SPECIAL = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "megatron_config", "use_qalora")
"""Settings under which an adapter is more than B A."""


def contents(folder: Path) -> Contents:
    """What the folder holds. Raises ExchangeError where that is not a plain LoRA."""
    config = _config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ExchangeError(
            f"{folder} is a {kind} adapter; a LORA one can be adopted; merge it, or train it with `peft`"
        )
    on = [name for name in SPECIAL if config.get(name)]
    if on:
        raise ExchangeError(f"{folder} has {on[0]}: {config[on[0]]!r}, which is not a low-rank change alone; merge it")
    if config.get("init_lora_weights") not in PLAIN:
        raise ExchangeError(
            f"{folder} began with init_lora_weights {config['init_lora_weights']!r}, which changes the base weights "
            "too; save it again with save_pretrained(path_initial_model_for_weight_conversion=...), which makes it a "
            "plain LoRA"
        )
    if not (folder / WEIGHTS).is_file():
        raise ExchangeError(f"{folder} has no {WEIGHTS}; save the adapter with safe_serialization=True")
    shapes = _shapes(folder / WEIGHTS)
    foreign = [name for name in shapes if not FACTOR.fullmatch(name)]
    if foreign:
        raise ExchangeError(
            f"{folder}: the tensor {foreign[0]} is not a LoRA factor of a linear module (an embedding, a bias, a "
            "module saved whole?); merge the adapter into its model instead"
        )
    about = {"base_model": config.get("base_model_name_or_path"), "modules": len(shapes) // 2}
    return Contents("peft", folder, shapes, {"operation": "low_rank"}, about)


def read(found: Contents) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (a [r, d_in], b [d_out, r]) in float32, PEFT's scale folded into b. Raises ExchangeError."""
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    config, tensors = _config(found.path), load_file(found.path / WEIGHTS)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor.float()
    result = {}
    for module, pair in sorted(factors.items()):
        if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]:
            raise ExchangeError(f"{found.path}: {module} lacks a factor, or its two ranks differ")
        rank = len(pair["A"])
        patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        if not all(factor.isfinite().all() for factor in pair.values()):
            raise ExchangeError(f"{found.path}: the factors of {module} are not finite")
        result[module] = pair["A"], scale * pair["B"]
    return result


def write(edits: Sequence[Edit], folder: Path, base: str) -> None:
    """Low-rank edits as a LoRA folder that `PeftModel.from_pretrained` loads onto the model `base`.

    Factors of one module are put side by side; alpha is the rank, so that PEFT's scale is 1. Raises ExchangeError.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    wrong = sorted({type(edit).__name__ for edit in edits if not isinstance(edit, LowRank)})
    if wrong or not edits:
        raise ExchangeError(
            f"a LoRA folder holds low-rank changes of weights; this trial has {', '.join(wrong) or 'nothing'}; use "
            "--format safetensors for vectors, or bake"
        )
    by_module: dict[str, list[LowRank]] = {}
    for edit in edits:
        if isinstance(edit, LowRank):
            by_module.setdefault(edit.module, []).append(edit)
    tensors = {}
    for module, own in by_module.items():
        factors = {"A": torch.cat([edit.a for edit in own]), "B": torch.cat([edit.b for edit in own], dim=1)}
        for letter, tensor in factors.items():
            tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = tensor.detach().cpu().float().contiguous()
    ranks = {re.escape(module): sum(len(edit.a) for edit in own) for module, own in by_module.items()}
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=most,
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(by_module),
        inference_mode=True,
    )
    with whole(folder) as made:
        made.mkdir()
        config.save_pretrained(str(made))
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise ExchangeError(f"{folder} has no {CONFIG}: no PEFT adapter's folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExchangeError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(found, dict):
        raise ExchangeError(f"{file} holds a {type(found).__name__}, not settings; save the adapter again")
    return found


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ExchangeError(f"{file} cannot be read ({error}); save the adapter again") from error
