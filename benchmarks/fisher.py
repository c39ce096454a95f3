"""How long the linear algebra of `fisher` takes: every kind and dual form, beside the dense d x d solve.

    python -m benchmarks.fisher [n] [repeats] [d]

n pairs (200) of gradients of width d (4096), in double precision as in a fit; medians of `repeats` (5), the dense solve
once for each form. `differs` is the relative difference of the two results. Gradients are random, with a common part:
time does not depend on what they say.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch

from experiments.interventions.fisher import FLOOR, Fisher, Kind

DUALS = ("none", "mean", "positive", "negative", "difference")


class Shown:
    """Gradients of n pairs, as evidence gives them."""

    site = "resid@0"

    def __init__(self, n: int, d: int) -> None:
        random = torch.Generator().manual_seed(0)
        common, spread = torch.randn(2, 1, d, generator=random).unbind(0)
        self.sides = tuple(sign * common + spread * torch.randn(n, d, generator=random) for sign in (-1, 1))

    def gradients(self, _: Any) -> tuple[torch.Tensor, ...]:
        """[n, d] each: of the positive and of the negative side."""
        return self.sides


def dense(gradients: torch.Tensor, kind: Kind, damping: float) -> torch.Tensor:
    """(F + lambda I)^-1 g with F [d, d] written out."""
    n, d = gradients.shape
    rows = gradients - gradients.mean(0) if kind == "covariance" else gradients
    fisher = rows.T @ rows / (n - 1 if kind == "covariance" else n)
    if kind == "improved":
        fisher /= 1 + FLOOR
    fisher.diagonal().add_(damping * fisher.trace() / d)
    return torch.linalg.solve(fisher, gradients.mean(0))


def dense_form(shown: Shown, made: Fisher) -> torch.Tensor:
    """What `Fisher.direction` gives, by dense solves."""
    positive, negative = (side.double() for side in shown.sides)
    if made.dual == "none":
        return dense(negative - positive, made.kind, made.damping)
    sides = {"positive": [-positive], "negative": [negative]}.get(made.dual, [-positive, negative])
    found = [dense(side, made.kind, made.damping) for side in sides]
    return found[0] if len(found) == 1 else found[0] - found[1] if made.dual == "difference" else found[0] + found[1]


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds, and what came out."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def main() -> None:
    """Print the table."""
    given = [int(each) for each in sys.argv[1:]]
    n, repeats, d = given + [200, 5, 4096][len(given) :]
    shown: Any = Shown(n, d)
    print(f"n = {n}, d = {d}, {torch.get_num_threads()} threads, median of {repeats}")
    print("kind        dual         fisher s    dense s    ratio  differs")
    slowest = 0.0
    for kind in get_args(Kind):
        for dual in DUALS:
            made = Fisher(kind=kind, dual=dual)
            runs = [timed(partial(made.direction, shown, 0)) for _ in range(repeats)]
            ours, found = statistics.median(seconds for seconds, _ in runs), runs[0][1]
            theirs, expected = timed(partial(dense_form, shown, made))
            differs = ((found - expected).norm() / expected.norm()).item()
            slowest = max(slowest, ours)
            print(f"{kind:11} {dual:11} {ours:9.4f}  {theirs:9.3f}  {theirs / ours:6.0f}x  {differs:.1e}", flush=True)
    print(f"slowest form: {slowest:.3f} s")


if __name__ == "__main__":
    main()
