"""Breadth: which of many values moved, with the error of a claim about each kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests

from evals.breadth import FEWEST, breadth
from evals.compare import Arm, Comparison, Eval, Group, compare
from evals.items import Item
from evals.stats import membership, split

FAMILIES = [f"family-{i // 2}" for i in range(24)]
MEMBERS = membership(FAMILIES)
NAMES = [f"value-{i}" for i in range(8)]


def effects(means: list[float], seeds: int = 1, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """[S, n, k]: independent normal noise around a mean for each value."""
    return np.random.default_rng(seed).normal(means, spread, (seeds, len(FAMILIES), len(means)))


def test_one_seed_and_equal_families_give_the_t_tests_of_the_family_means_and_the_holm_of_statsmodels() -> None:
    given = effects([0.0, 0.3, 0.8, 0.0, 1.5, -1.2, 0.5, 0.0])
    symmetric = np.concatenate([given, 2 * given.mean(1, keepdims=True) - given], 1)  # so that nothing is skewed
    members = membership([f"{name}{side}" for side in "ab" for name in FAMILIES])
    found = breadth(symmetric, members, NAMES)
    by_family = (symmetric[0].T @ members / 2).T
    p = scipy_stats.ttest_1samp(by_family, 0).pvalue
    rejected, adjusted, *_ = multipletests(p, 0.05, "holm")
    assert [one.p for one in found.tested] == pytest.approx(list(p))
    assert [one.p_holm for one in found.tested] == pytest.approx(list(adjusted))
    assert [one.mean for one in found.tested] == pytest.approx(list(symmetric[0].mean(0)))
    assert {one.name for one in found.shifted} == {name for name, one in zip(NAMES, rejected, strict=True) if one}
    assert (found.count, found.of, found.share) == (rejected.sum(), 8, rejected.mean())
    assert 2 <= rejected.sum() < 8


def test_names_come_with_their_signs_the_furthest_first() -> None:
    found = breadth(effects([0.0, 2.0, -3.0, 0.0], spread=0.1), MEMBERS, NAMES[:4])
    assert [one.name for one in found.shifted] == ["value-2", "value-1"]
    assert found.told() == "value-2 -3, value-1 +2"


def test_seeds_that_disagree_are_no_shift_however_many_items_there_are() -> None:
    given = effects([2.0, 2.0], seeds=3, spread=0.1)
    given[:, :, 1] *= np.array([1, -1, 0.5])[:, None]
    assert [one.name for one in breadth(given, MEMBERS, NAMES[:2]).shifted] == ["value-0"]


def test_items_of_one_family_are_one_observation() -> None:
    per_family = np.random.default_rng(3).normal(0.55, 1, 12)
    copied = np.repeat(per_family, 2)[None, :, None]
    independent = membership([str(i) for i in range(24)])
    assert breadth(copied, MEMBERS, ["v"]).tested[0].p > breadth(copied, independent, ["v"]).tested[0].p


def test_each_value_is_tested_on_the_items_that_speak_for_it() -> None:
    given = effects([1.0, 1.0, 1.0], spread=0.2)
    given[0, 12:, 1] = math.nan
    alone = breadth(given[:, :12, 1:2], membership(FAMILIES[:12]), ["value-1"])
    found = breadth(given, MEMBERS, NAMES[:3])
    assert [one.families for one in found.tested] == [12, 6, 12]
    assert found.tested[1].p == alone.tested[0].p
    assert found.tested[1].mean == alone.tested[0].mean


@pytest.mark.parametrize(("families", "tested"), [(FEWEST - 1, None), (FEWEST, 1)])
def test_a_value_of_few_families_is_not_tested_and_costs_the_others_nothing(families: int, tested: int | None) -> None:
    given = effects([1.0])
    given[0, 2 * families :] = math.nan
    assert breadth(given, MEMBERS, ["rare"]).of == tested
    both = np.concatenate([given, effects([1.0], seed=1)], -1)
    other = next(one for one in breadth(both, MEMBERS, ["rare", "common"]).tested if one.name == "common")
    assert (other.p_holm == other.p) == (tested is None)


def test_a_value_unscored_under_one_seed_is_tested_on_the_items_that_are_left() -> None:
    given = effects([1.0], seeds=2, spread=0.1)
    given[1, :4] = math.nan
    assert breadth(given, MEMBERS, ["v"]).tested[0].families == 10


def test_nothing_to_test_is_no_number_and_not_zero() -> None:
    for nothing in (np.zeros((1, 24, 0)), np.full((1, 24, 3), math.nan)):
        found = breadth(nothing, MEMBERS, NAMES[: nothing.shape[-1]])
        assert (found.count, found.of, found.share, found.told()) == (None, None, None, "")


def test_what_does_not_move_at_all_is_tested_and_has_not_moved() -> None:
    found = breadth(np.zeros((2, 24, 3)), MEMBERS, NAMES[:3])
    assert (found.count, found.of) == (0, 3)
    assert [one.p for one in found.tested] == [1, 1, 1]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_where_nothing_moves_a_name_is_given_in_at_most_one_experiment_of_twenty(seeds: int, shared: float) -> None:
    """Independent values, and values that all rest on the same answers, with either sign, as dilemmas' do."""
    rng, runs = np.random.default_rng(0), 400
    signs = rng.choice([-1, 1], 20)
    wrong = 0
    for _ in range(runs):
        common = rng.normal(0, shared, (seeds, 24, 1)) * signs
        wrong += bool(breadth(rng.normal(size=(seeds, 24, 20)) + common, MEMBERS, [str(i) for i in range(20)]).count)
    assert scipy_stats.binomtest(wrong, runs).proportion_ci(0.999).low <= 0.05


def test_a_row_says_what_else_moved_on_the_test_items_at_its_dose() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (3, 24, 4))

    def items(dose: float, seed: int) -> list[Item]:
        moved = dose * (np.array([1.0, 0.5, -0.7, 0.0]) + noise[seed])
        return [
            Item(f"i{i}", FAMILIES[i], one[0], dict(zip(("trust", "care", "luck"), map(float, one[1:]), strict=True)))
            for i, one in enumerate(moved)
        ]

    arms = [Arm(seed, dose, items(dose, seed)) for seed in range(3) for dose in (-1.0, 1.0)]
    question = Comparison([Eval("task", 1, items(0, 0))], [Group("g", "m", "m", {"task": arms})], budget=1)
    row = compare(question).rows[0]
    test = np.array([split(FAMILIES, 0.5)[family] == "test" for family in FAMILIES])
    trust, care = 0.5 + noise[:, test, 1].mean(), -0.7 + noise[:, test, 2].mean()
    assert (row.breadth, row.breadth_of) == (2, 3)
    assert row.shifted == f"care {care:+.2g}, trust {trust:+.2g}"
