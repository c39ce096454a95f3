"""Rows into packed token tries.

A pass computes every *state* once. The state of a token below layer l is decided by the tokens up to it and by the
edits below l that act on them, so rows form a trie whose elements are (token, edits acting on it). The trie is laid out
in one flat sequence of T tokens without padding. Where further edits begin, a finer trie takes over: a level. Each
token of a level comes from exactly one token of the level below, its parent.

Everything here is numpy on the host; `experiments/attention.py` and `experiments/forward.py` put it on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
class Trie:
    """A laid-out trie of T tokens.

    `paths[r]` is the flat index of every token of row r. `groups` are the (row, first) whose tokens from position
    `first` on are new: they are laid out there, and attend to the whole path of that row. `parent` [T] points into the
    level below (empty for the lowest). `fork` is the decoder layer at whose input the trie takes over.
    """

    fork: int
    tokens: Ints
    depth: Ints
    parent: Ints
    paths: list[Ints]
    groups: list[tuple[int, int]]

    @property
    def size(self) -> int:
        """T."""
        return len(self.tokens)


def lay_out(codes: Sequence[Ints], fork: int, below: Trie | None) -> Trie:
    """The trie of rows written as `codes`, in lexicographic order: each row is laid out behind the ones it shares most
    with."""
    keys = [row.astype(">i8").tobytes() for row in codes]
    known: dict[bytes, Ints] = {}
    groups: list[tuple[int, int]] = []
    last: tuple[Ints, Ints] = (np.empty(0, np.int64), np.empty(0, np.int64))
    total = 0
    for row in sorted(range(len(codes)), key=keys.__getitem__):
        if keys[row] in known:
            continue
        shared = common(last[0], codes[row])
        new = len(codes[row]) - shared
        path = np.concatenate([last[1][:shared], np.arange(total, total + new)])
        known[keys[row]], last = path, (codes[row], path)
        if new:
            groups.append((row, shared))
        total += new
    paths = [known[key] for key in keys]
    tokens, depth, parent = (np.empty(total, np.int64) for _ in range(3))
    for row, first in groups:
        own = paths[row][first:]
        tokens[own] = codes[row][first:] & 0xFFFFFFFF
        depth[own] = np.arange(first, len(paths[row]))
        if below is not None:
            parent[own] = below.paths[row][first:]
    return Trie(fork, tokens, depth, parent if below is not None else parent[:0], paths, groups)


def common(left: Ints, right: Ints) -> int:
    """Length of the common prefix."""
    n = min(len(left), len(right))
    different = left[:n] != right[:n]
    return int(different.argmax()) if different.any() else n


def levels(rows: Sequence[Row], forks: Mapping[Edit, int]) -> list[Trie]:
    """The tries of `rows` from the bottom up: one for the input, and one wherever further edits begin to be felt."""
    used = {forks[edit] for row in rows for edit in row.edits if edit in forks}
    coder = Coder(forks)
    found: list[Trie] = []
    for fork in sorted({0} | used):
        written: dict[Row, Ints] = {}
        codes = []
        for row in rows:
            if row not in written:
                written[row] = coder.write(row, fork)
            codes.append(written[row])
        found.append(lay_out(codes, fork, found[-1] if found else None))
    return found


def chunks(
    rows: Sequence[Row], forks: Mapping[Edit, int], max_tokens: float, cells: float = inf, extra: int = 0
) -> Iterator[list[int]]:
    """Row indices in chunks whose topmost trie holds at most `max_tokens` tokens (a single longer row is a chunk).

    Rows that share a prefix are neighbours, and rows of different arms about the same text stay together, because they
    share the layers below their edits. `cells` bounds the tokens without sharing, `extra` more of them in each row.
    """
    coder = Coder(forks)
    top = max(forks.values(), default=0)
    chunk: list[int] = []
    latest: dict[tuple[Edit, ...], Ints] = {}
    previous = np.empty(0, np.int64)
    room, left = max_tokens, cells
    for index in sorted(range(len(rows)), key=lambda index: rows[index].tokens):
        codes = coder.write(rows[index], top)
        shared = max(common(previous, codes), common(latest.get(rows[index].edits, previous), codes))
        if chunk and (len(codes) - shared > room or len(codes) + extra > left):
            yield chunk
            chunk, latest, room, left, shared = [], {}, max_tokens, cells, 0
        chunk.append(index)
        room -= len(codes) - shared
        left -= len(codes) + extra
        previous = latest[rows[index].edits] = codes
    if chunk:
        yield chunk
