"""Rows into packed token tries.

A pass computes every *state* once. The state of a token below layer l is decided by the tokens up to it and by the
edits below l that act on them, so rows form a trie whose elements are (token, edits acting on it). The trie is laid out
in one flat sequence of T tokens without padding. Where further edits begin, a finer trie takes over: a level. Each
token of a level comes from exactly one token of the level below, its parent.

Everything here is numpy on the host; `experiments/attention.py` and `experiments/forward.py` put it on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from experiments.edit import Dense, Edit, LowRank, Prompt, last_n

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One token sequence and what is done to the model while it is read.

    The first `n_prompt` tokens are the prompt, the others the response. Rows that share an arm should share the very
    `Edit` objects: states are shared by identity of edits, not by their values. `Prompt` edits are the renderer's.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    edits: tuple[Edit, ...] = ()
    masked: frozenset[int] = frozenset()
    """Positions of response tokens at which training takes no loss; nothing else looks at them."""


def reach(edit: Edit, row: Row) -> tuple[int, int]:
    """First position of `row` that `edit` acts on, and the position behind the last one.

    `last:N` means the last N prompt tokens. Weight edits act on every token.
    """
    if isinstance(edit, (LowRank, Dense, Prompt)) or edit.positions == "all":
        return 0, len(row.tokens)
    if edit.positions == "response":
        return row.n_prompt, len(row.tokens)
    n = last_n(edit.positions)
    return (0 if n is None else max(0, row.n_prompt - n)), row.n_prompt


@dataclass
class Coder:
    """Writes a row as integers, one per token, equal exactly where token and acting edits are equal.

    `forks` gives the first decoder layer that feels an edit; edits missing from it act on nothing.
    """

    forks: Mapping[Edit, int]
    _sets: dict[tuple[Edit, ...], int] = field(default_factory=lambda: {(): 0})

    def write(self, row: Row, upto: int) -> Ints:
        """[len(tokens)] codes that tell apart what layers up to `upto` tell apart."""
        codes = np.fromiter(row.tokens, np.int64, len(row.tokens))
        active = [(edit, *reach(edit, row)) for edit in row.edits if self.forks.get(edit, upto + 1) <= upto]
        cuts = sorted({0, len(codes), *(cut for _, *ends in active for cut in ends)})
        for start, stop in pairwise(cuts):
            acting = tuple(edit for edit, first, end in active if first <= start and stop <= end)
            codes[start:stop] += self._sets.setdefault(acting, len(self._sets)) << 32
        return codes


@dataclass(frozen=True, eq=False)
class Head:
    """Prefixes that were computed in an earlier pass, at one level: `paths` by the bytes of their codes, over `size`
    states in all."""

    paths: Mapping[bytes, Ints] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, eq=False)
class Trie:
    """A laid-out trie of T tokens, behind a head of `skip` states that are known already.

    `paths[r]` is the index of every token of row r: 0 to skip - 1 in the head, skip to skip + T - 1 here. `groups` are
    the (row, first) whose tokens from position `first` on are laid out here, and attend to the whole path of that row.
    `parent` [T] points into the level below (empty for the lowest). `fork` is the decoder layer at whose input the trie
    takes over.
    """

    fork: int
    skip: int
    tokens: Ints
    depth: Ints
    parent: Ints
    paths: list[Ints]
    groups: list[tuple[int, int]]

    @property
    def size(self) -> int:
        """T."""
        return len(self.tokens)


def lay_out(codes: Sequence[Ints], fork: int, below: Trie | None, lead: int = 0, head: Head | None = None) -> Trie:
    """The trie of rows written as `codes`, in lexicographic order: each row lies behind the ones it shares most with.

    The first `lead` tokens of every row are in `head`.
    """
    head = head or Head()
    keys = [_key(row) for row in codes]
    known: dict[bytes, Ints] = {}
    groups: list[tuple[int, int]] = []
    last: tuple[Ints, Ints] = (np.empty(0, np.int64), np.empty(0, np.int64))
    total = head.size
    for row in sorted(range(len(codes)), key=keys.__getitem__):
        if keys[row] in known:
            continue
        shared = common(last[0], codes[row])
        start = last[1][:shared]
        if shared < lead:
            shared, start = lead, head.paths[_key(codes[row][:lead])]
        new = len(codes[row]) - shared
        path = np.concatenate([start, np.arange(total, total + new)])
        known[keys[row]], last = path, (codes[row], path)
        if new:
            groups.append((row, shared))
        total += new
    paths = [known[key] for key in keys]
    tokens, depth, parent = (np.empty(total - head.size, np.int64) for _ in range(3))
    for row, first in groups:
        own = paths[row][first:] - head.size
        tokens[own] = codes[row][first:] & 0xFFFFFFFF
        depth[own] = np.arange(first, len(paths[row]))
        if below is not None:
            parent[own] = below.paths[row][first:] - below.skip
    return Trie(fork, head.size, tokens, depth, parent if below is not None else parent[:0], paths, groups)


def behead(donors: Sequence[tuple[Ints, Ints]], lead: int) -> tuple[Head, Ints]:
    """The head that the first `lead` tokens of rows (codes, path) make, and the indices [size] of its states here."""
    index = np.unique(np.concatenate([path[:lead] for _, path in donors]))
    found = {_key(codes[:lead]): index.searchsorted(path[:lead]) for codes, path in donors}
    return Head(found, len(index)), index


def _key(codes: Ints) -> bytes:
    return codes.astype(">i8").tobytes()


def common(left: Ints, right: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(left), len(right))
    different = left[:n] != right[:n]
    return int(different.argmax()) if different.any() else n


@dataclass(frozen=True)
class Chunk:
    """Rows of one pass. The first `lead` tokens of each are, with equal edits, those of a row of the chunk before."""

    rows: list[int]
    lead: int


@dataclass
class Limits:
    """Of a chunk: packed tokens of its topmost trie, and tokens without sharing plus `extra` for each row."""

    max_tokens: float
    cells: float = inf
    extra: int = 0


def chunks(rows: Sequence[Row], firsts: Sequence[int], coder: Coder, limits: Limits) -> list[Chunk]:
    """All rows in chunks within `limits`; a single row that exceeds them is a chunk.

    Rows that share a prefix are neighbours, and rows of different arms about the same text stay together, because they
    share the layers below their edits. What is wanted of row r is at `firsts[r]` and behind, so no lead goes past it.
    """
    top = max(coder.forks.values(), default=0)
    order = sorted(range(len(rows)), key=lambda index: rows[index].tokens)
    codes = [coder.write(rows[index], top) for index in order]
    bare = [codes_of & 0xFFFFFFFF for codes_of in codes]
    shares = [0, *(common(left, right) for left, right in pairwise(bare))]
    found: list[Chunk] = []
    before: dict[tuple[Edit, ...], Ints] = {}
    start = 0
    while start < len(order):
        filling = _Filling(limits, before)
        stop = start
        while stop < len(order) and filling.take(order[stop], rows[order[stop]], codes[stop], firsts[order[stop]]):
            stop += 1
        if stop < len(order):  # better where texts part than in the midst of their arms
            cut = min(range((start + stop) // 2 + 1, stop + 1), key=lambda at: (shares[at], -at))
            filling = _Filling(limits, before)
            for at in range(start, cut):
                filling.take(order[at], rows[order[at]], codes[at], firsts[order[at]])
            stop = cut
        found.append(Chunk(filling.rows, filling.lead))
        before, start = filling.latest, stop
    return found


class _Filling:
    """A chunk being filled. `before` holds each arm's last row in the chunk before."""

    def __init__(self, limits: Limits, before: dict[tuple[Edit, ...], Ints]) -> None:
        self.limits = limits
        self.before = before
        self.rows: list[int] = []
        self.latest: dict[tuple[Edit, ...], Ints] = {}
        self.previous = np.empty(0, np.int64)
        self.lead = 0
        self.size = 0
        self.cells = 0

    def take(self, index: int, row: Row, codes: Ints, first: int) -> bool:
        """Put a row in, if it fits. A shorter lead makes the chunk compute the rest of it for every arm."""
        arm = row.edits
        donor = self.before.get(arm)
        lead = 0 if donor is None else min(first, common(donor, codes))
        if self.rows:
            lead = min(lead, self.lead)
        shared = max(lead, common(self.previous, codes), common(self.latest.get(arm, self.previous), codes))
        again = (self.lead - lead) * len(self.latest)
        size, cells = self.size + len(codes) - shared + again, self.cells + len(codes) + self.limits.extra
        if self.rows and (size > self.limits.max_tokens or cells > self.limits.cells):
            return False
        self.lead, self.size, self.cells = lead, size, cells
        self.rows.append(index)
        self.previous = self.latest[arm] = codes
        return True
