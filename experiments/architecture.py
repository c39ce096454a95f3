"""Where the named sites of a decoder layer are, family by family. One table entry adds a family.

A `Place` says which module of a block carries a site and which part of its output. Sites are read from plain tensors:
norms and projections, never from attention modules, whose outputs are tuples and whose inputs arrive by keyword.

  attn_in, mlp_in    output of the norm in front of the block (GPT-NeoX reads both from the same residual stream)
  attn_out, mlp_out  what is added to the residual stream: the projection, or the post-norm behind it (Gemma 2 and 3)
  q, k, v            projection outputs before rope and before any per-head norm (Qwen 3, Gemma 3)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from experiments.edit import Site, SiteName
from experiments.files import SubjectError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Fused = Literal["thirds", "per_head"]
Part = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Place:
    """A module of a block by its dotted name ("" is the block), and which part of its output is meant."""

    module: str
    part: Part | None = None
    """Which of q, k and v, where one projection makes all three."""


@dataclass(frozen=True)
class Family:
    """The layout that some model types share. Dotted names are below the causal LM; places are below a block."""

    body: str
    """The base model: token ids to last hidden state."""
    blocks: str
    below: tuple[str, ...]
    """Modules in front of the first block."""
    places: Mapping[SiteName, Place]
    fused: Fused | None = None
    """How q, k and v lie in a fused projection: in thirds, or a (q, k, v) triple for every head."""


@dataclass(frozen=True, eq=False)
class SitePoint:
    """A site in a live model: `part` of the last dimension of the output (or input) of `module`.

    `width` is the size of that part. `part` is None for all of it, a slice, or an int64 index tensor.
    """

    module: nn.Module
    side: Literal["input", "output"]
    part: slice | Tensor | None
    width: int


def _same(**modules: str) -> dict[SiteName, Place]:
    return {name: Place(module) for name, module in modules.items()}  # type: ignore[misc]


_LLAMA_PLACES = _same(
    resid="",
    attn_in="input_layernorm",
    attn_out="self_attn.o_proj",
    mlp_in="post_attention_layernorm",
    mlp_out="mlp.down_proj",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_LLAMA = Family("model", "model.layers", ("model.embed_tokens",), _LLAMA_PLACES)
_GEMMA = Family(
    "model",
    "model.layers",
    ("model.embed_tokens",),
    _LLAMA_PLACES
    | _same(
        attn_out="post_attention_layernorm",
        mlp_in="pre_feedforward_layernorm",
        mlp_out="post_feedforward_layernorm",
    ),
)
_GPT2 = Family(
    "transformer",
    "transformer.h",
    ("transformer.wte", "transformer.wpe"),
    {
        **_same(resid="", attn_in="ln_1", attn_out="attn.c_proj", mlp_in="ln_2", mlp_out="mlp.c_proj"),
        **_same(o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj"),
        "q": Place("attn.c_attn", "q"),
        "k": Place("attn.c_attn", "k"),
        "v": Place("attn.c_attn", "v"),
    },
    fused="thirds",
)
_NEOX = Family(
    "gpt_neox",
    "gpt_neox.layers",
    ("gpt_neox.embed_in",),
    {
        **_same(resid="", attn_in="input_layernorm", attn_out="attention.dense"),
        **_same(mlp_in="post_attention_layernorm", mlp_out="mlp.dense_4h_to_h"),
        **_same(o="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h"),
        "q": Place("attention.query_key_value", "q"),
        "k": Place("attention.query_key_value", "k"),
        "v": Place("attention.query_key_value", "v"),
    },
    fused="per_head",
)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}


def no_layout(name: str, kind: str) -> str:
    """What is told of a model whose type is not in `FAMILIES`."""
    looked = sorted({family.blocks for family in FAMILIES.values()})
    return (
        f"{name} (model type {kind!r}) has no known layout; known types: {', '.join(FAMILIES)}, with "
        f"their decoder layers at {', '.join(looked)}; add a row to FAMILIES in experiments/architecture.py"
    )


class Architecture:
    """The layout of one live causal LM. Raises SubjectError when the model does not have the layout of its type."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config
        self.name = type(model).__name__
        self.family = self._family()
        self._check(self.family.body, "the model")
        self._check(self.family.blocks, "the model")
        self.body: nn.Module = model.get_submodule(self.family.body)
        self.blocks: list[nn.Module] = list(model.get_submodule(self.family.blocks).children())
        for place in self.family.places.values():
            self._check(f"{self.family.blocks}.0.{place.module}".rstrip("."), "its first block")
        self.d_model = int(self.config.hidden_size)

    def _family(self) -> Family:
        kind = str(self.config.model_type)
        if kind in FAMILIES:
            return FAMILIES[kind]
        raise SubjectError(no_layout(self.name, kind))

    def _check(self, name: str, where: str) -> None:
        try:
            self.model.get_submodule(name)
        except AttributeError as error:
            wanted = ", ".join(sorted({place.module for place in self.family.places.values() if place.module}))
            raise SubjectError(
                f"{self.name} calls itself {self.config.model_type!r} but {where} lacks {name!r}; looked for "
                f"{self.family.blocks} and in each block for {wanted}"
            ) from error

    def point(self, site: Site) -> SitePoint:
        """Where `site` is. Raises SubjectError for a layer out of range and for a site the family lacks."""
        if not 0 <= site.layer < len(self.blocks):
            raise SubjectError(f"{site}: layer out of range; {self.name} has layers 0 to {len(self.blocks) - 1}")
        place = self.family.places.get(site.name)
        if place is None:
            raise SubjectError(
                f"{site}: {self.name} has no {site.name!r}; its sites are {', '.join(sorted(self.family.places))}"
            )
        module = self.blocks[site.layer].get_submodule(place.module)
        if place.part is None:
            return SitePoint(module, "output", None, self._width(module))
        part, width = self._part(place.part, self._width(module) // 3)
        return SitePoint(module, "output", part, width)

    def _width(self, module: nn.Module) -> int:
        """Size of the last dimension of a module's output: a Linear's, a Conv1D's, else the residual stream's."""
        for attribute in ("out_features", "nf"):
            if hasattr(module, attribute):
                return int(getattr(module, attribute))
        return self.d_model

    def _part(self, part: Part, width: int) -> tuple[slice | Tensor, int]:
        nth = ("q", "k", "v").index(part)
        if self.family.fused == "thirds":
            return slice(nth * width, (nth + 1) * width), width
        import torch  # kept out of planning, which imports this module through subject.py

        heads = int(self.config.num_attention_heads)
        index = torch.arange(3 * width).view(heads, 3, width // heads)[:, nth].reshape(-1)
        return index.to(next(self.model.parameters()).device), width

    def layer(self, name: str) -> int:
        """Decoder layer of a module or parameter name: -1 for embeddings, the number of layers for final norm and head.

        Raises SubjectError for a name the model does not have, and for one that holds all layers.
        """
        if not self._exists(name) or self.family.blocks.startswith(name):
            raise SubjectError(
                f"{self.name} has no module or parameter {name!r} with a place among its layers; names look like "
                f"'{self.family.blocks}.0.{self.family.places['down'].module}' (add '.weight' for the parameter)"
            )
        blocks = self.family.blocks + "."
        if name.startswith(blocks):
            return int(name.removeprefix(blocks).split(".")[0])
        below = any(name == module or name.startswith(module + ".") for module in self.family.below)
        return -1 if below else len(self.blocks)

    def _exists(self, name: str) -> bool:
        owner, _, leaf = name.rpartition(".")
        try:
            module = self.model.get_submodule(owner)
        except AttributeError:
            return False
        return leaf in dict(module.named_children()) or leaf in dict(module.named_parameters(recurse=False))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocabulary] in float32 of the last hidden states [..., d]; soft-capped if the model does so."""
        logits: Tensor = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()
