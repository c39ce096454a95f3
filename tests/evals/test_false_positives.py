"""The whole procedure on interventions without effect: it may not call more than one in twenty effective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.false_positives import BUDGET, DOSES, Case, effects, measure, p_values
from evals.compare import Arm, Comparison, Eval, Group, compare
from evals.items import Item

EXPERIMENTS = 1200
CONFIDENCE = 0.999
"""Of the intervals below: with forty checks, some of which are exactly at 5 %, a 95 % one would often be missed."""
PLAIN = Case("plain", seeds=1, groups=6, families=16, family_sizes=(3,))


WORLDS: list[dict[str, Any]] = [
    {},
    {"interaction": 0.0},
    {"family_sizes": (1, 2, 4, 12)},
    {"linear": True, "growth": 1.0},
    {"skewed": True, "family": 1.0},
]
ONLY_OF_SEVERAL_SEEDS: list[dict[str, Any]] = [
    {"seed": 0.3},
    {"seed": 5.0, "interaction": 0.0},
]
"""With one seed a vector's own effect is real, and no test can tell it from the method's."""


@pytest.mark.parametrize(
    ("seeds", "change"),
    [(seeds, world) for seeds in (1, 2, 3, 5) for world in WORLDS + (ONLY_OF_SEVERAL_SEEDS if seeds > 1 else [])],
    ids=str,
)
def test_at_most_one_comparison_in_twenty_is_a_false_positive(seeds: int, change: dict[str, Any]) -> None:
    rates = measure(replace(PLAIN, seeds=seeds, **change), EXPERIMENTS)
    assert rates.per_comparison(CONFIDENCE)[1] <= 0.05, rates
    assert rates.familywise(CONFIDENCE)[1] <= 0.05, rates


def test_the_simulation_would_notice_a_test_that_ignores_seeds() -> None:
    odd, damages, families = effects(replace(PLAIN, seeds=3, seed=1.0), 200, np.random.default_rng(0))
    naive = p_values(odd.mean(axis=3, keepdims=True), damages, families)
    assert (naive < 0.05).mean() > 0.15


def test_the_simulated_procedure_is_the_one_that_makes_the_leaderboard() -> None:
    case = replace(PLAIN, seeds=3, seed=0.3, family_sizes=(1, 4, 2))
    odd, damages, families = effects(case, 1, np.random.default_rng(1))
    expected = p_values(odd, damages, families)[0]
    question = _question(odd[0], damages[0], families)
    found = [np.nan if row.p is None else row.p for row in compare(question).rows]
    assert np.allclose(found, expected, equal_nan=True, rtol=1e-6)


def _question(odd: np.ndarray, damages: np.ndarray, families: list[str]) -> Comparison:
    """Scores whose odd effects are `odd` [m, K, S, n], damaged by `damages` [m, K]."""
    rng = np.random.default_rng(2)
    base, even = rng.normal(size=len(families)), rng.normal(0.5, 1, odd.shape)

    def items(scores: np.ndarray) -> list[Item]:
        return [Item(f"item-{i}", family, float(x)) for i, (family, x) in enumerate(zip(families, scores, strict=True))]

    def passages(nll: float) -> list[Item]:
        return [Item(f"passage-{i}", f"passage-{i}", nll) for i in range(6)]

    groups = []
    for number in range(len(odd)):
        arms = [
            Arm(seed, sign * dose, items(base + even[number, k, seed] + sign * odd[number, k, seed]))
            for k, dose in enumerate(DOSES)
            for seed in range(odd.shape[2])
            for sign in (-1, 1)
        ]
        harmed = [
            Arm(arm.seed, arm.dose, passages(3 + damages[number, list(DOSES).index(abs(arm.dose))])) for arm in arms
        ]
        groups.append(Group(f"group-{number}", "method", f"method {number}", {"task": arms, "nll": harmed}))
    evals = [Eval("task", 1, items(base)), Eval("nll", 1, passages(3.0), damage=True)]
    return Comparison(evals, groups, budget=BUDGET, dev=0.5)
