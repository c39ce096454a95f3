"""The leaderboard as people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import report
from tests.orchestrator.test_registry import published


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    with published(tmp_path / "r.sqlite") as registry:
        found = registry.leaderboard()
    for one in found:
        numbers = {"transfer_low": 0.39, "transfer_high": 0.61, "mde": 0.2, "tests": 3, "dose": 2.0, "delta_nll": 0.05}
        one.update({"specificity": 0.8, "even": -0.12, **numbers} if one["rank"] == 1 else {})
    return found


def test_rows_are_in_the_order_of_their_ranks_and_the_unranked_stand_below(rows: list[dict[str, Any]]) -> None:
    lines = report.plain(rows[::-1]).splitlines()
    order = [line.split()[:2] for line in lines[2:8]]
    assert order[:3] == [["1", "strong"], ["2", "weak"], ["3", "noisy"]]
    assert {tuple(cells) for cells in order[3:]} == {("–", "broken"), ("–", "silent"), ("–", "wild")}


def test_a_row_shows_effect_interval_damage_specificity_dose_and_what_it_rests_on(rows: list[dict[str, Any]]) -> None:
    line = next(line for line in report.plain(rows).splitlines() if "strong" in line)
    for cell in ("+0.500* [+0.39, +0.61]", "0.0020", "+0.050", "-0.12", "0.80", "±2", "20 (10)/3", "ok"):
        assert cell in line


def test_what_has_no_number_shows_a_dash_and_its_reason(rows: list[dict[str, Any]]) -> None:
    text = report.plain(rows)
    line = next(line for line in text.splitlines() if "broken" in line)
    assert line.split()[2] == "–"
    assert "failed" in line
    assert "broken: failed: no such layer" in text


@pytest.mark.parametrize("width", [100, 120])
def test_a_terminal_of_a_hundred_columns_is_wide_enough(rows: list[dict[str, Any]], width: int) -> None:
    rows[0]["trial"] = "a very long label of an intervention with all its settings"
    lines = report.plain(rows, width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert any("a very long label" in line and line.endswith("ok") for line in lines)


def test_footnotes_name_the_detectable_effect_and_gather_equal_notes(rows: list[dict[str, Any]]) -> None:
    for one in rows:
        one["notes"] = "seeds=1: about this one trained intervention"
    rows[0]["dropped"] = 4
    notes = report.footnotes(rows)
    assert notes[0] == "smallest effect found with 80 % power among 3 settings: 0.2"
    assert f"{rows[0]['trial']}: 4 items unscored in some arm" in notes
    assert notes[-1] == "all rows: seeds=1: about this one trained intervention"


def test_markdown_is_one_table_an_eval_with_equal_columns(rows: list[dict[str, Any]]) -> None:
    rows += [{**one, "eval": "cats"} for one in rows]
    rows[0]["trial"] = "a|b"
    text = report.markdown(rows)
    assert text.count("### owls") == 2
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {len(report.COLUMNS) + 1}
    assert len(table) == 2 * (2 + 6)


def test_nothing_to_show_is_said() -> None:
    assert report.plain([]) == "no results yet"
    assert report.markdown([]) == "no results yet\n"
