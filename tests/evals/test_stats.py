"""Paired statistics, against reference implementations and closed forms."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import statsmodels.api as sm
from inspect_ai.scorer import SampleScore, Score, stderr
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from evals import stats

UNEVEN = [f"family-{i}" for i, size in enumerate((1, 5, 2, 8, 3, 3)) for _ in range(size)]
EVEN = [f"family-{i // 4}" for i in range(40)]


def values(families: list[str], seeds: int = 1, seed: int = 0) -> np.ndarray:
    """[S, n] with family effects, so that clustering matters."""
    rng = np.random.default_rng(seed)
    shared = dict(zip(sorted(set(families)), rng.normal(size=len(set(families))), strict=True))
    return rng.normal(0.3, 1, (seeds, len(families))) + np.array([shared[family] for family in families])


def test_a_side_effect_has_no_odd_part_and_steering_has_no_even_part() -> None:
    zero = np.array([1.0, 2.0])
    assert np.allclose(stats.odd_part(zero + 3, zero + 3), 0)
    assert np.allclose(stats.even_part(zero + 3, zero + 3, zero), 3)
    assert np.allclose(stats.odd_part(zero + 3, zero - 3), 3)
    assert np.allclose(stats.even_part(zero + 3, zero - 3, zero), 0)


@pytest.mark.parametrize("families", [EVEN, UNEVEN])
def test_the_clustered_standard_error_is_that_of_inspect(families: list[str]) -> None:
    x = values(families)[0]
    scores = [
        SampleScore(score=Score(value=float(value)), sample_id=str(i), sample_metadata={"family": family})
        for i, (value, family) in enumerate(zip(x, families, strict=True))
    ]
    ours = np.sqrt(stats.clustered_variance(x, stats.membership(families)))
    assert float(ours) == pytest.approx(stderr(cluster="family")(scores), rel=1e-12)


@pytest.mark.parametrize("families", [EVEN, UNEVEN])
def test_the_clustered_standard_error_is_that_of_statsmodels(families: list[str]) -> None:
    x = values(families)[0]
    codes = np.unique(families, return_inverse=True)[1]
    fit = sm.OLS(x, np.ones_like(x)).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    assert float(stats.clustered_variance(x, stats.membership(families))) == pytest.approx(fit.bse[0] ** 2, rel=1e-10)


def test_one_seed_and_equal_families_give_the_t_interval_and_p_of_statsmodels() -> None:
    x = values(EVEN)
    codes = np.unique(EVEN, return_inverse=True)[1]
    fit = sm.OLS(x[0], np.ones(40)).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    found = stats.crossed_mean(x, stats.membership(EVEN))
    assert float(found.p_value()) == pytest.approx(fit.pvalues[0], rel=1e-9)
    assert np.allclose(found.interval(), fit.conf_int()[0])
    assert found.df == 9


def test_items_that_are_their_own_families_give_the_one_sample_t_test() -> None:
    x = np.random.default_rng(3).normal(0.4, 1, (1, 25))
    found = stats.crossed_mean(x, stats.membership([str(i) for i in range(25)]))
    reference = scipy_stats.ttest_1samp(x[0], 0)
    assert float(found.p_value()) == pytest.approx(reference.pvalue, rel=1e-10)
    assert np.allclose(found.interval(), reference.confidence_interval(0.95))


@pytest.mark.parametrize("sizes", [(1, 5, 2, 8, 3, 3), (4, 4, 4), (1, 1, 20)])
@pytest.mark.parametrize("together", [False, True])
def test_the_design_correction_covers_what_simulated_families_show(sizes: tuple[int, ...], together: bool) -> None:
    members = np.repeat(np.eye(len(sizes)), sizes, axis=0)
    inflation, df = stats.family_design(members)
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(40_000, len(sizes))) @ members.T if together else rng.normal(size=(40_000, sum(sizes)))
    estimated = stats.clustered_variance(spread, members)
    assert inflation * estimated.mean() >= spread.mean(1).var() * 0.97
    assert df <= 2 * estimated.mean() ** 2 / estimated.var() * 1.05


def test_the_design_correction_is_nothing_for_equal_families_and_a_matrix_product_for_others() -> None:
    assert stats.family_design(stats.membership(EVEN)) == pytest.approx((1.0, 9.0))
    sizes = np.array([1.0, 5, 2, 8])
    to_residuals = np.eye(4) - np.outer(sizes / sizes.sum(), np.ones(4))
    found = []
    for v in (sizes, sizes**2):
        a = to_residuals @ np.diag(v) @ to_residuals.T
        found.append((v.sum() / np.trace(a) * 3 / 4, np.trace(a) ** 2 / np.trace(a @ a)))
    inflation, df = stats.family_design(np.repeat(np.eye(4), sizes.astype(int), axis=0))
    assert inflation == pytest.approx(max(one[0] for one in found))
    assert df == pytest.approx(min(one[1] for one in found))


def test_identical_seeds_add_no_certainty() -> None:
    x = values(EVEN)
    members = stats.membership(EVEN)
    once, thrice = stats.crossed_mean(x, members), stats.crossed_mean(np.repeat(x, 3, axis=0), members)
    assert float(thrice.se) == pytest.approx(float(once.se))
    assert float(thrice.p_value()) == pytest.approx(float(once.p_value()), rel=1e-6)


def test_the_variance_is_that_of_items_plus_that_of_seeds() -> None:
    x = values(EVEN, seeds=4)
    found = stats.crossed_mean(x, stats.membership(EVEN))
    items = stats.clustered_variance(x.mean(0), stats.membership(EVEN))
    assert float(found.se**2) == pytest.approx(float(items + x.mean(1).var(ddof=1) / 4))


def test_a_constant_seed_effect_widens_the_interval_by_between_run_variance_alone() -> None:
    x = np.random.default_rng(0).normal(size=(1, 40)) + np.array([[-1.0], [0.0], [1.0]])
    found = stats.crossed_mean(x, stats.membership(EVEN))
    assert found.variances[1] == pytest.approx(1 / 3)
    assert found.df == 2


def test_the_p_value_is_the_level_whose_interval_touches_zero() -> None:
    found = stats.crossed_mean(values(EVEN, seeds=3, seed=5), stats.membership(EVEN))
    p = float(found.p_value())
    low, high = found.interval(1 - p)
    assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-8)


def test_batches_give_what_single_estimates_give() -> None:
    x = np.stack([values(EVEN, seeds=3, seed=seed) for seed in range(6)]).reshape(2, 3, 3, 40)
    members = stats.membership(EVEN)
    together = stats.crossed_mean(x, members)
    assert together.p_value().shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = stats.crossed_mean(x[i, j], members)
            assert float(alone.p_value()) == pytest.approx(together.p_value()[i, j])
            assert float(alone.radius(0.05)) == pytest.approx(together.radius(0.05)[i, j])


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (2.0, stats.SMALLEST_P)])
def test_effects_without_any_variance_are_certain_or_absent(value: float, p: float) -> None:
    assert float(stats.crossed_mean(np.full((2, 40), value), stats.membership(EVEN)).p_value()) == p


def test_one_family_gives_no_standard_error_and_no_p_value() -> None:
    found = stats.crossed_mean(np.ones((1, 3)) * [1, 2, 3], stats.membership(["a"] * 3))
    assert np.isnan(found.se)
    assert np.isnan(found.p_value())


def test_the_difference_to_a_control_is_paired_by_item() -> None:
    shared = np.random.default_rng(0).normal(0, 100, (1, 40))
    noise = np.random.default_rng(1).normal(1, 0.1, (1, 40))
    families = [str(i) for i in range(40)]
    found = stats.contrast(shared + noise, shared, stats.membership(families))
    reference = scipy_stats.ttest_rel((shared + noise)[0], shared[0])
    assert float(found.mean) == pytest.approx(noise.mean())
    assert np.allclose(found.interval(), reference.confidence_interval(0.95))


def test_a_skewed_nothing_keeps_its_level_and_symmetric_effects_their_t_test() -> None:
    rng, members = np.random.default_rng(0), np.eye(20)
    nothing = rng.standard_exponential((20_000, 1, 20)) - 1
    found = stats.crossed_mean(nothing, members)
    assert (found.p_value() < 0.05).mean() > 0.07
    assert (stats.guarded_p_value(found, nothing, members) < 0.05).mean() <= 0.05
    symmetric = np.concatenate([np.arange(1.0, 11), -np.arange(1.0, 11)])[None] + 2
    one = stats.crossed_mean(symmetric, members)
    assert float(stats.guarded_p_value(one, symmetric, members)) == pytest.approx(float(one.p_value()))


def test_holm_is_that_of_statsmodels() -> None:
    p = np.random.default_rng(0).uniform(0, 0.1, 12)
    assert np.allclose(stats.holm(p), multipletests(p, method="holm")[1])


def test_holm_does_not_count_what_was_not_tested() -> None:
    found = stats.holm([0.01, np.nan, 0.04, 0.03])
    assert np.isnan(found[1])
    assert np.allclose(found[[0, 2, 3]], multipletests([0.01, 0.04, 0.03], method="holm")[1])


@pytest.mark.parametrize(("families", "alpha"), [(5, 0.05), (20, 0.05), (20, 0.05 / 30), (400, 0.01)])
def test_the_detectable_effect_is_that_of_statsmodels(families: int, alpha: float) -> None:
    x = np.random.default_rng(0).normal(0, 2, (1, families))
    found = stats.crossed_mean(x, stats.membership([str(i) for i in range(families)]))
    size = TTestPower().solve_power(nobs=families, alpha=alpha, power=0.8)
    assert float(found.detectable(alpha)) == pytest.approx(size * x.std(ddof=1), rel=1e-3)


def test_an_effect_of_the_detectable_size_is_found_four_times_in_five() -> None:
    rng, members = np.random.default_rng(0), stats.membership(EVEN)
    noise = rng.normal(size=(3000, 1, 40))
    found = stats.crossed_mean(noise, members)
    effect = float(scipy_stats.nct.isf(0.5, 9, 0) + TTestPower().solve_power(nobs=10, alpha=0.05, power=0.8)) * 0.5
    power = (stats.crossed_mean(noise + effect, members).p_value() < 0.05).mean()
    assert power == pytest.approx(0.8, abs=0.03)
    assert np.sqrt((found.detectable(0.05) ** 2).mean()) == pytest.approx(effect, rel=0.03)


def test_the_split_is_by_family_in_the_order_of_the_hash() -> None:
    names = [f"f{i}" for i in range(11)]
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    sides = stats.split(names * 3, 0.4)
    assert [name for name in ordered if sides[name] == "dev"] == ordered[:4]
    assert stats.split(names[::-1], 0.4) == sides


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.99, 1), (0.5, 1)])
def test_both_sides_of_a_split_get_a_family(share: float, count: int) -> None:
    assert sorted(stats.split(["a", "b"], share).values()) == ["dev", "test"]
    assert len(stats.split(["a"], share)) == count


@pytest.mark.parametrize("share", [0, 1, -0.2, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(share: float) -> None:
    with pytest.raises(stats.StatsError, match="strictly between 0 and 1"):
        stats.split(["a", "b"], share)


def test_the_dose_with_the_largest_effect_within_the_budget_is_chosen() -> None:
    effects = [[0.1], [-0.9], [2.0]]
    assert stats.choose_dose(effects, [0.01, 0.05, 0.4], 0.1) == 1
    assert stats.choose_dose(effects, [0.01, 0.05, 0.4], 0.5) == 2
    assert stats.choose_dose(effects, [0.2, 0.3, 0.4], 0.1) == -1


def test_a_tie_goes_to_the_smaller_dose_and_unscored_doses_are_passed_over() -> None:
    assert stats.choose_dose([[0.5], [0.5]], [0, 0], 1) == 0
    assert stats.choose_dose([[np.nan], [0.5], [0.9]], [0, 0, np.nan], 1) == 1


def test_the_choice_of_dose_does_not_look_at_whether_seeds_agree() -> None:
    agreeing, opposed = [[1.0, 1.0], [1.1, 1.1]], [[1.0, 1.0], [1.1, -1.1]]
    assert stats.choose_dose(agreeing, [0, 0], 1) == stats.choose_dose(opposed, [0, 0], 1) == 1
