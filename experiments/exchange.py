"""Vectors and adapters of others, and ours for them.

A file of vectors means nothing without four facts: what is done with a vector (`operation`), where (`site`), which
layer its number means (`layer_map`), and what dose 1 is (`scale_convention`). Our safetensors say them in their
metadata; a GGUF control vector has them by definition; a foreign safetensors file lacks some, and whoever adopts it
must say them. Adapters are PEFT's folders (`adapter_folder.py`). docs/exchange.md has the formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from experiments.depth import Depths, layers
from experiments.edit import SITE_NAMES, Add, Edit, Project, Prompt, Scale, Site, SiteName, last_n
from experiments.output import whole

if TYPE_CHECKING:
    from torch import Tensor

Operation = Literal["add", "ablate", "scale"]
LayerMap = Literal["blocks", "hidden_states"]
ScaleConvention = Literal["stored", "unit"]
ALLOWED: dict[str, tuple[str, ...]] = {
    "operation": get_args(Operation),
    "site": SITE_NAMES,
    "layer_map": get_args(LayerMap),
    "scale_convention": get_args(ScaleConvention),
}
"""The four facts. `blocks`: number L is the output of decoder block L, from 0. `hidden_states`: number L is what
transformers calls hidden_states[L], the output of block L - 1; 0 is the embedding. `stored`: dose 1 is the vector as it
is. `unit`: dose 1 is a vector of length 1 in its direction."""
ORTHONORMAL = 1e-3
"""How far the inner products of an ablated basis may be from those of an orthonormal one."""


class ExchangeError(ValueError):
    """A foreign file that cannot be used, or edits that a format cannot say: what is wrong and what to do."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, read without its numbers."""

    kind: Literal["safetensors", "gguf", "peft"]
    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    facts: Mapping[str, str] = field(default_factory=dict)
    """Those of the four that the file states, and `positions`."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else it says about itself."""


class Placed(NamedTuple):
    """A vector of a file: tensor `name`, or its row `row`, belongs to `site`."""

    name: str
    row: int | None
    site: Site


def contents(path: Path) -> Contents:
    """What is at `path`: vectors in safetensors or GGUF, or a PEFT adapter's folder. Raises ExchangeError."""
    from experiments import adapter_folder, control_vector

    if path.is_dir():
        return adapter_folder.contents(path)
    if not path.is_file():
        raise ExchangeError(f"{path}: no such file; give a .safetensors or .gguf file, or a PEFT adapter's folder")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return control_vector.contents(path)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl") or magic[:2] in (b"PK", b"\x80\x02"):
        raise ExchangeError(
            f"{path} is a pickle, and reading one runs whatever is in it; save its tensors with safetensors.torch."
            "save_file, on a machine where you trust it"
        )
    return _safetensors(path)


def _safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ExchangeError(f"{path} is no safetensors file ({error}); fetch or write it again") from error
    if not shapes:
        raise ExchangeError(f"{path} holds no tensors")
    facts = {name: metadata[name] for name in (*ALLOWED, "positions") if name in metadata}
    about = {name: text for name, text in metadata.items() if name not in ALLOWED and name != "positions"}
    return Contents("safetensors", path, shapes, facts, about)


def _site_in(name: str) -> Site | None:
    """The site that a tensor of ours is named by."""
    try:
        return Site.parse(name)
    except ValueError:
        return None


def stated(found: Contents) -> dict[str, str]:
    """The facts that a file of vectors says itself, in its metadata or by the names of its tensors.

    Raises ExchangeError where only some tensors are named by their site.
    """
    named = [site for site in map(_site_in, found.shapes) if site is not None]
    if named and len(named) < len(found.shapes):
        raise ExchangeError(f"{found.path}: some tensors are named by site and layer, like {named[0]}, some are not")
    own = {"site": ",".join(sorted({site.name for site in named})), "layer_map": "blocks"} if named else {}
    for fact, value in own.items():
        if found.facts.get(fact, value) != value:
            raise ExchangeError(
                f"{found.path}: names like {named[0]} say {fact} {value}, its metadata {found.facts[fact]}"
            )
    return {**found.facts, **own}


def agreed(found: Contents, given: Mapping[str, str | None]) -> dict[str, str]:
    """The facts of a file of vectors: those its names and metadata state, and those `given`.

    Raises ExchangeError for facts that contradict, are unknown or missing.
    """
    facts = stated(found)
    for fact, value in given.items():
        if value is not None and facts.setdefault(fact, value) != value:
            raise ExchangeError(
                f"{found.path} says {fact}: {facts[fact]}, the settings say {value}; leave the setting out"
            )
    missing = [fact for fact in ALLOWED if fact not in facts]
    if missing:
        raise ExchangeError(
            f"{found.path} does not say {', '.join(missing)}; say it in the settings: "
            + ", ".join(f"{fact}: {'|'.join(ALLOWED[fact])}" for fact in missing)
        )
    for fact, allowed in ALLOWED.items():
        if facts[fact] not in allowed and not (fact == "site" and all(map(_site_in, found.shapes))):
            raise ExchangeError(f"{found.path}: {fact} is {facts[fact]!r}; allowed: {', '.join(allowed)}")
    try:
        last_n(facts.get("positions", "all"))
    except ValueError as error:
        raise ExchangeError(f"{found.path}: {error}") from error
    return facts


def placed(found: Contents, facts: Mapping[str, str], depths: Depths | None, n_layers: int) -> list[Placed]:
    """Which vector belongs where in a subject of `n_layers` layers; of the layers `depths` only, if given.

    Raises ExchangeError for names without a layer, layers out of range and two vectors for one place, DepthError.
    """
    wanted = None if depths is None else layers(depths, n_layers)
    shift = 1 if facts["layer_map"] == "hidden_states" else 0
    result: list[Placed] = []
    for name, row, number, site in _numbered(found, facts):
        layer = number - shift
        if wanted is not None and layer not in wanted:
            continue
        if not 0 <= layer < n_layers:
            what = "the embedding's output" if number == 0 else f"layer {layer}"
            raise ExchangeError(
                f"{found.path}: {name!r} number {number} is {what} by layer_map {facts['layer_map']}; the subject has "
                f"layers 0 to {n_layers - 1}; name the layers to use (layer: ...), or correct layer_map"
            )
        result.append(Placed(name, row, Site(site, layer)))
    if not result:
        raise ExchangeError(f"{found.path} has no vector for the layers {depths!r}")
    twice = [each.site for each in result if sum(other.site == each.site for other in result) > 1]
    if twice:
        raise ExchangeError(f"{found.path} has several vectors for {twice[0]}; keep one")
    return sorted(result, key=lambda each: each.site.layer)


def _numbered(found: Contents, facts: Mapping[str, str]) -> list[tuple[str, int | None, int, SiteName]]:
    """(tensor, row, layer number, site) of every vector."""
    result: list[tuple[str, int | None, int, SiteName]] = []
    for name, shape in found.shapes.items():
        site, digits = _site_in(name), re.findall(r"\d+", name)
        if site is not None:
            result.append((name, None, site.layer, site.name))
        elif len(digits) == 1:
            result.append((name, None, int(digits[0]), facts["site"]))  # type: ignore[arg-type]
        elif len(found.shapes) == 1 and len(shape) == 2 and facts["operation"] != "ablate":
            result += [(name, row, row, facts["site"]) for row in range(shape[0])]  # type: ignore[misc]
        else:
            raise ExchangeError(
                f"{found.path}: the tensor {name!r} {list(shape)} does not say its layer; name each tensor by one "
                "number, or like resid@14, or keep one matrix with a row for each layer"
            )
    return result


def vectors(found: Contents, facts: Mapping[str, str], places: Sequence[Placed]) -> dict[Site, Tensor]:
    """The numbers of `places`, float32: [d], or an orthonormal basis [k, d] for `ablate`. Raises ExchangeError."""
    if found.kind == "gguf":
        from experiments import control_vector

        tensors = control_vector.tensors(found.path)
    else:
        from safetensors.torch import load_file

        tensors = load_file(found.path)
    result = {}
    for name, row, site in places:
        whole_one = tensors[name].float()
        result[site] = _scaled(found, facts, site, whole_one if row is None else whole_one[row])
    return result


def _scaled(found: Contents, facts: Mapping[str, str], site: Site, tensor: Tensor) -> Tensor:
    """One vector as its facts mean it."""
    import torch

    where = f"{found.path}: the vector of {site}"
    ablate = facts["operation"] == "ablate"
    if ablate and tensor.dim() == 1:
        tensor = tensor[None]
    if tensor.dim() != 1 + ablate:
        raise ExchangeError(f"{where} has shape {list(tensor.shape)}; must be [d]" + (" or [k, d]" if ablate else ""))
    if not tensor.isfinite().all() or not tensor.norm(dim=-1).all():
        raise ExchangeError(f"{where} is zero or not finite; nothing can be done with it")
    if facts["scale_convention"] == "unit":
        tensor = tensor / tensor.norm(dim=-1, keepdim=True)
    if ablate and ((tensor @ tensor.T) - torch.eye(len(tensor))).abs().max() > ORTHONORMAL:
        raise ExchangeError(
            f"{where}: its {len(tensor)} directions are not orthonormal; a single one is made so by scale_convention: "
            "unit, several by torch.linalg.qr"
        )
    return tensor


# writing


def write_vectors(edits: Sequence[Edit], path: Path, about: Mapping[str, Any]) -> None:
    """Edits of activations as safetensors named by their sites, with the four facts, positions and `about` beside them.

    Raises ExchangeError for edits of several kinds or positions, two at one site, and others than activations.
    """
    from safetensors.torch import save_file

    one = _alike(edits)
    operation = {Add: "add", Project: "ablate", Scale: "scale"}[type(one[0])]
    tensors = {}
    for edit in one:
        if isinstance(edit, Project) and edit.gain != -1:
            raise ExchangeError(f"ablation at {edit.site} has strength {-edit.gain:g}; export it at dose 1")
        tensors[str(edit.site)] = (edit.basis if isinstance(edit, Project) else edit.vector).detach().cpu().contiguous()
    facts = {
        "operation": operation,
        "site": ",".join(sorted({edit.site.name for edit in one})),
        "layer_map": "blocks",
        "scale_convention": "stored",
        "positions": one[0].positions,
    }
    with whole(path) as made:
        save_file(tensors, made, metadata={**facts, "about": json.dumps(dict(about))})


def _alike(edits: Sequence[Edit]) -> list[Add | Project | Scale]:
    """The edits, if they are of one kind at different sites."""
    wrong = [edit for edit in edits if not isinstance(edit, Add | Project | Scale)]
    if wrong or not edits:
        kinds = ", ".join(sorted({type(edit).__name__ for edit in wrong})) or "nothing"
        hint = (
            "a prompt is text: copy it"
            if any(isinstance(edit, Prompt) for edit in wrong)
            else "use --format peft or bake"
        )
        raise ExchangeError(f"a file of vectors holds edits of activations; this trial has {kinds}; {hint}")
    found = [edit for edit in edits if isinstance(edit, Add | Project | Scale)]
    _same("kind", {type(edit).__name__ for edit in found})
    _same("positions", {edit.positions for edit in found})
    sites = [edit.site for edit in found]
    twice = [site for site in sites if sites.count(site) > 1]
    if twice:
        raise ExchangeError(f"two edits at {twice[0]}; a file of vectors holds one for each site")
    return found


def _same(what: str, values: Collection[str]) -> None:
    if len(values) > 1:
        raise ExchangeError(f"edits of different {what} ({', '.join(sorted(values))}); a file of vectors has one")
