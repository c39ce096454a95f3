"""Breadth: how many of the other values an intervention moved, significantly after correction for their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from evals import stats
from evals.stats import Array
from evals.table import complete, occupied

FEWEST = 5
"""Families without which a value is not tested: it could hardly be found, and would cost all others their power. The
number of families is known before any effect is, so leaving values out by it biases no test."""


@dataclass(frozen=True)
class Shift:
    """What happened to one other value."""

    name: str
    mean: float
    """Mean effect over items and seeds, in the eval's unit."""
    p: float
    """Two-sided, as a row's: clustered by family, crossed with seeds, guarded against skewness."""
    p_holm: float
    families: int


@dataclass(frozen=True)
class Breadth:
    """All values that were tested, in the order they were given."""

    tested: tuple[Shift, ...]
    alpha: float

    @property
    def shifted(self) -> tuple[Shift, ...]:
        """Those that moved, the furthest first. That any of them did not has probability `alpha` at most."""
        return tuple(sorted((one for one in self.tested if one.p_holm < self.alpha), key=lambda one: -abs(one.mean)))

    @property
    def count(self) -> int | None:
        """How many moved; None where none could be tested."""
        return len(self.shifted) if self.tested else None

    @property
    def of(self) -> int | None:
        """How many were tested; None for none."""
        return len(self.tested) or None

    @property
    def share(self) -> float | None:
        """`count` / `of`."""
        return len(self.shifted) / len(self.tested) if self.tested else None

    def told(self) -> str:
        """`trust +0.31, privacy -0.12`."""
        return ", ".join(f"{one.name} {one.mean:+.2g}" for one in self.shifted)


def breadth(others: ArrayLike, members: Array, names: Sequence[str], alpha: float = 0.05) -> Breadth:
    """Which of k other values moved: effects [S, n, k] (NaN = unscored), families [n, C], k names.

    A value is tested on the items scored for it under every seed, where these are of `FEWEST` families or more. Holm's
    correction (1979) over the values rather than Benjamini and Hochberg's: one item speaks for several values, with
    either sign, so that the tests depend on each other in every way, for which Benjamini and Hochberg's makes no
    promise; and every name is a claim of its own, which holds for all names at once. The count errs low.
    """
    effects = np.moveaxis(np.asarray(others, float), -1, 0)
    found: dict[int, tuple[float, float, int]] = {}
    for columns, kept in _alike(effects):
        rest = occupied(members[kept])
        if rest.shape[1] < FEWEST:
            continue
        part = effects[columns][..., kept]
        estimate = stats.crossed_mean(part, rest)
        p = stats.guarded_p_value(estimate, part, rest)
        found |= {
            column: (float(m), float(q), rest.shape[1]) for column, m, q in zip(columns, estimate.mean, p, strict=True)
        }
    order = sorted(found)
    adjusted = stats.holm([found[column][1] for column in order])
    tested = [
        Shift(names[column], found[column][0], found[column][1], float(p_holm), found[column][2])
        for column, p_holm in zip(order, adjusted, strict=True)
    ]
    return Breadth(tuple(tested), alpha)


def _alike(effects: Array) -> Iterator[tuple[list[int], np.ndarray]]:
    """(values, [n] bool): values scored on the same items, which share a design and are tested in one step."""
    alike: dict[bytes, list[int]] = {}
    for column, one in enumerate(effects):
        alike.setdefault(complete(one).tobytes(), []).append(column)
    for mask, columns in alike.items():
        yield columns, np.frombuffer(mask, dtype=bool)
