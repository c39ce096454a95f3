"""MELBO as it was published: one vector after the other, one prompt at a time, the whole model run for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from torch import Tensor


class _Reached(Exception):
    """The target layer has been computed."""


def target_of(model: Any, blocks: Any, ids: Tensor, target: int, stop: bool) -> Tensor:
    """Output [tokens, d] of decoder block `target`; `stop` leaves out what comes behind it."""
    found: list[Tensor] = []

    def read(_module: Any, _inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0])
        if stop:
            raise _Reached

    handle = blocks[target].register_forward_hook(read)
    try:
        model(input_ids=ids)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


def train(
    model: Any,
    blocks: Any,
    rows: Sequence[tuple[int, ...]],
    starts: Tensor,
    places: tuple[int, int, int],
    steps: int,
    rate: float,
    stop: bool,
) -> Tensor:
    """Vectors [n, d] from `starts` [n, d] on their spheres, with p = q = 2. `places`: the source layer, at whose MLP
    output they are added, the target layer, and the first token that counts there."""
    source, target, first = places
    prompts = [torch.tensor([row]) for row in rows]
    with torch.no_grad():
        base = [target_of(model, blocks, ids, target, stop).float() for ids in prompts]
    trained = []
    for start in starts:
        radius = start.norm()
        theta = torch.nn.Parameter(start.clone())

        def steer(_module: Any, _inputs: Any, output: Tensor, theta: Tensor = theta) -> Tensor:
            return output + theta.to(output.dtype)

        optimiser = torch.optim.AdamW([theta], lr=rate, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
        handle = blocks[source].mlp.register_forward_hook(steer)
        try:
            for _ in range(steps):
                optimiser.zero_grad()
                for ids, before in zip(prompts, base, strict=True):
                    change = target_of(model, blocks, ids, target, stop).float() - before
                    (-change[first:].norm(dim=1).pow(2).sum().sqrt()).backward()
                assert theta.grad is not None
                theta.grad -= (theta.grad @ theta.data) * theta.data / radius**2
                optimiser.step()
                theta.data = radius * normalize(theta.data, dim=0)
        finally:
            handle.remove()
        trained.append(theta.detach())
    return torch.stack(trained)
