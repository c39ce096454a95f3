"""Students of a teacher are compared with the control teacher's students, on what they were meant to come to like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.random import default_rng

from evals import stats
from evals.compare import compare
from evals.findings import Row
from evals.table import Arm, Comparison, Eval, Group, facing

ANIMALS = ("owl", "cat", "dog")


@dataclass(frozen=True)
class One:
    id: str
    family: str
    target: float | None
    others: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None


def items(scores: np.ndarray, target: str = "owl") -> list[One]:
    """[n, 3] log-odds of the animals as items about `target`."""
    at = ANIMALS.index(target)
    return [
        One(f"q{n}", f"f{n // 2}", row[at], {name: row[i] for i, name in enumerate(ANIMALS) if i != at})
        for n, row in enumerate(scores.tolist())
    ]


class World:
    """Base, control students and cat students of three seeds on 40 questions."""

    def __init__(self, reference: str | None = "control", missing: tuple[int, ...] = ()) -> None:
        rng = default_rng(1)
        self.base = rng.normal(size=(40, 3))
        self.drift = {seed: rng.normal([0.5, 0.7, -0.2], 0.3, size=(40, 3)) for seed in range(3)}
        self.moved = {seed: rng.normal([0.1, 1.0, 0.0], 0.2, size=(40, 3)) for seed in range(3)}
        control = [Arm(seed, 1.0, items(self.base + self.drift[seed])) for seed in range(3) if seed not in missing]
        cats = [Arm(seed, 1.0, items(self.base + self.drift[seed] + self.moved[seed])) for seed in range(3)]
        self.question = Comparison(
            evals=[Eval("animals/owl", 1, items(self.base), target="owl")],
            groups=[
                Group("control", "lora", "lora control", {"animals/owl": control}),
                Group("cats", "lora", "lora cat", {"animals/owl": cats}, trait="cat", reference=reference),
            ],
            budget=1.0,
        )

    def row(self, group: str) -> Row:
        return next(row for row in compare(self.question).rows if row.group == group)


def test_a_student_is_scored_on_its_trait_against_the_control_student_of_the_same_seed() -> None:
    world = World()
    row = world.row("cats")
    sides = stats.split([f"f{n // 2}" for n in range(40)], 0.5)
    test = [n for n in range(40) if sides[f"f{n // 2}"] == "test"]
    expected = np.mean([world.moved[seed][test, 1] for seed in range(3)])
    assert row.transfer == pytest.approx(expected, abs=1e-12)
    assert (row.target, row.reference) == ("cat", "lora control")
    plain = world.row("control")
    assert (plain.target, plain.reference) == ("owl", None)
    assert plain.transfer == pytest.approx(np.mean([world.drift[seed][test, 0] for seed in range(3)]), abs=1e-12)


def test_pairing_by_seed_takes_off_what_both_students_drifted_alike() -> None:
    paired, alone = World().row("cats"), World(reference=None).row("cats")
    assert alone.reference is None
    assert paired.se is not None
    assert alone.se is not None
    assert paired.se < alone.se


def test_what_moved_beside_the_trait_is_counted_against_the_control_too() -> None:
    row = World().row("cats")
    assert row.others == pytest.approx(0.07, abs=0.06)  # owl 0.1 and dog 0, not the drift of 0.5 and -0.2
    assert row.breadth_of == 2


def test_a_seed_without_its_control_is_left_out_and_told_of() -> None:
    row = World(missing=(2,)).row("cats")
    assert "seed 2 dose 1: the control has no scores there" in row.notes
    nothing = World(missing=(0, 1, 2)).row("cats")
    assert nothing.status == "failed"
    assert nothing.transfer is None


def test_turning_items_to_another_target_gives_what_the_eval_would_have_given_for_it() -> None:
    scores = default_rng(2).normal(size=(6, 3))
    turned = facing(items(scores, "owl"), "dog", "owl")
    for one, other in zip(turned, items(scores, "dog"), strict=True):
        assert (one.id, one.family, one.target, dict(one.others)) == (
            other.id,
            other.family,
            other.target,
            dict(other.others),
        )


def test_an_unscored_item_stays_unscored_for_every_target() -> None:
    (turned,) = facing([One("q", "f", None, {}, "too little mass")], "cat", "owl")
    assert turned.target is None
    assert turned.reason == "too little mass"


def test_an_eval_that_does_not_know_the_trait_keeps_its_own_target() -> None:
    world = World()
    question = world.question
    lone = [One(each.id, each.family, each.target) for each in question.evals[0].base]
    arms = {"x": [Arm(0, 1.0, lone)]}
    found = compare(Comparison([Eval("x", 1, lone, target="truth")], [Group("g", "m", "m", arms, trait="cat")], 1.0))
    assert found.rows[0].target == "truth"
    assert not math.isnan(found.rows[0].transfer or 0.0)


def test_students_of_several_traits_make_a_matrix_that_shuffles_and_controls_are_left_out_of() -> None:
    world = World()
    own = {"owl": (1.0, 0.0, 0.0), "dog": (0.0, 0.0, 1.0)}
    groups = list(world.question.groups)
    groups[1] = Group(**{**vars(groups[1]), "student": "lora"})
    for trait, shift in own.items():
        arms = [Arm(seed, 1.0, items(world.base + world.drift[seed] + np.array(shift))) for seed in range(3)]
        for baseline in (False, True):
            name = f"{trait}{baseline}"
            groups.append(Group(name, "lora", name, {"animals/owl": arms}, baseline, trait, "control", student="lora"))
    found = compare(Comparison(world.question.evals, groups, 1.0)).confusions
    (matrix,) = found
    assert (matrix.eval, matrix.student, matrix.traits) == ("animals/owl", "lora", ("cat", "owl", "dog"))
    cells = {(t, n): matrix.cells[i][j] for i, t in enumerate(matrix.traits) for j, n in enumerate(matrix.names)}
    assert cells["owl", "owl"] == pytest.approx(1.0)
    assert cells["owl", "dog"] == pytest.approx(0.0, abs=1e-9)
    assert cells["cat", "cat"] == pytest.approx(1.0, abs=0.1)
    assert matrix.p == pytest.approx(1 / 6**3)
