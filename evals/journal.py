"""The score by which research journal 004 ranked its methods, for comparison with its tables; no leaderboard uses it.

    x = sign(c) log(1 + |c|); slope, r2, p of a least-squares line of y on x, over the doses whose y is a number
    B = |slope| r2 valid^2                    (tables to 2025-09-26, and the first 23 rows of the last)
    C = |slope| (max y - min y) r2 valid^2    (its other 56 rows: another quantity, printed in the same column)

y is a log-ratio in nats, valid the share of the doses at which it is a number. Why nothing is ranked by it:
docs/journal_score.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

FEWEST = 3
"""Doses without which the journal gave no score."""


class JournalError(ValueError):
    """Doses and values that are no dose-response curve."""


@dataclass(frozen=True)
class JournalScore:
    """A row of the journal's tables; NaN where it had NaN."""

    slope: float
    """Nats for a step of 1 in sign(c) log(1 + |c|)."""
    r2: float
    valid: float
    p: float
    low: float
    high: float

    @property
    def b(self) -> float:
        """|slope| r2 valid^2."""
        return abs(self.slope) * self.r2 * self.valid**2

    @property
    def c(self) -> float:
        """|slope| (max - min) r2 valid^2."""
        return self.b * (self.high - self.low)


def symlog(doses: ArrayLike) -> NDArray[np.float64]:
    """sign(c) log(1 + |c|) of each dose."""
    values = np.asarray(doses, float)
    return np.sign(values) * np.log1p(np.abs(values))


def journal_score(doses: Sequence[float], values: Sequence[float | None]) -> JournalScore:
    """The score of the curve `values` at `doses`, one value a dose; None and NaN are invalid.

    A constant added to all values changes nothing, so effects relative to dose 0 will do. With fewer than three valid
    doses all but the valid share is NaN. Raises JournalError for lists of different length or without a dose, and
    where all valid doses are the same.
    """
    if len(doses) != len(values) or not len(doses):
        raise JournalError(f"{len(doses)} doses and {len(values)} values; one value a dose, at least one, is needed")
    y = np.array([math.nan if value is None else value for value in values], float)
    kept = np.isfinite(y)
    valid = float(kept.mean())
    if kept.sum() < FEWEST:
        return JournalScore(math.nan, math.nan, valid, math.nan, math.nan, math.nan)
    x, y = symlog(doses)[kept], y[kept]
    if np.ptp(x) == 0:
        raise JournalError(f"all valid doses are {doses[0]:g}; a slope needs two different ones")
    line: Any = stats.linregress(x, y)
    return JournalScore(
        float(line.slope), float(line.rvalue) ** 2, valid, float(line.pvalue), float(y.min()), float(y.max())
    )


def of_curves(points: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Journal scores of finished experiments from rows of the registry's view `dose_response`.

    One row for each setting and eval, from its effects on the test families at all doses, highest B first. A curve of
    fewer than three doses, or of one, has none.
    """
    curves: dict[tuple[str, str, str], dict[float, float | None]] = {}
    for point in points:
        if point["metric"] == "effect" and point["split"] == "test":
            key = point["eval"], point["label"], point["group_key"]
            curves.setdefault(key, {})[point["dose"]] = point["value"]
    rows = []
    for (name, label, _), curve in curves.items():
        if len(curve) >= FEWEST:
            found = journal_score(list(curve), list(curve.values()))
            rows.append(
                {
                    "eval": name,
                    "label": label,
                    "doses": len(curve),
                    "slope": _number(found.slope),
                    "r2": _number(found.r2),
                    "valid": found.valid,
                    "p": _number(found.p),
                    "B": _number(found.b),
                    "C": _number(found.c),
                }
            )
    return sorted(rows, key=lambda row: (row["eval"], row["B"] is None, -(row["B"] or 0.0)))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def null_quantile(doses: Sequence[float], noise: float, share: float, best_of: int = 1) -> float:
    """The value below which B stays with probability `share` for the best of `best_of` methods that do nothing.

    The null: at each dose independent normal noise of standard deviation `noise` nats. Then r2 is Beta(1/2, (n-2)/2),
    the total sum of squares S noise^2 chi2(n-1), independent of it, and |slope| = sqrt(r2 S / Sxx), so that
    B = r2^(3/2) sqrt(S / Sxx); Sxx is the sum of squares of the centred x.
    """
    x = symlog(doses)
    n, spread = len(x), float(np.linalg.norm(x - x.mean()))
    if n < FEWEST or spread == 0:
        raise JournalError(f"doses {list(doses)}: at least {FEWEST} of them, two different, are needed")
    nodes, weights = np.polynomial.legendre.leggauss(400)
    angle = (nodes + 1) * math.pi / 4  # r2 = sin(angle)^2 has density cos(angle)^(n-3), which is smooth
    weights = weights * np.cos(angle) ** (n - 3)
    weights = weights / weights.sum()
    power = np.sin(angle) ** 3

    def below(b: float) -> float:
        return float(weights @ stats.chi.cdf(b * spread / (noise * power), n - 1)) ** best_of - share

    return float(optimize.brentq(below, 0, 100 * noise / spread))
