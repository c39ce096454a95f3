"""Rows are laid out so that equal states are one, and every row still finds all of its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.edit import Add, Edit, LowRank, Scale, Site
from experiments.packing import Chunk, Coder, Limits, Row, Trie, behead, chunks, common, lay_out, reach

VECTOR = torch.zeros(4)
EDITS: tuple[Edit, ...] = (
    Add(Site("resid", 0), VECTOR),
    Add(Site("resid", 1), VECTOR, "response"),
    Scale(Site("v", 1), VECTOR, "prompt"),
    Add(Site("resid", 2), VECTOR, "last:2"),
)
FORKS = {EDITS[0]: 1, EDITS[1]: 2, EDITS[2]: 1, EDITS[3]: 3}


@st.composite
def some_rows(draw: st.DrawFn) -> list[Row]:
    """Short rows over few tokens, so that many prefixes are shared."""
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=8)))
        edits = tuple(edit for edit in EDITS if draw(st.booleans()))
        rows.append(Row(tokens, draw(st.integers(0, len(tokens))), edits))
    return rows


def state(row: Row, position: int, fork: int) -> tuple[object, ...]:
    """What decides the state of a token at the input of layer `fork`, said in the plainest way."""
    return tuple(
        (
            row.tokens[at],
            *(edit for edit in row.edits if FORKS[edit] <= fork and at in range(*reach(edit, row))),
        )
        for at in range(position + 1)
    )


@settings(deadline=None, max_examples=60)
@given(some_rows())
def test_states_are_shared_exactly_where_tokens_and_acting_edits_agree(rows: list[Row]) -> None:
    coder = Coder(FORKS)
    for fork in (0, 1, 2, 3):
        trie = lay_out([coder.write(row, fork) for row in rows], fork, None)
        found: dict[int, tuple[object, ...]] = {}
        for row, path in zip(rows, trie.paths, strict=True):
            for position, index in enumerate(path.tolist()):
                assert found.setdefault(index, state(row, position, fork)) == state(row, position, fork)
                assert trie.tokens[index] == row.tokens[position]
                assert trie.depth[index] == position
        assert len(set(found.values())) == len(found) == trie.size
        owned = [index for row, first in trie.groups for index in trie.paths[row][first:].tolist()]
        assert sorted(owned) == list(range(trie.size))


@settings(deadline=None, max_examples=40)
@given(some_rows())
def test_every_token_of_a_level_comes_from_the_same_token_below(rows: list[Row]) -> None:
    coder = Coder(FORKS)
    below: Trie | None = None
    for fork in (0, 1, 2, 3):
        trie = lay_out([coder.write(row, fork) for row in rows], fork, below)
        if below is not None:
            for path, origin in zip(trie.paths, below.paths, strict=True):
                np.testing.assert_array_equal(trie.parent[path], origin)
        below = trie


@settings(deadline=None, max_examples=60)
@given(some_rows(), st.integers(1, 40))
def test_chunks_hold_every_row_once_within_their_limit_and_lead_only_where_the_chunk_before_led(
    rows: list[Row], limit: int
) -> None:
    coder = Coder(FORKS)
    firsts = [len(row.tokens) - 1 for row in rows]
    found = chunks(rows, firsts, coder, Limits(limit))
    assert sorted(index for chunk in found for index in chunk.rows) == list(range(len(rows)))
    before: Chunk | None = None
    for chunk in found:
        assert all(chunk.lead <= firsts[index] for index in chunk.rows)
        head = None
        if chunk.lead:
            assert before is not None
            codes = [coder.write(rows[index], 3) for index in before.rows]
            donors = [pair for pair in zip(codes, codes, strict=True) if len(pair[0]) >= chunk.lead]
            head, _ = behead(donors, chunk.lead)
        trie = lay_out([coder.write(rows[index], 3) for index in chunk.rows], 3, None, chunk.lead, head)
        assert trie.size <= limit or len(chunk.rows) == 1
        before = chunk


def test_a_head_stands_for_the_tokens_in_front() -> None:
    coder = Coder({})
    first = lay_out([coder.write(Row((1, 2, 3, 4), 2), 0)], 0, None)
    head, index = behead([(coder.write(Row((1, 2, 3, 4), 2), 0), first.paths[0])], 2)
    assert index.tolist() == [0, 1]
    rows = [Row((1, 2, 5), 2), Row((1, 2, 6, 7), 2)]
    trie = lay_out([coder.write(row, 0) for row in rows], 0, None, 2, head)
    assert (trie.skip, trie.size) == (2, 3)
    assert [path.tolist() for path in trie.paths] == [[0, 1, 2], [0, 1, 3, 4]]
    assert trie.tokens.tolist() == [5, 6, 7]
    assert trie.depth.tolist() == [2, 2, 3]


def test_chunks_end_where_texts_part() -> None:
    texts = [(1, 2, at, 7, 8, end) for at in (10, 11, 12, 13) for end in (20, 21)]
    rows = [Row(text, 6) for text in texts]
    found = chunks(rows, [5] * 8, Coder({}), Limits(13))
    assert [[rows[index].tokens[2] for index in chunk.rows] for chunk in found] == [[10, 10, 11, 11], [12, 12, 13, 13]]
    assert [chunk.lead for chunk in found] == [0, 2]


def test_cells_limit_rows_that_share_everything() -> None:
    rows = [Row((1, 2, 3), 3)] * 10
    assert [len(chunk.rows) for chunk in chunks(rows, [2] * 10, Coder({}), Limits(100, 12, 1))] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("positions", "span"),
    [("all", (0, 6)), ("prompt", (0, 4)), ("response", (4, 6)), ("last:3", (1, 4)), ("last:9", (0, 4))],
)
def test_positions_are_counted_from_the_prompt(positions: str, span: tuple[int, int]) -> None:
    row = Row((1, 2, 3, 4, 5, 6), 4)
    assert reach(Add(Site("resid", 0), VECTOR, positions), row) == span
    assert reach(LowRank("m", VECTOR, VECTOR), row) == (0, 6)


def test_common_is_the_length_of_the_common_prefix() -> None:
    left = np.array([1, 2, 3])
    assert [common(left, np.array(right)) for right in ([1, 2, 3], [1, 2], [1, 2, 9, 3], [4], [])] == [3, 2, 2, 0, 0]
