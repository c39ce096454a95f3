"""The confusion matrix of datasets and traits, and the permutation test that decides about it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.random import default_rng
from scipy.stats import kstest

from evals.confusion import MOST, confusion, permutation_p

ANIMALS = ("owl", "cat", "dog", "wolf")


def rows(cells: np.ndarray, names: tuple[str, ...] = ANIMALS) -> dict[str, dict[str, np.ndarray]]:
    """[D, K, S] as the function takes them."""
    return {names[d]: {names[k]: cells[d, k] for k in range(cells.shape[1])} for d in range(cells.shape[0])}


def test_the_p_value_is_the_share_of_assignments_that_do_as_well() -> None:
    cells = default_rng(0).normal(size=(4, 4, 1))
    sums = [sum(cells[d, order[d], 0] for d in range(4)) for order in itertools.permutations(range(4))]
    expected = np.mean([each >= sums[0] - 1e-12 for each in sums])
    assert permutation_p(cells, shared=True) == (pytest.approx(expected), 1 / 24)


def test_seeds_with_data_of_their_own_are_relabelled_each_by_itself() -> None:
    cells = default_rng(1).normal(size=(3, 3, 2))
    orders = list(itertools.permutations(range(3)))
    sums = [sum(cells[d, one[d], 0] + cells[d, two[d], 1] for d in range(3)) for one in orders for two in orders]
    expected = np.mean([each >= sums[0] - 1e-12 for each in sums])
    assert permutation_p(cells, shared=False) == (pytest.approx(expected), 1 / 36)


def test_a_clear_diagonal_has_the_smallest_p_there_is_and_data_shared_by_seeds_a_larger_one() -> None:
    cells = default_rng(2).normal(0, 0.1, size=(4, 4, 3)) + np.eye(4)[:, :, None]
    own, shared = (confusion("e", "lora", rows(cells), each) for each in (False, True))
    assert own.p == pytest.approx(1 / 24**3) == own.smallest
    assert shared.p == pytest.approx(1 / 24) == shared.smallest
    mean = cells.mean(-1)
    assert own.excess == pytest.approx(np.diag(mean).mean() - mean[~np.eye(4, dtype=bool)].mean())


def test_what_all_students_move_alike_changes_nothing() -> None:
    cells = default_rng(3).normal(size=(4, 4, 2))
    moved = cells + default_rng(4).normal(size=(1, 4, 2))  # by column: what the control student moves
    assert permutation_p(cells, shared=False) == pytest.approx(permutation_p(moved, shared=False))


@pytest.mark.parametrize("shared", [False, True])
def test_without_transfer_p_is_no_smaller_than_it_should_be(shared: bool) -> None:
    rng = default_rng(5)
    luck = rng.normal(size=(600, 4, 4, 1)) if shared else np.zeros((600, 4, 4, 1))
    found = [permutation_p(rng.normal(0, 0.3, size=(4, 4, 2)) + each, shared)[0] for each in luck]
    for alpha in (0.05, 0.1, 0.25, 0.5):
        assert np.mean(np.array(found) <= alpha) <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 600)
    if not shared:
        assert kstest(found, "uniform").pvalue > 1e-3


def test_many_assignments_are_drawn_and_the_identity_counts() -> None:
    cells = default_rng(6).normal(0, 0.1, size=(5, 5, 3)) + np.eye(5)[:, :, None]
    p, smallest = permutation_p(cells, shared=False)
    assert p == smallest == 1 / (MOST + 1)


def test_other_names_stand_behind_the_traits_and_take_no_part_in_the_test() -> None:
    cells = default_rng(7).normal(size=(2, 4, 2))
    made = confusion("e", "lora", rows(cells), False)
    assert made.names == ("owl", "cat", "dog", "wolf")
    assert made.traits == ("owl", "cat")
    assert made.p == permutation_p(cells[:, :2], False)[0]
    assert np.array(made.cells) == pytest.approx(cells.mean(-1))


def test_one_trait_or_a_missing_cell_has_no_p() -> None:
    lone = confusion("e", "lora", rows(np.ones((1, 3, 2))), False)
    assert (lone.p, lone.excess) == (None, None)
    cells = np.ones((2, 2, 2))
    cells[0, 1, 0] = np.nan
    holed = confusion("e", "lora", rows(cells), False)
    assert holed.p is None
    assert holed.cells[0][1] is None
