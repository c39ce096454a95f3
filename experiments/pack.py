"""A pack: rows laid out on the device, with what their edits do to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.acting import Delta, Station, delta, in_order
from experiments.attention import Attends, Keep, Layers, Packed, Tap
from experiments.packing import Coder, Head, Row, Trie, behead, lay_out, reach

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.edit import Edit
    from experiments.packing import Ints
    from experiments.subject import Subject

Action = tuple["slice | Tensor", "slice | Tensor | None", Delta]
"""Tokens, part of the last dimension, and what is added there."""
Actions = Mapping[tuple["nn.Module", str], Sequence[Action]]
"""What is done at every module's input or output, in order."""


@dataclass(frozen=True, eq=False)
class Read:
    """What is wanted of a pass at a station: the flat indices [n] of tokens there, and where to put the values."""

    station: Station
    index: Tensor
    keep: Callable[[Tensor], None]
    """Receives [n, width]."""


@dataclass(frozen=True, eq=False)
class Level:
    """A trie of `size` tokens on the device.

    `parent` [size] points into the level below, `origin` into the lowest; both are None for the lowest itself.
    """

    fork: int
    size: int
    parent: Tensor | None
    origin: Tensor | None
    attends: Attends


@dataclass(frozen=True, eq=False)
class Carried:
    """What a pass leaves to the next: the first `lead` tokens of its rows, by level, and their keys and values."""

    lead: int
    heads: dict[int, Head] = field(default_factory=dict)
    layers: Layers = field(default_factory=dict)


@dataclass
class Pack:
    """Rows to lay out, and the stations of their edits. `coder` knows every fork of the call, so that packs match."""

    subject: Subject
    rows: Sequence[Row]
    stations: Mapping[Edit, Station]
    coder: Coder
    carried: Carried = field(default_factory=lambda: Carried(0))
    leaves: Carried = field(default_factory=lambda: Carried(0))
    """Filled by the pass."""
    reads: list[Read] = field(default_factory=list)
    last_layer: int | None = None
    """Stop behind this layer; None runs them all."""

    @cached_property
    def tries(self) -> list[Trie]:
        """From the bottom up: one for the input, and one wherever further edits begin to be felt."""
        found: list[Trie] = []
        arms = {row.edits: index for index, row in enumerate(self.rows)}  # the last row of each
        for fork in sorted({0, *self.coder.forks.values()}):
            codes = [self.coder.write(row, fork) for row in self.rows]
            below = found[-1] if found else None
            found.append(lay_out(codes, fork, below, self.carried.lead, self.carried.heads.get(fork)))
            if self.leaves.lead:
                donors = [(codes[index], found[-1].paths[index]) for index in arms.values()]
                self.leaves.heads[fork], self._left[fork] = behead(donors, self.leaves.lead)
        return found

    @cached_property
    def _left(self) -> dict[int, Ints]:
        """Indices of the states that are left to the next pass, by level."""
        return {}

    def trie(self, fork: int) -> Trie:
        """The trie in force at the input of layer `fork`."""
        return [trie for trie in self.tries if trie.fork <= fork][-1]

    def levels(self, taps: Mapping[int, Tap] | None = None) -> list[Level]:
        """The tries on the device; `taps` are put in by fork."""
        found: list[Level] = []
        device = self.subject.device
        for trie in self.tries:
            parent = torch.from_numpy(trie.parent).to(device) if found else None
            below = found[-1].origin if found else None
            origin = parent if below is None else below[parent]
            attends = Packed(trie, device, self.carried.layers, [taps[trie.fork]] if taps else [])
            if self.leaves.lead:
                attends.taps.append(Keep(torch.from_numpy(self._left[trie.fork]).to(device), self.leaves.layers))
            found.append(Level(trie.fork, trie.size, parent, origin, attends))
        return found

    def ranges(self, fork: int, spans: Sequence[tuple[int, int]]) -> Ints:
        """Flat indices, one row after the other, of positions `spans[r]` of every row in the trie at `fork`."""
        trie = self.trie(fork)
        parts = [path[start:stop] for path, (start, stop) in zip(trie.paths, spans, strict=True)]
        return np.concatenate(parts) - trie.skip

    def actions(self) -> Actions:
        """What the edits do in this pass."""
        known: dict[Any, slice | Tensor | None] = {}

        def tokens_of(edit: Edit, holders: list[int]) -> slice | Tensor | None:
            key = self.stations[edit].fork, tuple(holders), getattr(edit, "positions", "all")
            if key not in known:
                trie = self.trie(self.stations[edit].fork)
                parts = [trie.paths[index][slice(*reach(edit, self.rows[index]))] for index in holders]
                flat = np.unique(np.concatenate(parts)) - trie.skip
                known[key] = as_tokens(flat[flat >= 0], self.subject.device)
            return known[key]

        return place_edits(self.subject, self.rows, self.stations, tokens_of)


def place_edits(
    subject: Subject,
    rows: Sequence[Row],
    stations: Mapping[Edit, Station],
    tokens_of: Callable[[Edit, list[int]], slice | Tensor | None],
) -> Actions:
    """What the edits of `stations` do, given the tokens that an edit acts on by the rows that hold it."""
    holders: dict[Edit, list[int]] = defaultdict(list)
    arms: dict[tuple[Edit, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        arms[row.edits].append(index)
    lists: dict[tuple[nn.Module, str], dict[tuple[Edit, ...], list[Edit]]] = defaultdict(lambda: defaultdict(list))
    for edits, members in arms.items():
        for edit in edits:
            if edit in stations:
                holders[edit] += members
                lists[stations[edit].module, stations[edit].side][edits].append(edit)
    found: dict[tuple[nn.Module, str], list[Action]] = defaultdict(list)
    like = torch.empty(0, dtype=subject.dtype, device=subject.device)
    for place, of_arms in lists.items():
        for edit in in_order(of_arms.values()):
            tokens = tokens_of(edit, sorted(holders[edit]))
            if tokens is not None:
                found[place].append((tokens, stations[edit].part, delta(edit, place[0], like)))
    return found


def as_tokens(flat: Ints, device: torch.device) -> slice | Tensor | None:
    """Sorted flat indices as a slice where they have no gap, as an index otherwise; None where there are none."""
    if not len(flat):
        return None
    if flat[-1] - flat[0] + 1 == len(flat):
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat).to(device)
