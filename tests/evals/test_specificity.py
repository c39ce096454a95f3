from __future__ import annotations

import numpy as np
import pytest

from evals.specificity import specificity
from evals.stats import membership

EVEN = [f"family-{i // 4}" for i in range(40)]


def test_specificity_is_one_when_nothing_else_moves_and_a_half_when_all_move_alike() -> None:
    target = np.ones((2, 40))
    members = membership(EVEN)
    assert specificity(target, np.zeros((2, 40, 3)), members)["value"] == 1
    assert specificity(-target, np.ones((2, 40, 3)), members) == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
        "others": 1.0,
    }


def test_specificity_is_the_ratio_of_mean_effects_and_its_interval_holds_the_truth() -> None:
    rng, members, inside = np.random.default_rng(0), membership(EVEN), 0
    for _ in range(200):
        target, others = rng.normal(2, 1, (1, 40)), rng.normal(1, 1, (1, 40, 2))
        found = specificity(target, others, members)
        means = np.abs(others.mean((0, 1)))
        assert found["value"] == pytest.approx(target.mean() / (target.mean() + means.mean()))
        inside += found["low"] <= 2 / 3 <= found["high"]
    assert inside >= 180


def test_specificity_without_scored_others_is_absent() -> None:
    members = membership(EVEN)
    assert specificity(np.ones((1, 40)), np.full((1, 40, 1), np.nan), members)["value"] is None
    assert specificity(np.ones((1, 40)), np.ones((1, 40, 0)), members)["value"] is None
    assert specificity(np.zeros((1, 40)), np.zeros((1, 40, 1)), members)["value"] is None
