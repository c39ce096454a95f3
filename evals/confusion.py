"""Which data moved which preference: students by what their data were to hand on, against all that was measured.

The cells are effects of one setting's students, one row a trait. Data that hand on what they should have their own
trait moved more than the others' traits are, whatever all of them moved alike. That is tested by permutation: under the
null the traits are labels that any of the datasets could bear, so the sum over the diagonal is compared with that of
every other assignment of traits to datasets. What a control student moves drops out of it, because every assignment
uses every column once. Data drawn anew for each seed are relabelled seed by seed; data shared by all seeds as one,
because their luck is shared too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.stats import Array

MOST = 20_000
"""Assignments that are enumerated; beyond it as many are drawn."""


@dataclass(frozen=True)
class Confusion:
    """One setting's students on one eval."""

    eval: str
    student: str
    """The setting, without its data."""
    traits: tuple[str, ...]
    """Rows: what each dataset was to hand on."""
    names: tuple[str, ...]
    """Columns: everything the eval measures, the traits first."""
    cells: tuple[tuple[float | None, ...], ...]
    """Mean effect over seeds and test items, against the control student where there is one."""
    seeds: int
    excess: float | None
    """How much more a dataset moved its own trait than the other datasets' traits, on average."""
    p: float | None
    """One-sided, of no such excess; None with one trait."""
    smallest: float | None
    """The smallest p that so few datasets could give."""


def confusion(
    name: str, student: str, rows: Mapping[str, Mapping[str, Array]], shared: bool, seed: int = 0
) -> Confusion:
    """From `rows[trait][name]`, mean effects [S] by seed. `shared`: the seeds learned from the same data.

    Rows whose seeds differ keep the seeds that all have, in order. With one trait nothing can be permuted.
    """
    traits = tuple(rows)
    names = traits + tuple(sorted({each for row in rows.values() for each in row} - set(traits)))
    seeds = min(len(values) for row in rows.values() for values in row.values())
    cells = np.array(
        [[rows[trait].get(each, np.full(seeds, np.nan))[:seeds] for each in names] for trait in traits], dtype=float
    )  # [D, K, S]
    square = cells[:, : len(traits)]
    shown = tuple(tuple(_plain(value) for value in row) for row in cells.mean(-1))
    if len(traits) < 2 or np.isnan(square).any():
        return Confusion(name, student, traits, names, shown, seeds, None, None, None)
    p, smallest = permutation_p(square, shared, seed)
    mean = square.mean(-1)
    diagonal = np.trace(mean) / len(traits)
    rest = (mean.sum() - np.trace(mean)) / (len(traits) * (len(traits) - 1))
    return Confusion(name, student, traits, names, shown, seeds, float(diagonal - rest), p, smallest)


def permutation_p(square: Array, shared: bool, seed: int = 0) -> tuple[float, float]:
    """(p, the smallest possible p) of the diagonal sum of `square` [D, D, S], one-sided, identity included.

    Exact where there are at most MOST assignments, else from MOST draws with the identity as one more.
    """
    count, _, seeds = square.shape
    orders = np.array(list(itertools.permutations(range(count)))) if count <= 7 else _drawn(count, seed)
    sums = square[np.arange(count)[None, :], orders].sum(1)  # [P, S]
    observed = np.trace(square.sum(-1)) if seeds else 0.0
    slack = 1e-12 * max(1.0, abs(float(observed)))
    if shared or seeds == 1:
        totals = sums.sum(1)
        return float((totals >= observed - slack).mean()), 1 / len(orders)
    if len(orders) ** seeds <= MOST:
        totals = np.array([sum(each) for each in itertools.product(*sums.T)])
        return float((totals >= observed - slack).mean()), 1 / len(totals)
    rng = np.random.default_rng(seed)
    totals = sum((sums[rng.integers(len(orders), size=MOST), s] for s in range(seeds)), np.zeros(MOST))
    return float(((totals >= observed - slack).sum() + 1) / (MOST + 1)), 1 / (MOST + 1)


def _drawn(count: int, seed: int) -> Array:
    """The identity and MOST - 1 random orders."""
    rng = np.random.default_rng(seed)
    return np.stack([np.arange(count), *(rng.permutation(count) for _ in range(MOST - 1))])


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def told(one: Confusion) -> str:
    """What the permutation test says, in a sentence."""
    if one.p is None or one.excess is None:
        return "one trait, or cells without a number: nothing to permute"
    return (
        f"own trait moved {one.excess:+.3f} more than the others' traits; permutation p = {one.p:.3g} "
        f"(smallest possible {one.smallest:.2g}, {len(one.traits)} datasets, {one.seeds} seeds)"
    )
