"""Attention over packed tries and over a key-value cache, called by transformers' own model code.

The function registered here under `NAME` asks the pass in progress what to attend to. No mask function is registered,
so transformers builds no masks: who sees whom follows from the trie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import ceil, log
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.packing import Ints, Trie

NAME = "orch_packed"
KEYS = 1 << 16
"""Gathered keys of one attention call: what bounds the memory that shared prefixes cost."""
FEW = 256
"""Keys up to which attention in bfloat16 that is differentiated on a CPU is not fused."""
FINER = (1.5, 1.25)
"""Ratio between neighbouring bucket sizes, for queries and keys: padding is below it."""


@dataclass(frozen=True)
class Rule:
    """How a layer attends: factor of the scores, how far back it sees (None: everything), soft cap of the scores."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class Attends(Protocol):
    """What a pass has in force in a layer."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """[T, heads, d] and twice [T, key-value heads, d] -> [T, heads, d]."""
        ...


_IN_FORCE: ContextVar[Attends] = ContextVar("attends")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The function transformers calls with [1, heads, T, d] tensors. Returns [1, T, heads, d] and no weights."""
    width = query.shape[-1]
    rule = Rule(options.get("scaling") or width**-0.5, options.get("sliding_window"), options.get("softcap"))
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return _IN_FORCE.get()(layer, q, k, v, rule).unsqueeze(0), None


AttentionInterface.register(NAME, _attend)


@contextmanager
def in_force(config: Any, attends: Attends) -> Iterator[None]:
    """Have the model of `config` attend by `attends`."""
    before, token = config._attn_implementation, _IN_FORCE.set(attends)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _IN_FORCE.reset(token)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """[n, heads, Lq, d] and twice [n, key-value heads, Lk, d] -> [n, heads, Lq, d].

    `mask` [n, 1, Lq, Lk] is added to the scores; None is causal.
    """
    n, heads, length, width = query.shape
    groups, n_keys = key.shape[1:3]
    if length == 1 and heads > groups and mask is not None and query.dtype != torch.float32:
        # heads that share keys as queries of one head: the same bits, at a fifth of the time in bfloat16 on a CPU
        shared = attend(query.view(n, groups, -1, width), key, value, mask, rule)
        return shared.reshape(n, heads, 1, -1)
    if rule.softcap is None and not slow_to_differentiate(query, key):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=rule.scaling, enable_gqa=heads > groups
        )
    q, k, v = (part.reshape(n * groups, -1, part.shape[-1]) for part in (query, key, value))
    scores = (rule.scaling * (q @ k.transpose(1, 2))).view(n, groups, -1, length, n_keys)  # heads that share keys
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None:
        mask = torch.full((1, 1, length, n_keys), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    weights = (scores + mask.unsqueeze(1)).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights.view(n * groups, -1, n_keys) @ v).view(n, heads, length, -1)


def slow_to_differentiate(query: Tensor, key: Tensor) -> bool:
    """Whether plain matrix products are much quicker than the fused attention: its backward pass in bfloat16 on a CPU
    took eleven times theirs at 46 keys, six times at 128. With more keys, what they keep for it takes much memory."""
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return wanted and query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= FEW


def visible(depth: Tensor, n_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask [n, 1, Lq, n_keys]: a query at `depth` [n, Lq] sees keys 0 to depth, the last `window` of them."""
    keys = torch.arange(n_keys, device=depth.device)
    hidden = keys > depth[..., None]
    if window is not None:
        hidden |= keys <= depth[..., None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=depth.device).masked_fill_(hidden, -torch.inf).unsqueeze(1)


class Bucket:
    """Groups of similar size, padded to one: flat indices of queries [n, Lq] and keys [n, Lk].

    Padding repeats the group's own first query, as if it were at depth 0 and written to a spare place behind the last
    token, and its own first key, which is hidden. Never another row's: hidden or unread, 0 times NaN is NaN.
    """

    def __init__(self, trie: Trie, groups: Sequence[tuple[int, int]], device: torch.device) -> None:
        paths = [trie.paths[row] for row, _ in groups]
        firsts = [first for _, first in groups]
        queries = [path[first:] - trie.skip for path, first in zip(paths, firsts, strict=True)]
        depths = [np.arange(first, len(path)) for path, first in zip(paths, firsts, strict=True)]
        self.query = padded(queries).to(device)
        self.place = padded(queries, trie.size).view(-1).to(device)
        self.depth = padded(depths, 0).to(device)
        self.key = padded(paths).to(device)
        self.plain = not any(firsts) and len({len(path) for path in paths}) == 1
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> None:
        """Write the attention of this bucket's queries into `out` [T + 1, heads, d]."""
        n, n_keys = self.key.shape
        window = rule.window if rule.window is not None and rule.window < n_keys else None
        mask = None if self.plain and window is None else self._mask(window, query.dtype)
        q = query.index_select(0, self.query.view(-1)).view(n, -1, *query.shape[1:]).transpose(1, 2)
        k, v = (
            part.index_select(0, self.key.view(-1)).view(n, n_keys, *part.shape[1:]).transpose(1, 2)
            for part in (key, value)
        )
        mixed = attend(q, k, v, mask, rule).transpose(1, 2)
        out.index_copy_(0, self.place, mixed.reshape(-1, *mixed.shape[2:]))

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            self._masks[window] = visible(self.depth, self.key.shape[1], window, dtype)
        return self._masks[window]


Layers = dict[int, tuple["Tensor", "Tensor"]]
"""Keys and values of every layer, [n, key-value heads, d] each."""
Tap = Callable[[int, "Tensor", "Tensor"], None]
"""Is shown every layer's keys and values."""


@dataclass(frozen=True, eq=False)
class Keep:
    """A tap that keeps what `index` [n] points to in `layers`."""

    index: Tensor
    layers: Layers

    def __call__(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.layers[layer] = key.index_select(0, self.index), value.index_select(0, self.index)


class Packed:
    """Attention inside one trie, behind the keys and values of its `head`. `taps` see both as one."""

    def __init__(self, trie: Trie, device: torch.device, head: Layers | None = None, taps: Sequence[Tap] = ()) -> None:
        self.head = head or {}
        self.taps = list(taps)
        bins: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for row, first in trie.groups:
            n_keys = len(trie.paths[row])
            bins[_bin(n_keys - first, FINER[0]), _bin(n_keys, FINER[1])].append((row, first))
        self.buckets: list[Bucket] = []
        for groups in bins.values():
            step = max(1, KEYS // max(len(trie.paths[row]) for row, _ in groups))
            self.buckets += [Bucket(trie, groups[at : at + step], device) for at in range(0, len(groups), step)]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        if layer in self.head:
            key, value = (torch.cat(pair) for pair in zip(self.head[layer], (key, value), strict=True))
        for tap in self.taps:
            tap(layer, key, value)
        out = query.new_empty(len(query) + 1, *query.shape[1:-1], value.shape[-1])
        for bucket in self.buckets:
            bucket.attend(out, query, key, value, rule)
        return out[:-1]


def _bin(size: int, ratio: float) -> int:
    return ceil(log(max(size, 8)) / log(ratio))


def padded(parts: Sequence[Ints], filler: int | None = None) -> Tensor:
    """[n, longest] of `parts`, each continued with `filler`, or with its own first number."""
    out = np.empty((len(parts), max(map(len, parts))), np.int64)
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
        row[len(part) :] = part[0] if filler is None else filler
    return torch.from_numpy(out)
