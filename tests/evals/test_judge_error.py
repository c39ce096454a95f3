"""Judges' errors and what is corrected by them, against closed forms, reference libraries and simulation."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from statsmodels.api import OLS, add_constant
from statsmodels.stats.proportion import proportion_confint

from agents.judge import Verdict
from agents.rubric import Rubric
from benchmarks import judge_correction
from benchmarks.judge_correction import World
from evals import correction, judge_error
from evals.judge_error import Limits, limits
from evals.judge_table import ErrorRow, middle, table
from evals.labelled import Reading, turned
from evals.labels import Label

SCALE = Rubric("nice", 1, "{question} {answer}", scale=(0, 100))
CHOICES = Rubric("plants", 1, "{question} {answer}", choices={"yes": 1.0, "no": 0.0, "neither": 0.0})


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize(("hits", "n"), [(1, 16), (8, 16), (15, 16), (3, 200)])
def test_a_share_of_independent_answers_has_jeffreys_interval(hits: int, n: int) -> None:
    low, high = proportion_confint(hits, n, method="jeffreys")
    found = judge_error.share(np.arange(n) < hits, [str(index) for index in range(n)])
    assert found.value == pytest.approx(hits / n)
    # families of one leave the finite-sample factor n / (n - 1) as the only design effect
    near = judge_error.jeffreys(hits, n)
    assert (near.low, near.high) == (pytest.approx(low), pytest.approx(high))
    assert found.low == pytest.approx(float(near.low), abs=0.02)
    assert found.high == pytest.approx(float(near.high), abs=0.02)


def test_no_hit_and_no_miss_leave_the_ends_open() -> None:
    none, all_ = judge_error.jeffreys(0, 16), judge_error.jeffreys(16, 16)
    assert (none.low, all_.high) == (0, 1)
    assert none.high == pytest.approx(scipy_stats.beta.ppf(0.975, 0.5, 16.5))
    assert all_.low == pytest.approx(1 - float(none.high))
    assert math.isnan(judge_error.share([], []).value)


def test_answers_of_one_question_that_agree_count_as_one() -> None:
    hits = np.repeat([1, 0, 1, 1, 0, 0, 1, 0, 1, 1], 4)
    together = judge_error.share(hits, [str(index // 4) for index in range(40)])
    apart = judge_error.share(hits, [str(index) for index in range(40)])
    assert together.high - together.low == pytest.approx(float(apart.high - apart.low) * 2, rel=0.1)


def test_j_of_a_table_by_hand() -> None:
    found = judge_error.youden(judge_error.jeffreys(9, 10), judge_error.jeffreys(7, 10))
    assert found.value == pytest.approx(0.6)
    low, high = proportion_confint(9, 10, method="jeffreys")
    below, above = proportion_confint(7, 10, method="jeffreys")
    assert found.low == pytest.approx(0.6 - math.hypot(0.9 - low, 0.7 - below))
    assert found.high == pytest.approx(0.6 + math.hypot(high - 0.9, above - 0.7))


def test_the_auroc_is_sklearns_with_ties_and_delongs_variance() -> None:
    truth = np.array([1] * 9 + [0] * 8, bool)
    scores = np.array([3, 5, 5, 7, 2, 9, 9, 4, 6, 1, 2, 5, 3, 3, 8, 2, 1], float)
    found = judge_error.auroc(scores, truth)
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    # DeLong's variance from its definition, on the logit scale
    psi = np.array([[(h > low) + 0.5 * (h == low) for low in scores[~truth]] for h in scores[truth]])
    variance = psi.mean(1).var(ddof=1) / 9 + psi.mean(0).var(ddof=1) / 8
    area = psi.mean()
    radius = 1.959964 * math.sqrt(variance) / (area * (1 - area))
    assert found.low == pytest.approx(1 / (1 + math.exp(radius - math.log(area / (1 - area)))), abs=1e-6)


def test_a_judge_that_separates_the_labels_is_not_certain_to_go_on_doing_so() -> None:
    found = judge_error.auroc([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1])
    assert (found.value, found.high) == (1, 1)
    assert 0.4 < found.low < 0.8
    assert judge_error.auroc([1.0] * 6, [0, 0, 0, 1, 1, 1]).value == 0.5
    assert math.isnan(judge_error.auroc([1, 2], [1, 1]).value)


def test_agreement_beyond_chance_is_cohens_and_krippendorffs() -> None:
    first, second = rng().integers(0, 2, 60), rng().integers(0, 2, 60) | (np.arange(60) % 3 == 0)
    assert judge_error.kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    # Krippendorff (2011), the example of two observers and binary data: 0.095
    a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert judge_error.alpha(a, b) == pytest.approx(0.095, abs=5e-4)
    assert math.isnan(judge_error.alpha([1, 1], [1, 1]))
    assert math.isnan(judge_error.kappa([1, 1], [1, 1]))


def test_length_bias_is_what_length_adds_within_a_label() -> None:
    labels = np.repeat([0, 1], 40)
    words = np.concatenate([rng().integers(5, 60, 40), rng().integers(5, 60, 40)])
    honest = 50.0 * labels + rng().standard_normal(80)
    assert judge_error.within(50.0 * labels + words / 10, words, labels).r == pytest.approx(1)
    assert judge_error.within(honest, words, labels).p > 0.05
    one = judge_error.within(honest[:40], words[:40], np.zeros(40))
    assert one.r == pytest.approx(scipy_stats.spearmanr(honest[:40], words[:40]).statistic)


def test_the_p_of_a_correlation_within_labels_is_uniform_when_there_is_none() -> None:
    source = rng()
    labels = np.repeat([0, 1], 16)
    p = [judge_error.within(source.random(32), source.random(32), labels).p for _ in range(500)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_arms_with_other_errors_are_told_apart() -> None:
    truth = np.tile([1, 0], 40)
    treated = np.repeat([1, 0], 40)
    lenient = np.where(treated == 1, 1, truth)  # misses every false one in the treated arm
    assert judge_error.arms_differ(lenient, truth, treated) < 1e-6
    assert judge_error.arms_differ(truth, truth, treated) == 1
    tables = scipy_stats.fisher_exact([[20, 0], [0, 20]]).pvalue
    assert judge_error.arms_differ(lenient, truth, treated) == pytest.approx(2 * tables)


def test_the_slope_is_the_regressions_with_clustered_errors() -> None:
    families = [str(index // 4) for index in range(48)]
    truth = np.tile([95.0, 5.0, 90.0, 12.0], 12)
    judged = 30 + 0.4 * truth + 5 * rng().standard_normal(48)
    groups = np.repeat(np.arange(12), 4)
    fit = OLS(judged, add_constant(truth)).fit(cov_type="cluster", cov_kwds={"groups": groups})
    radius = scipy_stats.t.ppf(0.975, 11) * fit.bse[1]
    found = judge_error.slope(judged, truth, families)
    assert found.value == pytest.approx(fit.params[1])
    assert (found.low, found.high) == (
        pytest.approx(fit.params[1] - radius, rel=1e-3),
        pytest.approx(fit.params[1] + radius, rel=1e-3),
    )


def test_the_slope_of_verdicts_is_j() -> None:
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    judged = np.array([1, 1, 1, 0, 0, 0, 1, 0])
    assert judge_error.slope(judged, truth, list("abcdabcd")).value == pytest.approx(0.75 + 0.75 - 1)


def test_bias_of_verdicts_counts_alarms_against_misses() -> None:
    truth, judged = np.zeros(40), np.zeros(40)
    judged[:4], truth[38:] = 1, 1  # four alarms, two misses
    found = judge_error.bias(judged, truth, [str(index) for index in range(40)])
    assert found.value == pytest.approx(0.05)
    assert -0.12 < found.low < 0 < 0.1 < found.high < 0.2


@pytest.mark.parametrize(
    ("attenuation", "area", "said"),
    [
        ((0.5, 0.3, 0.7), (0.8, 0.6, 0.9), None),
        ((0.5, 0.1, 0.7), (0.8, 0.6, 0.9), "as little as 0.10, needed > 0.1"),
        ((0.5, 0.3, 0.7), (0.6, 0.5, 0.9), r"AUROC's interval \[0.50, 0.90\] holds 0.5"),
        ((math.nan, math.nan, math.nan), (0.8, 0.6, 0.9), "as little as unknown"),
        ((-0.6, -0.8, -0.4), (0.2, 0.1, 0.4), "as little as -0.80"),
    ],
)
def test_a_judge_near_chance_corrects_nothing(attenuation: Any, area: Any, said: str | None) -> None:
    found = judge_error.refusal(limits(*attenuation), limits(*area))
    assert (found is None) if said is None else re.search(said, str(found))


def test_rogan_and_gladens_rate_is_the_closed_form_and_is_clipped_beside_the_raw_one() -> None:
    known = limits(0.9, 0.9, 0.9), limits(0.8, 0.8, 0.8)
    found = correction.rate(limits(0.3, 0.25, 0.36), *known)
    assert found.raw == (pytest.approx(1 / 7), pytest.approx(0.05 / 0.7), pytest.approx(0.16 / 0.7))
    below = correction.rate(limits(0.1, 0.05, 0.18), *known)
    assert below.raw.value == pytest.approx(-1 / 7)
    assert [float(each) for each in below.clipped] == [0, 0, 0]


def test_a_perfect_judge_changes_nothing() -> None:
    judged, perfect = limits(0.3, 0.2, 0.42), limits(1.0, 1.0, 1.0)
    assert np.allclose(correction.rate(judged, perfect, perfect).raw, judged)
    assert np.allclose(correction.change(judged, perfect), judged)
    assert np.allclose(correction.prediction_powered(judged, limits(0.0, 0.0, 0.0)), judged)


def test_limits_are_where_the_difference_to_the_truth_has_0_for_a_limit() -> None:
    judged = limits(0.4, 0.35, 0.46)
    tpr, tnr = judge_error.jeffreys(70, 80), judge_error.jeffreys(60, 80)
    found = correction.rate(judged, tpr, tnr).raw
    fpr = judge_error.complement(tnr)
    for x, sides in ((float(found.low), (0, 1, 1)), (float(found.high), (1, 0, 0))):
        gap = float(judged.value - x * tpr.value - (1 - x) * fpr.value)
        parts = [abs(float((each.high if side else each.low) - each.value))
                 for each, side in zip((judged, tpr, fpr), sides, strict=True)]  # fmt: skip
        assert abs(gap) == pytest.approx(math.hypot(parts[0], x * parts[1], (1 - x) * parts[2]))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_change_is_divided_by_j_and_turns_with_its_sign(sign: int) -> None:
    j = judge_error.youden(judge_error.jeffreys(70, 80), judge_error.jeffreys(60, 80))
    up = correction.change(limits(0.2, 0.1, 0.32), j)
    found = correction.change(limits(-0.2, -0.32, -0.1), j) if sign < 0 else up
    assert found.value == pytest.approx(sign * 0.2 / float(j.value))
    if sign < 0:
        assert (-found.high, -found.low) == (pytest.approx(float(up.low)), pytest.approx(float(up.high)))
    else:
        assert up.low < 0.1 / float(j.value) < 0.32 / float(j.value) < up.high


def test_a_judge_that_may_be_blind_leaves_every_change_possible() -> None:
    found = correction.change(limits(0.2, 0.1, 0.3), limits(0.2, -0.1, 0.5))
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert math.isinf(correction.rate(limits(0.5, 0.4, 0.6), limits(0.5, 0.3, 0.7), limits(0.5, 0.3, 0.7)).raw.high)


def test_prediction_powered_takes_each_arms_bias_off() -> None:
    found = correction.prediction_powered_change(limits(0.3, 0.2, 0.4), limits(0.1, 0.0, 0.2), limits(-0.05, -0.1, 0.0))
    radius = math.sqrt(0.1**2 + 0.1**2 + 0.05**2)
    assert np.allclose(found, (0.15, 0.15 - radius, 0.15 + radius))


@pytest.mark.parametrize("name", ["rate", "change", "powered"])
@pytest.mark.parametrize("world", [World(0.1, 0.9, 0.9, 160, 400), World(0.3, 0.7, 0.7, 320, 400)])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(name: str, world: World) -> None:
    runs = 2000
    found = judge_correction.measure(name, world, runs)
    assert 0.93 <= found.all <= 0.975
    assert found.share > 0.9


def label(index: int, answer: int, arm: str = "base", split: str = "test", **more: Any) -> Label:
    about = {"id": f"a{index}", "rubric": "nice", "question": f"Q{index // 4}?", "answer": f"Says {index}."}
    return Label(**about, label=answer, split=split, arm=arm, **more)  # type: ignore[arg-type]


def scored(values: list[float | None], **more: Any) -> list[Reading]:
    """Readings of answers that are true in turn."""
    arms = ["base", "base", "treated", "treated"]
    return [
        Reading(
            label(index, index % 2, arms[index % 4], reference=90.0 if index % 2 else 10.0, **more),
            Verdict(value, None if value is not None else "refusal: no"),
        )
        for index, value in enumerate(values)
    ]


def row(rows: list[ErrorRow], arm: str = "all", kind: str = "rate") -> ErrorRow:
    return next(one for one in rows if one.arm == arm and one.kind == kind)


def test_a_table_counts_by_threshold_and_leaves_out_what_is_unscored() -> None:
    found = scored([10, 80, 20, 90, 60, 70, None, 40] * 2)
    rows = table(found, {"nice": SCALE}, {"nice": [50.0]})
    whole = row(rows)
    assert (whole.n, whole.positives, whole.unscored, whole.questions) == (14, 8, 2, 4)
    assert (whole.tpr, whole.tnr) == (pytest.approx(6 / 8), pytest.approx(4 / 6))
    assert whole.slope == pytest.approx(6 / 8 + 4 / 6 - 1)
    assert whole.agreement == pytest.approx(10 / 14)
    assert whole.rubric == SCALE.digest
    assert row(rows, "base").n + row(rows, "treated").n == 14
    scores = row(rows, kind="score")
    values = np.array([one.verdict.value for one in found if one.verdict.value is not None], float)
    truth = np.array([one.label.reference for one in found if one.verdict.value is not None], float)
    assert scores.slope == pytest.approx(np.polyfit(truth, values, 1)[0])
    assert scores.bias == pytest.approx((values - truth).mean())
    assert (scores.tpr, scores.kappa) == (None, None)


def test_a_thresholds_truth_is_the_references_side_of_it() -> None:
    found = [replace(one, label=one.label.model_copy(update={"reference": 40.0})) for one in scored([20.0, 35.0])]
    rows = table(found, {"nice": SCALE}, {"nice": [30.0, 50.0]})
    at = {one.threshold: one for one in rows if one.arm == "all" and one.kind == "rate"}
    assert (at[30.0].positives, at[50.0].positives) == (2, 0)


def test_scales_without_references_have_verdicts_only() -> None:
    found = [replace(one, label=one.label.model_copy(update={"reference": None})) for one in scored([10.0, 80.0] * 4)]
    assert {one.kind for one in table(found, {"nice": SCALE}, {"nice": [50.0]})} == {"rate"}
    assert row(table(found, {"nice": SCALE}, {"nice": [50.0]})).spearman is None


def test_turned_choices_show_a_judge_that_goes_by_position() -> None:
    readings = [
        Reading(label(index, index % 2), Verdict(0.9, label="yes"), Verdict(0.2 if index < 6 else 0.8, label="no"))
        for index in range(8)
    ]
    readings = [replace(one, label=one.label.model_copy(update={"rubric": "plants"})) for one in readings]
    whole = row(table(readings, {"plants": CHOICES}, {"plants": [0.5]}))
    assert whole.turned_flips == pytest.approx(6 / 8)
    assert whole.turned_shift == pytest.approx(-(6 * 0.7 + 2 * 0.1) / 8)
    assert list(turned(CHOICES).choices) == ["neither", "no", "yes"]
    assert turned(CHOICES).digest == CHOICES.digest


def test_the_middle_lies_between_the_lowest_and_the_highest_verdict() -> None:
    assert (middle(SCALE), middle(CHOICES)) == (50, 0.5)


def test_a_judge_that_never_gave_a_verdict_is_refused_and_not_zero() -> None:
    whole = row(table(scored([None] * 8), {"nice": SCALE}, {"nice": [50.0]}))
    assert (whole.n, whole.unscored, whole.tpr, whole.bias) == (0, 8, None, None)
    assert whole.refused == "no verdict on any of 8 answers"


def test_limits_may_be_numbers_or_arrays() -> None:
    many = correction.change(limits([0.2, -0.2], [0.1, -0.3], [0.3, -0.1]), limits([0.5, 0.5], [0.3, 0.3], [0.7, 0.7]))
    assert isinstance(many, Limits)
    assert many.value.tolist() == [0.4, -0.4]
