"""What the small files of a subject say before its weights are read: layout, layers, sites. Imports no torch.

A plan asks this, so that a wrong layer, an unsupported model or a file that was cut short is told at once and not after
minutes of work.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import embedded
from experiments.architecture import FAMILIES, Family, no_layout
from experiments.edit import SiteName
from experiments.files import SubjectError
from experiments.identity import model_folder
from experiments.spec import EMBEDDED, SubjectSpec

_LAYERS = ("num_hidden_layers", "n_layer")
_WIDTH = ("hidden_size", "n_embd")
_STREAM: tuple[SiteName, ...] = ("resid", "attn_in", "attn_out", "mlp_in", "mlp_out", "o", "down")
_HEADER = 8  # bytes in front of a safetensors header, which say how long it is
_MATRICES: tuple[SiteName, ...] = ("q", "k", "v", "o", "gate", "up", "down")
REMEDY = "save or fetch the model again"


@dataclass(frozen=True)
class Outline:
    """The layout of a subject: how many decoder layers it has, and which sites and matrices each has."""

    n_layers: int
    sites: Collection[str]
    widths: Mapping[str, int] = field(default_factory=dict)
    """Site -> the size of its activation, of those that are as wide as the residual stream."""
    linears: Collection[str] = ()
    """Last names of the linear modules of a decoder layer; empty where they are not known."""


def outline(spec: SubjectSpec) -> Outline:
    """Layers and sites of the subject, from its config; its files are checked to be whole.

    Raises SubjectError for a file that is damaged, and for a model type without a known layout.
    """
    if spec.model == EMBEDDED:  # converted when it is first loaded, which a plan need not wait for
        return _outline(FAMILIES[embedded.MODEL_TYPE], embedded.LAYERS, embedded.WIDTH)
    folder = model_folder(spec, weights=False)
    check_files(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        named = config.get("architectures")
        raise SubjectError(no_layout(str(named[0]) if isinstance(named, list) and named else spec.model, kind))
    found = [config[name] for name in _LAYERS if isinstance(config.get(name), int)]
    if not found or found[0] < 1:
        raise SubjectError(f"{folder / 'config.json'} does not say how many layers there are; {REMEDY}")
    widths = [config[name] for name in _WIDTH if isinstance(config.get(name), int)]
    return _outline(FAMILIES[kind], found[0], widths[0] if widths else None)


def _outline(family: Family, n_layers: int, width: int | None) -> Outline:
    """Sites and matrices are the family's."""
    widths: dict[str, int] = {name: width for name in _STREAM if name in family.places} if width else {}
    linears = sorted({family.places[name].module.rpartition(".")[2] for name in _MATRICES if name in family.places})
    return Outline(n_layers, tuple(family.places), widths, tuple(linears))


def check_files(folder: Path, remedy: str = REMEDY) -> None:
    """Raise SubjectError naming the first JSON or safetensors file of `folder` that is damaged, and what to do."""
    for file in sorted(folder.glob("*.json")):
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise SubjectError(f"{file} is damaged ({error}); {remedy}") from error
        if file.name == "config.json" and not isinstance(content, dict):
            raise SubjectError(f"{file} is damaged (it holds a {type(content).__name__}, not an object); {remedy}")
    for file in sorted(folder.glob("*.safetensors")):
        if problem := _cut(file):
            raise SubjectError(f"{file} is damaged ({problem}); {remedy}")


def _cut(file: Path) -> str | None:
    """What is wrong with a safetensors file: its header must be JSON, and say how many bytes follow it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_HEADER), "little")
        if size < _HEADER + length or length < len("{}"):
            return f"its header should have {length:,} bytes, the file has {size:,}"
        try:
            header = json.loads(opened.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return f"its header cannot be read: {error}"
    expected = _HEADER + length + max(ends, default=0)
    return None if size == expected else f"it has {size:,} bytes, its header says {expected:,}"
