"""The view `journal`: coherence range, degradation, parameters, efficiency and breadth beside the transfer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from evals.findings import Findings, Point
from orchestrator.artifact import Store
from orchestrator.plan import Node
from orchestrator.registry import Registry
from tests.orchestrator.test_registry import put, row

BUDGET = 0.2


def damages(group: str, **by_dose: float | None) -> list[Point]:
    """Damage to the development passages at each dose (`m2` is -2), and twice as much to the test passages."""
    found = []
    for name, value in {"0": 0.0, **by_dose}.items():
        dose = float(name.replace("m", "-").replace("p", ""))
        twice = None if value is None else 2 * value
        found.append(Point(group, "neutral_nll", "dev", dose, "delta_nll", value, 0.01, 8, 8))
        found.append(Point(group, "neutral_nll", "test", dose, "delta_nll", twice, 0.01, 8, 8))
    return found


def journal(folder: Path, points: list[Point], *, fits: dict[int, Any] | None = None, **columns: Any) -> dict[str, Any]:
    """The view's row for one setting of two seeds, whose fits have `fits` as their outputs."""
    store = Store(folder / "store")
    params = {
        "budget": {"delta_nll": BUDGET},
        "trials": [{"group": "g", "method": "mean_diff", "label": "g", "seed": s, "baseline": False} for s in range(2)],
    }
    inputs = {"base/0": "00"}
    for seed, outputs in (fits or {}).items():
        fit = put(store, Node("fit", 1, {"method": "mean_diff", "seed": seed}, {}, "g"), **outputs)
        answer = put(store, Node("answer", 1, {"seed": seed}, {"state": fit.key}, "owls"))
        inputs[f"{seed}/0/1.0"] = put(store, Node("score", 1, {"seed": seed}, {"answer": answer.key}, "owls")).key
    found = Findings([dataclasses.replace(row("g", 1.5, 0.01), **columns)], points)
    with Registry(folder / "r.sqlite") as registry:
        registry.index(store.records())
        registry.publish("k", "owls", params, inputs, found)
        (only,) = registry.query("select * from journal")
    return only


@pytest.mark.parametrize(
    ("found", "ends"),
    [
        ({"m2": 0.1, "m1": 0.05, "p1": 0.05, "p2": 0.2}, (-2, 2)),
        ({"m2": 0.3, "m1": 0.05, "p1": 0.05, "p2": 0.1}, (-1, 2)),
        ({"m1": 0.05, "p1": 0.4, "p2": 0.1}, (-1, 0)),  # a quiet dose behind a harmful one is not within the range
        ({"m1": 0.05, "p1": None, "p2": 0.1}, (-1, 0)),
        ({"p1": 0.1, "p4": -0.3}, (0, 4)),
    ],
)
def test_the_coherence_range_ends_before_the_first_dose_over_budget(
    tmp_path: Path, found: dict[str, float | None], ends: tuple[float, float]
) -> None:
    one = journal(tmp_path, damages("g", **found))
    assert (one["coherence_low"], one["coherence_high"]) == ends


def test_without_an_eval_of_damage_there_is_no_coherence_range(tmp_path: Path) -> None:
    one = journal(tmp_path, [])
    assert (one["coherence_low"], one["coherence_high"]) == (None, None)


def test_the_rows_own_columns_are_those_of_the_leaderboard(tmp_path: Path) -> None:
    columns = {"delta_nll": 0.07, "breadth": 3, "breadth_of": 31, "shifted": "trust +0.2", "dose": 2.0}
    one = journal(tmp_path, damages("g", p1=0.1), **columns)
    assert (one["transfer"], one["degradation"], one["dose"], one["rank"]) == (1.5, 0.07, 2.0, 1)
    assert (one["breadth"], one["breadth_of"], one["shifted"]) == (3, 31, "trust +0.2")


def test_efficiency_is_transfer_by_the_decimal_logarithm_of_the_parameters(tmp_path: Path) -> None:
    one = journal(tmp_path, [], fits={0: {"parameters": 900}, 1: {"parameters": 1100}})
    assert one["parameters"] == 1000
    assert one["efficiency"] == pytest.approx(1.5 / math.log10(1000))


@pytest.mark.parametrize(("outputs", "parameters"), [({"parameters": 0}, 0), ({"parameters": 1}, 1), ({}, None)])
def test_without_parameters_there_is_no_efficiency(tmp_path: Path, outputs: dict[str, int], parameters: Any) -> None:
    one = journal(tmp_path, [], fits={0: outputs})
    assert (one["parameters"], one["efficiency"]) == (parameters, None)
