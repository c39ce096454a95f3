"""The journal's score: its tables come out again, and what its size means under the null."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from evals.journal import FEWEST, JournalError, journal_score, null_quantile, of_curves, symlog

JOURNAL = Path(__file__).parents[3] / "shared" / "seeds"
ROUNDED = 0.005 + 1e-9
"""Half a unit of the last digit that the tables show."""
Interval = tuple[float, float]
FIVE = (-2, -0.75, 0, 0.75, 2)


def rows() -> Iterator[tuple[int, dict[str, float]]]:
    """(line, column -> number) of every row of a table with a score in the journal."""
    (file,) = JOURNAL.glob("004*.txt")
    columns: list[str] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            columns = []
        elif {"slope", "r2", "score"} <= set(cells):
            columns = cells[1:]
        elif columns and not set(line) <= set("|:- "):  # names of methods may hold a bar: count from the right
            yield number, dict(zip(columns, map(float, cells[-len(columns) :]), strict=True))


def around(value: float, smallest: float = 0.0) -> Interval:
    """What the shown number may have been, as a magnitude."""
    return max(smallest, abs(value) - ROUNDED), abs(value) + ROUNDED


def product(*factors: Interval) -> Interval:
    return math.prod(low for low, _ in factors), math.prod(high for _, high in factors)


def meets(found: Interval, shown: float) -> bool:
    return found[0] <= shown + ROUNDED and found[1] >= shown - ROUNDED


def test_the_journals_tables_are_reproduced_within_rounding() -> None:
    if not list(JOURNAL.glob("004*.txt")):
        pytest.skip("the journal lies in ../shared, which is not here")
    counts = {"early": [0, 0, 0], "late": [0, 0, 0], "other": [0, 0, 0]}
    for number, row in rows():
        count = counts["early" if number <= 296 else "late" if number <= 330 else "other"]
        if math.isnan(row["score"]):
            continue
        valid = around(row["valid_frac"])
        b = product(around(row["slope"]), around(row["r2"]), valid, valid)
        spread = row["max"] - row["min"]
        c = product(b, (max(0.0, spread - 2 * ROUNDED), spread + 2 * ROUNDED))
        count[0] += 1
        count[1] += meets(b, row["score"])
        count[2] += meets(c, row["score"])
    assert counts["early"][:2] == [129, 129]
    assert counts["late"][:2] == [23, 23]
    assert (counts["other"][0], counts["other"][2]) == (56, 56)
    assert counts["late"][2] == 0  # so the two halves of one table are not comparable
    assert counts["other"][1] < 20


def test_the_score_of_a_line_is_its_slope() -> None:
    values = [3 + 2 * x for x in symlog(FIVE)]
    found = journal_score(FIVE, values)
    assert found.slope == pytest.approx(2)
    assert (found.r2, found.valid) == (pytest.approx(1), 1)
    assert found.b == pytest.approx(2)
    assert found.c == pytest.approx(2 * 4 * math.log(3))
    assert journal_score(FIVE, [-value for value in values]).b == pytest.approx(2)  # the wrong way is as good


def test_a_curve_agrees_with_its_normal_equations() -> None:
    values = [1.0, 0.2, 0.9, 2.5, 2.2]
    x, y = symlog(FIVE), np.array(values)
    design = np.stack([np.ones(5), x], 1)
    constant, slope = np.linalg.solve(design.T @ design, design.T @ y)
    r2 = 1 - ((y - constant - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    found = journal_score(FIVE, values)
    assert found.b == pytest.approx(abs(slope) * r2)
    assert found.c == pytest.approx(abs(slope) * r2 * 2.3)
    assert journal_score(FIVE, [value - 7 for value in values]).b == pytest.approx(found.b)


def test_invalid_doses_count_squared_and_fewer_than_three_valid_ones_are_no_score() -> None:
    values = [None, *(2 * x for x in symlog(FIVE[1:4])), math.nan]
    assert journal_score(FIVE, values).b == pytest.approx(2 * 0.6**2)
    few = journal_score(FIVE, [None, None, None, 1.0, 2.0])
    assert few.valid == pytest.approx(0.4)
    assert math.isnan(few.b)


@pytest.mark.parametrize(
    ("doses", "values"), [([], []), ([1.0], [1.0, 2.0]), ([1.0] * 3, [1.0, 2.0, 3.0])], ids=["none", "uneven", "one"]
)
def test_what_is_no_curve_is_refused(doses: list[float], values: list[float | None]) -> None:
    with pytest.raises(JournalError, match=r"needed|different"):
        journal_score(doses, values)


def test_interventions_that_do_nothing_score_what_the_null_distribution_says() -> None:
    rng = np.random.default_rng(0)
    scores = np.array([journal_score(FIVE, list(1.3 * rng.standard_normal(5))).b for _ in range(3000)])
    expected = null_quantile(FIVE, 1.3, 0.95)
    assert expected == pytest.approx(0.98, abs=0.01)  # as simulated before it was solved
    assert abs((scores <= expected).mean() - 0.95) <= 4 * math.sqrt(0.95 * 0.05 / 3000)
    best = scores.reshape(-1, 15).max(1)
    median = null_quantile(FIVE, 1.3, 0.5, best_of=15)
    assert median == pytest.approx(1.0, abs=0.05)
    assert abs((best <= median).mean() - 0.5) <= 4 * math.sqrt(0.25 / 200)


def test_the_null_grows_with_the_noise_and_falls_with_the_doses() -> None:
    three, nine = (-2, 0, 2), (-15, -5, -2, -0.75, 0, 0.75, 2, 5, 15)
    assert null_quantile(FIVE, 2.6, 0.95) == pytest.approx(2 * null_quantile(FIVE, 1.3, 0.95))
    assert null_quantile(three, 1.3, 0.95) == pytest.approx(1.46, abs=0.02)
    assert null_quantile(nine, 1.3, 0.95) < 0.25 < null_quantile(FIVE, 1.3, 0.95)
    with pytest.raises(JournalError, match="are needed"):
        null_quantile((1, 1, 1), 1.3, 0.95)


def test_a_finished_experiment_has_a_journal_score_for_each_curve() -> None:
    def point(label: str, dose: float, value: float | None, metric: str = "effect", split: str = "test") -> dict:
        names = {"eval": "task", "label": label, "group_key": label, "metric": metric, "split": split}
        return names | {"dose": dose, "value": value}

    points = [point("steep", dose, 2 * x) for dose, x in zip(FIVE, symlog(FIVE), strict=True)]
    points += [point("flat", dose, 0.1 * x) for dose, x in zip(FIVE, symlog(FIVE), strict=True)]
    points += [point("steep", dose, 99.0, split="dev") for dose in FIVE]
    points += [point("steep", dose, 99.0, metric="odd") for dose in FIVE]
    points += [point("broken", dose, None if dose else 0.0) for dose in FIVE]
    points += [point("short", dose, 1.0) for dose in (0, 1)]
    table = of_curves(points)
    assert [row["label"] for row in table] == ["steep", "flat", "broken"]
    assert table[0]["B"] == pytest.approx(2)
    assert (table[2]["B"], table[2]["valid"]) == (None, pytest.approx(0.2))
    assert FEWEST == 3
