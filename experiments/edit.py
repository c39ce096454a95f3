"""An intervention is data: a list of edits to a forward pass.

Six shapes are the whole language that training, evaluation, baking and interpretation share. Sites are named
activations of a decoder layer; see `docs/design.md` for what each name means in every supported architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

SiteName = Literal["resid", "attn_in", "attn_out", "mlp_in", "mlp_out", "q", "k", "v", "o", "gate", "up", "down"]
SITE_NAMES: tuple[SiteName, ...] = get_args(SiteName)
Pool = Literal["response_mean", "last", "prompt_last"]
"""Where a conversation is read: the mean over the response, its last token, or the prompt's last token."""


class Site(NamedTuple):
    """A named activation of one decoder layer (0-based)."""

    name: SiteName
    layer: int

    def __str__(self) -> str:
        return f"{self.name}@{self.layer}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Inverse of `str`. Raises ValueError for anything that is not `name@layer`."""
        name, _, layer = text.partition("@")
        if name not in SITE_NAMES or not layer.isdigit():
            raise ValueError(f"not a site: {text!r}; allowed: NAME@LAYER with NAME in {', '.join(SITE_NAMES)}")
        return cls(name, int(layer))


def last_n(positions: str) -> int | None:
    """N of `last:N`, None for `all`, `prompt` and `response`. Raises ValueError otherwise."""
    if positions in ("all", "prompt", "response"):
        return None
    match = re.fullmatch(r"last:([1-9]\d*)", positions)
    if not match:
        raise ValueError(f"positions {positions!r}; allowed: all, prompt, response, last:N")
    return int(match[1])


@dataclass(frozen=True, eq=False)
class Add:
    """h += vector, at one site. `vector` is [d]."""

    site: Site
    vector: Tensor
    positions: str = "all"


@dataclass(frozen=True, eq=False)
class Project:
    """h += gain * B B^T h with orthonormal rows `basis` [k, d]; gain -1 ablates the subspace."""

    site: Site
    basis: Tensor
    gain: float
    positions: str = "all"


@dataclass(frozen=True, eq=False)
class Scale:
    """h *= 1 + vector, at one site. `vector` is [d]; zero leaves the activation alone (IA3)."""

    site: Site
    vector: Tensor
    positions: str = "all"


@dataclass(frozen=True, eq=False)
class LowRank:
    """W += b a for the linear module named `module`: `a` is [r, d_in], `b` is [d_out, r]."""

    module: str
    a: Tensor
    b: Tensor
    exact: bool = False
    """Computed in the dtype of `a` and `b`, as adapters are trained, and not in that of the states."""


@dataclass(frozen=True, eq=False)
class Dense:
    """W += delta for the parameter named `parameter`, of the parameter's own shape."""

    parameter: str
    delta: Tensor


@dataclass(frozen=True, eq=False)
class Prompt:
    """Change the text: replace the system message and/or put `prefix` before the first user message."""

    system: str | None = None
    prefix: str | None = None


Activation = Add | Project | Scale
Weight = LowRank | Dense
Edit = Activation | Weight | Prompt


def prompt_of(edits: Iterable[Edit]) -> Prompt | None:
    """The one Prompt among `edits`, or None. Raises ValueError for two, because their order would be a guess."""
    found = [edit for edit in edits if isinstance(edit, Prompt)]
    if len(found) > 1:
        raise ValueError("two Prompt edits in one edit list: merge them into one")
    return found[0] if found else None
