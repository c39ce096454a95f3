"""Permutation tests of many candidates at once: which rows were the data, and which the control, is drawn anew.

Where teacher and control do not differ, the rows of a prompt are exchangeable between them, whatever the prompt does to
its answers; so labels are reassigned within prompts. Statistics are functions of the two groups' sums, so that a
thousand permutations are one matrix product and nothing is asked of a model again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Statistic = Callable[[Floats, Floats], Floats]
"""(sums over the data [p, f], sums over the control [p, f]) -> scores [p, candidates], for p labellings at once."""

CELLS = 1 << 23
"""Labels held at once: 64 MB of float64."""
TIE = 1e-9
"""What differs by less, relatively, is equal: sums are rounded."""
DETECTABLE = 2.4865
"""Standard deviations that a one-sided test at 0.05 finds with a power of 80 %: z(0.95) + z(0.80)."""


@dataclass(frozen=True, eq=False)
class Design:
    """Which rows are the data, and within which groups that may be reassigned."""

    data: Flags
    """[rows] True for the data, False for the control."""
    strata: NDArray[np.int64]
    """[rows] rows with the same number may trade places."""

    @property
    def arrangements(self) -> int:
        """How many labellings there are, this one included."""
        groups = self._groups()
        return math.prod(math.comb(len(group), int(self.data[group].sum())) for group in groups)

    def _groups(self) -> list[NDArray[np.int64]]:
        return [np.flatnonzero(self.strata == stratum) for stratum in np.unique(self.strata)]

    def every(self) -> Flags:
        """[arrangements, rows] all labellings, in no order that matters."""
        groups = self._groups()
        choices = [itertools.combinations(group.tolist(), int(self.data[group].sum())) for group in groups]
        found = np.zeros((self.arrangements, len(self.data)), bool)
        for place, chosen in enumerate(itertools.product(*choices)):
            found[place, list(itertools.chain.from_iterable(chosen))] = True
        return found

    def drawn(self, n: int, seed: int) -> Iterator[Flags]:
        """`n` random labellings in blocks [k, rows]; each stratum keeps its number of data rows."""
        noise = np.random.default_rng(seed)
        order = np.argsort(self.strata, kind="stable")
        ranked = np.searchsorted(np.unique(self.strata), self.strata).astype(float)
        step = max(1, CELLS // len(self.data))
        for start in range(0, n, step):
            shuffled = np.argsort(ranked + noise.random((min(step, n - start), len(ranked))), axis=1)
            labels = np.empty(shuffled.shape, bool)
            np.put_along_axis(labels, shuffled, self.data[order][None], axis=1)
            yield labels


@dataclass(frozen=True, eq=False)
class Tested:
    """What a permutation test of c candidates found. All arrays are [c]."""

    score: Floats
    """The statistic as the data have it."""
    z: Floats
    """The score in standard deviations within the groups, as in a t-test; 0 where it does not vary."""
    margin: Floats
    """z less the mean of the other candidates' z; z itself where there is no other."""
    p: Floats
    """One-sided: how often a labelling is at least as far out, by margin or by z."""
    p_adjusted: Floats
    """How often the farthest of all candidates is at least as far out (Westfall & Young 1993, single-step max-T)."""
    detectable: Floats
    """The score that would have p <= 0.05 four times in five if it alone moved."""
    n: int
    """Labellings compared with."""
    exact: bool
    """True where these are all there are, so that p is exact."""


def permute(
    features: Floats, statistic: Statistic, design: Design, permutations: int, seed: int, *, relative: bool = True
) -> Tested:
    """Compare what `features` [rows, f] say with what other labellings say: with all, where there are few.

    `relative` compares margins, else z. Statistics become z before they are compared with each other: candidates whose
    effects are alike in direction, but not in size, would else win by size whatever the truth is. With random
    labellings p is (1 + as far) / (1 + n), never 0 (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    exact = design.arrangements <= permutations + 1
    blocks: Iterator[Flags] = iter([design.every()]) if exact else design.drawn(permutations, seed)
    observed = _scores(features, statistic, design.data[None])
    null = np.concatenate([_scores(features, statistic, block) for block in blocks])
    whole = null if exact else np.concatenate([observed, null])  # all labellings there are hold the observed one
    mean, spread = whole.mean(axis=0), whole.std(axis=0)
    varies = spread > TIE * np.abs(whole).max(axis=0)
    unit = np.where(varies, spread, 1)
    z, own_z = (studentised(np.where(varies, (each - mean) / unit, 0.0), design) for each in (whole, observed))
    margins, own_margin = _margins(z), _margins(own_z)
    values, own = (margins, own_margin) if relative else (z, own_z)
    p = (values >= own - TIE * (1 + np.abs(own))).mean(axis=0)
    highest = values.max(axis=1, keepdims=True)
    adjusted = (highest >= own - TIE * (1 + np.abs(own))).mean(axis=0)
    detectable = DETECTABLE * values.std(axis=0) * spread
    return Tested(observed[0], own_z[0], own_margin[0], p, adjusted, detectable, len(null), exact)


def studentised(z: Floats, design: Design) -> Floats:
    """z in standard deviations over labellings, turned into standard deviations within the groups.

    The labellings' spread holds the very difference that is tested, so that z cannot exceed the root of m = rows -
    strata, and near that all candidates would be alike. For means this is exactly Student's t, for two groups and for
    pairs.
    """
    most = max(len(design.strata) - len(np.unique(design.strata)), 2)
    return z * np.sqrt((most - 1) / most / np.maximum(1 - z**2 / most, TIE))


def _margins(z: Floats) -> Floats:
    """[p, c] each less the mean of the others."""
    c = z.shape[1]
    return z if c == 1 else (z - z.mean(axis=1, keepdims=True)) * (c / (c - 1))


def _scores(features: Floats, statistic: Statistic, labels: Flags) -> Floats:
    """Statistics [p, c] of labellings [p, rows]."""
    sums = labels.astype(float) @ features
    return statistic(sums, features.sum(axis=0) - sums)
