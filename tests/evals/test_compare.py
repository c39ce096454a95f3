"""Rows and curves of an experiment whose scores are known."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from evals import stats
from evals.compare import Arm, CompareError, Comparison, Eval, Group, Row, compare
from evals.findings import load, save
from evals.items import Item

N = 40
FAMILIES = [f"family-{i // 2}" for i in range(N)]
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=N)
NOISE = RNG.normal(0, 0.2, (4, N))


def items(scores: np.ndarray, others: np.ndarray | None = None) -> list[Item]:
    extra = np.zeros(N) if others is None else others
    return [
        Item(f"item-{i}", FAMILIES[i], None if math.isnan(x) else float(x), {"other": float(extra[i])})
        for i, x in enumerate(scores)
    ]


def passages(nll: float) -> list[Item]:
    return [Item(f"passage-{i}", f"passage-{i}", nll) for i in range(8)]


def group(
    name: str, odd: float, even: float = 0.0, *, doses=(1.0, 2.0), seeds=(0,), method="mean_diff", harm=0.01, side=0.0
) -> Group:
    """A linear intervention: odd and even effects and side effects per unit of dose, damage per unit of dose."""
    arms, harmed = [], []
    for seed in seeds:
        for dose in [sign * dose for dose in doses for sign in (1, -1)]:
            scores = BASE + odd * dose + even * abs(dose) + NOISE[seed] * dose
            arms.append(Arm(seed, dose, items(scores, np.full(N, side * dose))))
            harmed.append(Arm(seed, dose, passages(3 + harm * abs(dose))))
    return Group(name, method, f"{method} {name}", {"task": arms, "nll": harmed}, baseline=method == "random")


def swapped(one: Group, name: str, arms: list[Arm]) -> Group:
    """`one` with other arms on the eval `name`."""
    return dataclasses.replace(one, arms={**one.arms, name: arms})


def question(*groups: Group, base: np.ndarray = BASE, **settings) -> Comparison:
    evals = [Eval("task", 3, items(base)), Eval("nll", 1, passages(3.0), damage=True)]
    return Comparison(evals, groups, **{"budget": 0.1, **settings})


def rows(*groups: Group, **settings) -> dict[str, Row]:
    return {row.group: row for row in compare(question(*groups, **settings)).rows}


def test_steering_is_the_headline_and_a_drop_at_both_signs_is_a_side_effect() -> None:
    found = rows(group("steers", 0.5), group("breaks", 0.0, even=-0.5))
    steers, breaks = found["steers"], found["breaks"]
    assert steers.transfer == pytest.approx(1.0, abs=0.2)
    assert steers.significant
    assert breaks.transfer == pytest.approx(0, abs=0.2)
    assert not breaks.significant
    assert breaks.even == pytest.approx(-1.0)
    assert breaks.contrast == "odd"


def test_a_row_equals_a_paired_test_on_the_test_families_done_by_hand() -> None:
    row = rows(group("g", 0.5))["g"]
    sides = stats.split(FAMILIES, 0.5)
    effects = (0.5 + NOISE[0]) * 2  # dose 2: the larger effect, within the budget
    by_family = [
        np.mean([effects[i] for i in range(N) if FAMILIES[i] == family])
        for family in sorted(set(FAMILIES))
        if sides[family] == "test"
    ]
    assert row.dose == 2
    assert row.transfer == pytest.approx(np.mean(by_family))
    assert row.se == pytest.approx(np.std(by_family, ddof=1) / math.sqrt(10))
    assert (row.n_items, row.n_families, row.n_seeds, row.n_dropped, row.df) == (20, 10, 1, 0, 9)
    assert row.ci_low is not None
    assert row.ci_low < row.transfer < row.ci_high  # type: ignore[operator]
    assert row.eval_version == 3


def test_the_dose_is_the_largest_effect_that_the_budget_allows() -> None:
    tight = rows(group("g", 0.5, harm=0.08))["g"]
    assert (tight.dose, tight.status) == (1.0, "ok")
    assert tight.delta_nll == pytest.approx(0.08)


def test_a_group_over_budget_is_shown_at_its_least_damaging_dose_and_not_ranked() -> None:
    found = rows(group("mild", 0.5), group("wild", 5.0, harm=0.9))
    wild = found["wild"]
    assert (wild.status, wild.rankable, wild.p_holm, wild.significant) == ("over budget", False, None, False)
    assert wild.dose == 1
    assert wild.transfer == pytest.approx(5, abs=0.3)
    assert found["mild"].tests == 1


def test_damage_counts_at_the_worse_sign() -> None:
    one = group("g", 0.5)
    lopsided = [Arm(arm.seed, arm.dose, passages(3.3 if arm.dose < 0 else 2.9)) for arm in one.arms["nll"]]
    row = rows(swapped(one, "nll", lopsided))["g"]
    assert row.status == "over budget"
    assert row.delta_nll == pytest.approx(0.3)


def test_without_an_eval_of_damage_the_row_says_that_no_budget_was_applied() -> None:
    asked = question(group("g", 0.5, harm=9))
    row = compare(dataclasses.replace(asked, evals=asked.evals[:1])).rows[0]
    assert (row.status, row.delta_nll) == ("ok", None)
    assert "budget was not applied" in row.notes


def test_damage_unscored_at_every_dose_is_unscored_and_not_within_budget() -> None:
    one = group("g", 0.5)
    blank = [
        Arm(arm.seed, arm.dose, [Item(f"passage-{i}", f"passage-{i}", None) for i in range(8)])
        for arm in one.arms["nll"]
    ]
    row = rows(swapped(one, "nll", blank))["g"]
    assert (row.status, row.rankable) == ("unscored", False)


def test_items_unscored_in_one_arm_are_dropped_from_the_pair_and_counted() -> None:
    one = group("g", 0.5)
    sides = stats.split(FAMILIES, 0.5)
    lost = [i for i in range(N) if sides[FAMILIES[i]] == "test"][:3]
    arms = []
    for arm in one.arms["task"]:
        scores = np.array([item.target for item in arm.items or ()], dtype=float)
        if arm.dose == 2:
            scores[lost] = math.nan
        arms.append(Arm(arm.seed, arm.dose, items(scores)))
    row = rows(swapped(one, "task", arms))["g"]
    assert (row.n_dropped, row.n_items, row.rankable) == (3, 17, True)


def test_items_missing_from_an_arm_count_as_unscored() -> None:
    one = group("g", 0.5)
    arms = [Arm(arm.seed, arm.dose, list(arm.items or ())[:-1][::-1]) for arm in one.arms["task"]]
    row = rows(swapped(one, "task", arms))["g"]
    assert row.n_items + row.n_dropped == 20
    assert row.transfer == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("missing", ["all", "most of the test side"])
def test_a_group_without_scores_is_unscored_and_never_ranked(missing: str) -> None:
    one = group("g", 0.5)
    sides = stats.split(FAMILIES, 0.5)
    kept = [i for i in range(N) if sides[FAMILIES[i]] == "dev"]
    scores = np.full(N, math.nan)
    if missing != "all":
        scores[kept] = 1.0
    arms = [Arm(arm.seed, arm.dose, items(scores)) for arm in one.arms["task"]]
    row = rows(swapped(one, "task", arms), group("good", 0.5))["g"]
    assert (row.status, row.rankable, row.transfer, row.p_holm) == ("unscored", False, None, None)


def test_a_failed_group_is_a_row_that_says_why() -> None:
    one = group("g", 0.5)
    failed = [Arm(arm.seed, arm.dose, None, "ValueError: no such layer") for arm in one.arms["task"]]
    row = rows(swapped(one, "task", failed))["g"]
    assert (row.status, row.rankable, row.n_seeds) == ("failed", False, 0)
    assert "no such layer" in row.notes


def test_a_failed_seed_leaves_the_others_and_is_named() -> None:
    one = group("g", 0.5, seeds=(0, 1, 2))
    arms = [Arm(a.seed, a.dose, None, "out of memory") if a.seed == 1 else a for a in one.arms["task"]]
    row = rows(swapped(one, "task", arms))["g"]
    assert (row.status, row.n_seeds) == ("ok", 2)
    assert "seed 1 dose" in row.notes


def test_a_dose_that_is_not_there_for_every_seed_cannot_be_chosen() -> None:
    one = group("g", 0.5, seeds=(0, 1))
    arms = [arm for arm in one.arms["task"] if not (arm.seed == 1 and arm.dose == -2)]
    assert rows(swapped(one, "task", arms))["g"].dose == 1


def test_a_method_without_a_sign_is_compared_with_the_base() -> None:
    one = group("prompt", 0.5, method="prompt")
    positive = {name: [arm for arm in arms if arm.dose == 1] for name, arms in one.arms.items()}
    row = rows(dataclasses.replace(one, arms=positive))["prompt"]
    assert (row.contrast, row.dose, row.even) == ("on", 1, None)
    assert row.transfer == pytest.approx(0.5, abs=0.2)


def test_one_seed_says_so_and_more_seeds_widen_the_interval_by_their_disagreement() -> None:
    found = rows(group("one", 0.5), group("three", 0.5, seeds=(0, 1, 2)))
    assert "seeds=1" in found["one"].notes
    assert found["three"].n_seeds == 3
    assert found["three"].notes == ""
    disagreeing = [
        Arm(a.seed, a.dose, items(BASE + (a.seed - 1) * a.dose)) for a in group("x", 0, seeds=(0, 1, 2)).arms["task"]
    ]
    wide = rows(
        dataclasses.replace(
            group("x", 0.0, seeds=(0, 1, 2)),
            arms={"task": disagreeing, "nll": group("x", 0, seeds=(0, 1, 2)).arms["nll"]},
        )
    )["x"]
    assert wide.se == pytest.approx(2 / math.sqrt(3))
    assert not wide.significant


def test_an_effect_with_a_long_tail_against_it_needs_more_evidence_and_says_so() -> None:
    sides = stats.split(FAMILIES, 0.5)
    against = sorted(family for family, side in sides.items() if side == "test")[0]
    tailed = np.where([family == against for family in FAMILIES], -0.6, 0.6)
    one = group("g", 0.0)
    arms = [Arm(a.seed, a.dose, items(BASE + tailed * a.dose)) for a in one.arms["task"]]
    row = rows(swapped(one, "task", arms), alpha=0.01)["g"]
    assert row.ci_low > 0  # type: ignore[operator]
    assert row.p > 0.01  # type: ignore[operator]
    assert not row.significant
    assert "skewed effects" in row.notes


def test_holm_counts_the_rankable_groups_of_an_eval() -> None:
    found = rows(*(group(f"g{i}", effect) for i, effect in enumerate((0.5, 0.03, 0.01))), group("bad", 1, harm=9))
    ranked = [found[f"g{i}"] for i in range(3)]
    assert [row.p_holm for row in ranked] == pytest.approx(list(stats.holm([row.p for row in ranked])))
    assert found["g0"].tests == 3
    assert found["g0"].mde == pytest.approx(_detectable(found["g0"], 0.05 / 3))


def _detectable(row: Row, alpha: float) -> float:
    one = stats.Estimate(np.array(row.transfer), np.array([row.se**2]), np.array([row.df]))  # type: ignore[operator]
    return float(one.detectable(alpha))


def test_specificity_is_the_share_of_the_change_on_the_target() -> None:
    row = rows(group("g", 0.5, side=0.5))["g"]
    assert row.specificity == pytest.approx(0.5, abs=0.1)
    assert row.specificity_low is not None
    assert row.specificity_low < row.specificity < row.specificity_high  # type: ignore[operator]


def test_every_row_is_compared_with_the_random_control_at_its_own_dose() -> None:
    found = rows(group("random", 0.1, method="random"), group("g", 0.5, seeds=(1,)))
    assert found["random"].versus_control is None
    assert found["random"].baseline
    assert found["g"].versus_control == pytest.approx(found["g"].transfer - found["random"].transfer)  # type: ignore[operator]
    assert found["g"].versus_control_p is not None
    assert found["g"].versus_control_p < 0.05


def test_one_family_gives_no_interval_and_no_rank() -> None:
    one = group("g", 0.5)

    def in_two(arm: Arm) -> Arm:
        return dataclasses.replace(
            arm, items=[dataclasses.replace(item, family=f"half-{i % 2}") for i, item in enumerate(arm.items or ())]
        )

    asked = question(swapped(one, "task", [in_two(arm) for arm in one.arms["task"]]))
    base = [dataclasses.replace(item, family=f"half-{i % 2}") for i, item in enumerate(asked.evals[0].base)]
    row = compare(dataclasses.replace(asked, evals=[Eval("task", 3, base), asked.evals[1]])).rows[0]
    assert (row.status, row.rankable, row.se, row.p) == ("ok", False, None, None)
    assert "one family" in row.notes


def test_curves_go_through_zero_and_hold_every_dose_and_split() -> None:
    found = compare(question(group("g", 0.5, even=0.1)))
    effect = {(p.split, p.dose): p for p in found.points if p.metric == "effect"}
    assert sorted({dose for _, dose in effect}) == [-2, -1, 0, 1, 2]
    assert (effect["test", 0].value, effect["test", 0].se, effect["test", 0].n) == (0.0, 0.0, 20)
    odd = next(p for p in found.points if (p.metric, p.split, p.dose) == ("odd", "test", 2))
    assert odd.value == pytest.approx(found.rows[0].transfer)
    assert odd.n_clusters == 10
    assert {p.metric for p in found.points} == {"effect", "odd", "even", "other.other", "delta_nll"}
    damage = next(p for p in found.points if (p.metric, p.split, p.dose) == ("delta_nll", "dev", -2))
    assert damage.value == pytest.approx(0.02)


def test_findings_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    found = compare(question(group("g", 0.5), dataclasses.replace(group("f", 0.5), arms={})))
    save(found, tmp_path / "rows.json")
    assert load(tmp_path / "rows.json") == found
    json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(CompareError, match="no findings"):
        load(tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arms: [*arms, arms[0]], "there twice"),
        (lambda arms: [dataclasses.replace(arms[0], items=[Item("stranger", "f", 1.0)])], "which the base lacks"),
        (lambda arms: [dataclasses.replace(arms[0], items=[*arms[0].items, arms[0].items[0]])], "an item twice"),
    ],
)
def test_scores_that_do_not_belong_together_are_refused(change, message: str) -> None:
    one = group("g", 0.5)
    with pytest.raises(CompareError, match=message):
        rows(swapped(one, "task", change(one.arms["task"])))


def test_two_evals_of_damage_are_refused() -> None:
    asked = question(group("g", 0.5))
    with pytest.raises(CompareError, match="exactly one"):
        compare(dataclasses.replace(asked, evals=[*asked.evals, Eval("nll2", 1, passages(3), damage=True)]))


def test_rows_do_not_depend_on_the_order_of_arms_items_or_groups() -> None:
    one, two = group("a", 0.5, seeds=(0, 1)), group("b", 0.2)
    shuffled = {
        name: [dataclasses.replace(arm, items=list(arm.items or ())[::-1]) for arm in arms[::-1]]
        for name, arms in one.arms.items()
    }
    assert rows(one, two) == rows(two, dataclasses.replace(one, arms=shuffled))


def test_a_thousand_settings_take_seconds() -> None:
    many = [dataclasses.replace(group("g", 0.5), group=f"g{i}") for i in range(1000)]
    started = time.perf_counter()
    assert len(compare(question(*many)).rows) == 1000
    assert time.perf_counter() - started < 20
