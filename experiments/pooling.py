"""Where a row is read: one of its tokens, or the mean over its response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from experiments.acting import EngineError
from experiments.edit import Pool

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.packing import Row

Span = tuple[int, int]


def need_prompt(rows: Sequence[Row]) -> None:
    for index, row in enumerate(rows):
        if row.n_prompt < 1:
            raise EngineError(f"row {index}: n_prompt is {row.n_prompt}; at least one prompt token is needed to score")


def pooled(row: Row, pool: Pool) -> Span:
    spans = {
        "last": (len(row.tokens) - 1, len(row.tokens)),
        "prompt_last": (row.n_prompt - 1, row.n_prompt),
        "response_mean": (row.n_prompt, len(row.tokens)),
    }
    if pool not in spans:
        raise EngineError(f"pool {pool!r}; allowed: {', '.join(spans)}")
    start, stop = spans[pool]
    if not 0 <= start < stop:
        raise EngineError(
            f"pool {pool!r} of a row of {len(row.tokens)} tokens, {row.n_prompt} of them prompt: there are none"
        )
    return start, stop


def mean_into(out: Tensor, rows: Sequence[int], spans: Sequence[Span], values: Tensor) -> None:
    """out[rows[i]] = mean of the i-th piece of `values` [k, d], as long as spans[i]."""
    values = values.float().cpu()
    sizes = torch.tensor([stop - start for start, stop in spans])
    owner = torch.repeat_interleave(torch.tensor(rows), sizes)
    out.index_add_(0, owner, values)
    out[rows] /= sizes[:, None]


def split_into(out: list[Tensor], rows: Sequence[int], spans: Sequence[Span], values: Tensor) -> None:
    """out[rows[i]] = the i-th piece of `values` [k, d], as long as spans[i]."""
    for row, piece in zip(rows, values.split([stop - start for start, stop in spans]), strict=True):
        out[row] = piece
