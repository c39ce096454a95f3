"""The sweep as people write it today: a hook on one layer, and one pass over the rows for every vector and dose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 32


@contextmanager
def steered(block: Any, vector: Tensor, dose: float) -> Iterator[None]:
    """Add `dose * vector` to what the decoder layer `block` puts out."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + dose * vector, *output[1:])
        return output + dose * vector

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def log_odds(model: Any, rows: Sequence[tuple[int, ...]], yes: Tensor, no: Tensor, pad: int) -> Tensor:
    """log p(yes) - log p(no) of the token behind each row, [n]: left-padded batches in the order given."""
    found = []
    for at in range(0, len(rows), BATCH):
        batch = rows[at : at + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()
        found.append(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1))
    return torch.cat(found)


def sweep(
    model: Any,
    block: Any,
    rows: Sequence[tuple[int, ...]],
    arms: Sequence[tuple[Tensor, float]],
    yes: Sequence[int],
    no: Sequence[int],
    pad: int,
) -> Tensor:
    """[arms, rows] log-odds, one arm (vector, dose) after the other."""
    with torch.inference_mode():
        results = []
        for vector, dose in arms:
            with steered(block, vector, dose):
                results.append(log_odds(model, rows, torch.tensor(yes), torch.tensor(no), pad))
        return torch.stack(results)
