"""How often does the leaderboard call an intervention effective when none is? Simulates the whole procedure.

Every simulated intervention is random: a trained vector at a given seed does move the answers, by an amount that is
zero only on average over seeds. Scores then go through what the leaderboard does: odd parts, split by family, choice
of the dose on the development half under a damage budget, crossed two-way test on the held-out half, Holm over the
interventions of the experiment.

    python -m benchmarks.false_positives            # the table in docs/metrics.md, about two minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats

from evals import stats

DOSES = np.array([0.5, 1.0, 2.0, 4.0])
BUDGET = 0.1


@dataclass(frozen=True)
class Case:
    """One world without effects. Standard deviations are relative to the noise of one item at dose 1."""

    name: str
    seeds: int
    groups: int = 8
    families: int = 20
    family_sizes: tuple[int, ...] = (4,)
    family: float = 0.5
    """Family effects, common to all seeds."""
    seed: float = 0.0
    """Effect of a seed's own vector on every item; mean zero over seeds."""
    interaction: float = 1.0
    """Noise of one item under one seed; the part of an item's noise that all seeds share has deviation 1."""
    linear: bool = False
    """True: effects at the doses are multiples of one another. False: independent at each dose, the worst case."""
    growth: float = 0.0
    """Effects scale as dose**growth."""
    skewed: bool = False
    """True: effects of families and items are exponential, shifted to mean zero; False: normal."""

    def sizes(self) -> list[int]:
        """Items of each family."""
        return [self.family_sizes[i % len(self.family_sizes)] for i in range(self.families)]


def effects(case: Case, experiments: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Odd effects [B, m, K, S, n] and damages [B, m, K] of random interventions, and the family of each item."""
    families = [f"family-{number}" for number, size in enumerate(case.sizes()) for _ in range(size)]
    codes = np.repeat(np.arange(case.families), case.sizes())
    doses = 1 if case.linear else len(DOSES)
    shape = (experiments, case.groups, doses)
    seed = case.seed * rng.standard_normal((*shape, case.seeds, 1))
    draw = _skewed if case.skewed else np.random.Generator.standard_normal
    family = case.family * draw(rng, (*shape, 1, case.families))[..., codes]
    item = draw(rng, (*shape, 1, len(codes)))
    noise = case.interaction * rng.standard_normal((*shape, case.seeds, len(codes)))
    scale = (DOSES**case.growth)[:, None, None]
    result = (seed + family + item + noise) * scale
    damages = 0.04 * DOSES * rng.lognormal(0, 0.5, (experiments, case.groups, 1))  # some large doses are over budget
    return result, np.broadcast_to(damages, (*shape[:2], len(DOSES))), families


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_exponential(shape) - 1


def p_values(odd: np.ndarray, damages: np.ndarray, families: list[str]) -> np.ndarray:
    """[B, m] p of every intervention: the leaderboard's procedure on odd effects [B, m, K, S, n]."""
    sides = stats.split(families, 0.5)
    dev = np.array([sides[family] == "dev" for family in families])
    chosen = stats.choose_dose(odd[..., dev].mean(-1), damages, BUDGET)
    picked = np.take_along_axis(odd[..., ~dev], np.maximum(chosen, 0)[..., None, None, None], axis=2)[:, :, 0]
    members = stats.membership([family for family, held in zip(families, ~dev, strict=True) if held])
    p = stats.guarded_p_value(stats.crossed_mean(picked, members), picked, members)
    return np.where(chosen >= 0, p, np.nan)


@dataclass(frozen=True)
class Rates:
    """False positives, as (rate, low, high) with an exact (Clopper-Pearson) interval."""

    comparisons: int
    false_comparisons: int
    experiments: int
    false_experiments: int

    def per_comparison(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Share of single tests with p < 0.05. The interval treats them as independent, which here they are."""
        return _interval(self.false_comparisons, self.comparisons, confidence)

    def familywise(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Share of experiments in which any Holm-adjusted p < 0.05."""
        return _interval(self.false_experiments, self.experiments, confidence)


def _interval(hits: int, total: int, confidence: float) -> tuple[float, float, float]:
    exact = scipy_stats.binomtest(hits, total).proportion_ci(confidence, method="exact")
    return hits / total, float(exact.low), float(exact.high)


def measure(case: Case, experiments: int, seed: int = 0, chunk: int = 100) -> Rates:
    """False-positive rates of `case` over that many simulated experiments."""
    rng = np.random.default_rng(seed)
    p = np.concatenate([p_values(*effects(case, size, rng)) for size in _chunks(experiments, chunk)])
    tested = ~np.isnan(p)
    return Rates(
        comparisons=int(tested.sum()),
        false_comparisons=int((p[tested] < 0.05).sum()),
        experiments=len(p),
        false_experiments=int((np.nan_to_num(stats.holm(p), nan=1.0) < 0.05).any(-1).sum()),
    )


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def cases() -> list[Case]:
    """The worlds of the table: each number of seeds, without and with effects of the seed's own vector."""
    found = []
    for seeds in (1, 2, 3, 5):
        base = Case("items and families only", seeds)
        found.append(base)
        found.append(replace(base, name="no interaction noise", interaction=0.0))
        found.append(replace(base, name="families of 1 to 12", family_sizes=(1, 2, 4, 12)))
        found.append(replace(base, name="effects grow with dose", linear=True, growth=1.0))
        found.append(replace(base, name="skewed items", skewed=True, family=1.0))
        if seeds > 1:
            for size in (0.15, 0.3, 1.0, 5.0):
                found.append(replace(base, name=f"vector effect {size}", seed=size))
            found.append(replace(base, name="vector effect 0.3, no interaction", seed=0.3, interaction=0.0))
            found.append(replace(base, name="vector effect 1, grows with dose", seed=1.0, linear=True, growth=1.0))
    found.append(Case("a vector with an effect of its own (0.3)", 1, seed=0.3))
    return found


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=2000)
    count = parser.parse_args().experiments
    print("| seeds | world without effects | p < 0.05 | any Holm p < 0.05 |\n|---|---|---|---|")
    for case in cases():
        rates = measure(case, count)
        single, family = (
            f"{100 * rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
            for rate, low, high in (rates.per_comparison(), rates.familywise())
        )
        print(f"| {case.seeds} | {case.name} | {single} | {family} |", flush=True)


if __name__ == "__main__":
    main()
