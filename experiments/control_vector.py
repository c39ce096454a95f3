"""Control vectors in GGUF, as repeng writes and llama.cpp loads them: `direction.L`, added to the residual stream.

Layer L is decoder block L counted from 0, and the vector is added to the block's output: in repeng by its own layer
list, in llama.cpp by `build_cvec` behind the feed-forward sum. llama.cpp has no place for L = 0: its buffer begins with
layer 1 and its loader refuses `direction.0`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.edit import Add, Edit
from experiments.exchange import Contents, ExchangeError
from experiments.output import whole

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURE = "controlvector"
NUMBERS = ("F32", "F16", "F64")
FACTS = {"operation": "add", "site": "resid", "layer_map": "blocks", "scale_convention": "stored", "positions": "all"}
"""What the format means by definition."""


def contents(path: Path) -> Contents:
    """What the file holds. Raises ExchangeError for another kind of GGUF, and for tensors that are no directions."""
    reader = _opened(path)
    kind = _text(reader, "general.architecture")
    if kind != ARCHITECTURE:
        raise ExchangeError(f"{path} is a GGUF of architecture {kind!r}, not a {ARCHITECTURE}")
    shapes = {}
    for tensor in reader.tensors:
        if not re.fullmatch(r"direction\.\d+", tensor.name):
            continue
        if tensor.tensor_type.name not in NUMBERS or tensor.data.ndim != 1:
            raise ExchangeError(
                f"{path}: {tensor.name} is {tensor.tensor_type.name} {list(tensor.data.shape)}; must be a vector of "
                f"{', '.join(NUMBERS)}"
            )
        shapes[tensor.name] = tuple(int(size) for size in tensor.data.shape)
    if not shapes:
        raise ExchangeError(f"{path} has no tensor named direction.LAYER")
    return Contents("gguf", path, shapes, FACTS, {"model_hint": _text(reader, f"{ARCHITECTURE}.model_hint")})


def tensors(path: Path) -> dict[str, Tensor]:
    """Every direction, [d] float32."""
    import torch

    return {
        tensor.name: torch.tensor(tensor.data.astype("float32"))
        for tensor in _opened(path).tensors
        if tensor.name.startswith("direction.")
    }


def write(edits: Sequence[Edit], path: Path, model_type: str) -> None:
    """Vectors of the residual stream as a control vector for `model_type`. Raises ExchangeError for anything else."""
    from gguf import GGUFWriter

    vectors: dict[int, Any] = {}
    for edit in edits:
        if not isinstance(edit, Add) or edit.site.name != "resid" or edit.positions != "all":
            where = f"{getattr(edit, 'site', '')} on positions {getattr(edit, 'positions', '')!r}"
            raise ExchangeError(
                "a control vector is added to the residual stream at every token; this trial has "
                f"{type(edit).__name__} at {where}; use --format safetensors, or bake"
            )
        if edit.site.layer == 0:
            raise ExchangeError("llama.cpp has no control vector at layer 0; use --format safetensors, or bake")
        if edit.site.layer in vectors:
            raise ExchangeError(f"two vectors at {edit.site}; a control vector has one for each layer")
        vectors[edit.site.layer] = edit.vector.detach().cpu().float().numpy()
    if not vectors:
        raise ExchangeError("nothing to write: the trial changes nothing at this dose")
    with whole(path) as made:
        writer = GGUFWriter(made, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _opened(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # its parser raises whatever numpy does on bytes that are not there
        raise ExchangeError(f"{path} cannot be read as GGUF ({error}); fetch or write it again") from error


def _text(reader: Any, name: str) -> str | None:
    found = reader.get_field(name)
    return None if found is None else str(found.contents())
