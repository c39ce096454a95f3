"""What a change at a source layer does further down: changes of target activations, and their derivatives.

Prompts are read at chosen tokens and sites, once as they are, Z(0), and then under any number of edits, Z(theta).
Every prompt under every edit is a row of one batch: the layers below the source are computed once for all of them, and
the pass ends behind the highest target. A *mean change* is the average of Z(theta) - Z(0) over a prompt's tokens and
then over prompts, the targets' concatenated: D(theta), [D] with D = targets x width (what deep causal transcoding calls
the change in target activations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.contrast import FitError
from experiments.edit import Edit, Site
from experiments.engine import Row

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine

TOKENS = 2048  # of one differentiable pass: what keeps its activations within a few hundred MB for a small model

Arm = tuple[Edit, ...]
Arms = Callable[["Tensor"], "list[Arm]"]
"""Vectors [n, d] -> the edits that put each of them in."""


@dataclass(frozen=True)
class Cell:
    """One prompt under one arm: their indices, and Z(theta) - Z(0) [tokens, width] float32 for each target."""

    arm: int
    prompt: int
    changes: tuple[Tensor, ...]

    def mean(self) -> Tensor:
        """[D]: averaged over tokens, the targets' one after the other."""
        return torch.cat([change.mean(0) for change in self.changes])


@dataclass(frozen=True)
class Downstream:
    """Prompts, the tokens and targets they are read at, and Z(0) there. Make one with `downstream`."""

    engine: Engine
    prompts: tuple[Row, ...]
    targets: tuple[Site, ...]
    spans: tuple[range, ...]
    base: tuple[tuple[Tensor, ...], ...]
    """For each prompt and target [tokens, width] float32."""

    def only(self, indices: Sequence[int]) -> Downstream:
        """The same for some of the prompts."""
        spans, base = tuple(self.spans[i] for i in indices), tuple(self.base[i] for i in indices)
        return Downstream(self.engine, tuple(self.prompts[i] for i in indices), self.targets, spans, base)

    def changes(self, arms: Sequence[Arm]) -> Iterator[list[Cell]]:
        """Every prompt under every arm, a pass of at most `TOKENS` tokens at a time. Differentiable."""
        cells = [(arm, prompt) for prompt in range(len(self.prompts)) for arm in range(len(arms))]
        for part in self._parts(cells):
            rows = [Row(self.prompts[i].tokens, self.prompts[i].n_prompt, arms[arm]) for arm, i in part]
            spans = [self.spans[i] for _, i in part]
            _, at = self.engine.trace(rows, spans, self.targets, above=False)
            split = [at[site].float().split([len(span) for span in spans]) for site in self.targets]
            yield [
                Cell(arm, i, tuple(z - base for z, base in zip(pieces, self.base[i], strict=True)))
                for (arm, i), *pieces in zip(part, *split, strict=True)
            ]

    def _parts(self, cells: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        part: list[tuple[int, int]] = []
        room = TOKENS
        for cell in cells:
            size = len(self.prompts[cell[1]].tokens)
            if part and size > room:
                yield part
                part, room = [], TOKENS
            part.append(cell)
            room -= size
        yield part

    def mean_changes(self, arms: Sequence[Arm]) -> Tensor:
        """D of every arm, [n, D] float32, without gradients."""
        with torch.no_grad():
            return self._mean(arms, lambda _: None)

    def pull(self, put: Arms, at: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """D(theta) [n, D] and the vector-Jacobian products J(theta)'u [n, d] at vectors `at` [n, d], u = `along`."""
        theta = at.detach().clone().requires_grad_()

        def back(cells: list[Cell]) -> None:
            self._dot(cells, along).backward()

        changes = self._mean(put(theta), back)
        assert theta.grad is not None
        return changes, theta.grad

    def push(self, put: Arms, along: Tensor) -> Tensor:
        """Jacobian-vector products J(0)v [n, D] for vectors `along` [n, d].

        J'w is linear in w, so that the derivative of <J'w, v> with respect to w is Jv.
        """
        theta = torch.zeros_like(along).requires_grad_()
        dual = self._duals(len(along), along.device)
        found = torch.zeros_like(dual)

        def back(cells: list[Cell]) -> None:
            (pulled,) = torch.autograd.grad(self._dot(cells, dual), theta, create_graph=True)
            found.add_(torch.autograd.grad((pulled * along).sum(), dual)[0])

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
            self._mean(put(theta), back)
        return found

    def bend(self, put: Arms, along: Tensor, duals: Tensor) -> tuple[Tensor, Tensor]:
        """With H = D''(0): H(v, v) [n, D], and H(u, v, .) [n, d], for v = `along` [n, d] and u = `duals` [n, D]."""
        theta = torch.zeros_like(along).requires_grad_()
        dual = duals.detach().clone().requires_grad_()
        inner, outer = torch.zeros_like(along), torch.zeros_like(dual)

        def back(cells: list[Cell]) -> None:
            (pulled,) = torch.autograd.grad(self._dot(cells, dual), theta, create_graph=True)
            (bent,) = torch.autograd.grad((pulled * along).sum(), theta, create_graph=True)
            inner.add_(bent.detach())
            outer.add_(torch.autograd.grad((bent * along).sum(), dual)[0])

        with sdpa_kernel(SDPBackend.MATH):
            self._mean(put(theta), back)
        return outer, inner

    def _duals(self, n: int, device: torch.device) -> Tensor:
        width = sum(change.shape[-1] for change in self.base[0])
        return torch.zeros(n, width, device=device, requires_grad=True)

    def _dot(self, cells: Sequence[Cell], duals: Tensor) -> Tensor:
        """The cells' share of the sum over arms of <u, D(theta)>."""
        return torch.stack([duals[cell.arm] @ cell.mean() for cell in cells]).sum() / len(self.prompts)

    def _mean(self, arms: Sequence[Arm], back: Callable[[list[Cell]], None]) -> Tensor:
        found: list[Tensor | float] = [0.0] * len(arms)
        for part in self.changes(arms):
            back(part)
            for cell in part:
                found[cell.arm] = found[cell.arm] + cell.mean().detach() / len(self.prompts)
        return torch.stack([torch.as_tensor(each) for each in found])


def downstream(engine: Engine, prompts: Sequence[Row], targets: Sequence[Site], tokens: str | int) -> Downstream:
    """`prompts` as they are without edits. `tokens` is `all`, `last:N` or the first position that counts, from the end
    where negative. Raises FitError for a start behind a prompt's end.
    """
    spans = tuple(range(start(tokens, len(row.tokens)), len(row.tokens)) for row in prompts)
    zero = torch.zeros((), device=engine.subject.device)
    bare = Downstream(engine, tuple(prompts), tuple(targets), spans, ((zero,) * len(targets),) * len(prompts))
    with torch.no_grad():
        found = {cell.prompt: cell.changes for part in bare.changes([()]) for cell in part}
    return Downstream(engine, bare.prompts, bare.targets, spans, tuple(found[i] for i in range(len(prompts))))


def start(tokens: str | int, length: int) -> int:
    """First position of a prompt of `length` tokens that `tokens` means. Raises FitError for one behind its end."""
    if isinstance(tokens, str):
        tokens = 0 if tokens == "all" else -int(tokens.removeprefix("last:"))
    if tokens >= length:
        raise FitError(f"tokens {tokens}: a prompt has only {length}; start earlier, or count from the end (-3)")
    return max(0, length + tokens) if tokens < 0 else tokens
