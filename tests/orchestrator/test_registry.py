"""The registry: an index that can be rebuilt, in which nothing without a number has a rank."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import multiprocessing
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.findings import Findings, Point, Row, save
from orchestrator import schema
from orchestrator.artifact import Store
from orchestrator.plan import Node
from orchestrator.registry import Registry, RegistryError
from orchestrator.stage import FINDINGS

NAMES = {
    "group": "group_key",
    "label": "trial",
    "ci_low": "transfer_low",
    "ci_high": "transfer_high",
    "n_items": "n",
    "n_seeds": "seeds",
    "n_families": "families",
    "n_dropped": "dropped",
}
"""What the leaderboard calls a column."""
OK = {"status": "ok", "rankable": True, "contrast": "odd", "p": 0.01, "n_items": 20, "n_families": 10, "n_seeds": 3}


def row(name: str, transfer: float | None, p_holm: float | None, **changes: Any) -> Row:
    shared = {"group": name, "method": "mean_diff", "label": name, "baseline": False, "eval": "owls", "eval_version": 2}
    numbers = {"transfer": transfer, "p_holm": p_holm, "significant": p_holm is not None and p_holm < 0.05}
    return Row(**{**shared, **OK, **numbers, **changes})


ROWS = [
    row("weak", 0.1, 0.001),
    row("strong", 0.5, 0.002),
    row("noisy", 3.0, 0.4),
    row("broken", None, None, status="failed", rankable=False, notes="failed: no such layer"),
    row("silent", None, None, status="unscored", rankable=False),
    row("wild", 9.0, None, status="over budget", rankable=False),
]
POINTS = [
    Point("weak", "owls", "test", dose, "effect", value, 0.1, 20, 10) for dose, value in ((-1, -0.1), (0, 0), (1, 0.1))
]
FOUND = Findings(ROWS, POINTS)
PARAMS = {
    "budget": {"delta_nll": 0.2},
    "trials": [
        {"group": one.group, "method": one.method, "label": one.label, "seed": seed, "baseline": one.baseline}
        for one in ROWS
        for seed in (0, 1)
    ],
}


def published(path: Path, found: Findings = FOUND, **settings: Any) -> Registry:
    registry = Registry(path)
    registry.publish("k1", "owls", PARAMS, {}, found, submitted_at="2025-01-01T00:00:00+00:00", **settings)
    return registry


def put(store: Store, node: Node, findings: Findings | None = None, **outputs: Any) -> Node:
    with store.publishing(node) as draft:
        draft.outputs |= outputs
        if findings is not None:
            save(findings, draft.folder / FINDINGS)
    return node


def filled(store: Store) -> dict[str, Node]:
    """A small store: a fit, an answer, its score, the comparison, and a fit that failed."""
    fit = put(store, Node("fit", 1, {"method": "mean_diff", "seed": 0}, {}, "mean_diff L1"), fit_seconds=2.5)
    runtime = {"method": "mean_diff"}
    answer = put(store, Node("answer", 1, {"dose": 1.0}, {"state": fit.key}, "owls", runtime), eval_seconds=4.0)
    score = put(store, Node("score", 1, {}, {"answer": answer.key}, "owls"))
    compare = put(store, Node("compare", 1, PARAMS, {"base/0": "00", "0/0/1.0": score.key}, "owls"), FOUND)
    bad = Node("fit", 1, {"method": "mean_diff", "seed": 1}, {}, "mean_diff L9")
    store.fail(bad, "Traceback\nValueError: no layer 9")
    return {"fit": fit, "answer": answer, "score": score, "compare": compare, "bad": bad}


def test_the_leaderboard_puts_what_holm_leaves_first_then_the_larger_transfer(tmp_path: Path) -> None:
    with published(tmp_path / "r.sqlite") as registry:
        ranks = {one["trial"]: one["rank"] for one in registry.leaderboard()}
    assert ranks == {"strong": 1, "weak": 2, "noisy": 3, "broken": None, "silent": None, "wild": None}


def test_a_setting_that_significantly_moves_the_wrong_way_ranks_below_all_others(tmp_path: Path) -> None:
    found = Findings([*ROWS, row("backwards", -2.0, 0.001)], [])
    with published(tmp_path / "r.sqlite", found) as registry:
        ranks = {one["trial"]: one["rank"] for one in registry.leaderboard()}
    assert ranks["backwards"] == 4
    assert ranks["noisy"] == 3


def test_rows_come_out_as_they_went_in(tmp_path: Path) -> None:
    with published(tmp_path / "r.sqlite") as registry:
        kept = {one["trial"]: one for one in registry.leaderboard("owls")}
    for one in ROWS:
        for name, value in dataclasses.asdict(one).items():
            assert kept[one.label][NAMES.get(name, name)] == value, name


def test_every_column_of_a_row_and_a_point_has_its_place(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.sqlite") as registry:
        columns = [column.name for column in registry.db["comparisons"].columns]
        points = [column.name for column in registry.db["metrics"].columns]
    renamed = {"group": "group_key"}
    assert columns == ["experiment", *_in_order(Row, renamed, columns[1:])]
    assert points == ["experiment", *(renamed.get(field.name, field.name) for field in dataclasses.fields(Point))]


def _in_order(cls: type, renamed: dict[str, str], order: list[str]) -> list[str]:
    return sorted((renamed.get(field.name, field.name) for field in dataclasses.fields(cls)), key=order.index)


@pytest.mark.parametrize("missing", ["transfer", "p_holm"])
def test_a_rankable_row_with_nan_is_refused_and_changes_nothing(tmp_path: Path, missing: str) -> None:
    with published(tmp_path / "r.sqlite") as registry:
        poisoned = Findings([dataclasses.replace(ROWS[0], **{missing: math.nan})], [])
        with pytest.raises(RegistryError, match="must not enter the leaderboard"):
            registry.publish("k1", "owls", PARAMS, {}, poisoned)
        assert len(registry.leaderboard()) == len(ROWS)


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="CHECK"):
        published(tmp_path / "r.sqlite", Findings([dataclasses.replace(ROWS[0], status="fine")], []))  # type: ignore[arg-type]


def test_text_in_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="REAL"):
        published(tmp_path / "r.sqlite", Findings([dataclasses.replace(ROWS[0], se="wide")], []))  # type: ignore[arg-type]


def test_publishing_again_replaces_the_experiment(tmp_path: Path) -> None:
    with published(tmp_path / "r.sqlite") as registry:
        registry.publish("k1", "owls", PARAMS, {}, Findings(ROWS[:1], []), complete=False)
        assert [one["trial"] for one in registry.leaderboard()] == ["weak"]
        assert registry.query("select count(*) as n from metrics") == [{"n": 0}]
        assert registry.leaderboard()[0]["complete"] == 0


def test_the_latest_experiment_of_a_name_is_current_and_the_older_one_is_kept(tmp_path: Path) -> None:
    with published(tmp_path / "r.sqlite") as registry:
        registry.publish("k2", "owls", PARAMS, {}, Findings(ROWS[:1], []), submitted_at="2025-02-01T00:00:00+00:00")
        assert {one["experiment_key"] for one in registry.leaderboard()} == {"k2"}
        assert registry.query("select count(*) as n from leaderboard where not current") == [{"n": len(ROWS)}]


def test_a_rebuild_indexes_every_record_and_failure_of_a_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    nodes = filled(store)
    with Registry(tmp_path / "r.sqlite") as registry:
        assert registry.rebuild(store) == 4
        kept = {one["key"]: one for one in registry.query("select * from nodes")}
        assert set(kept) == {node.key for node in nodes.values()}
        assert kept[nodes["bad"].key]["status"] == "failed"
        assert "no layer 9" in kept[nodes["bad"].key]["error"]
        assert kept[nodes["fit"].key]["seconds"] >= 0
        assert registry.query("select fit from trials where trial = 0") == [{"fit": nodes["fit"].key}]
        assert registry.query("select fit from trials where trial = 1") == [{"fit": None}]
        assert len(registry.leaderboard("owls")) == len(ROWS)


def test_a_rebuilt_registry_equals_one_that_was_filled_step_by_step(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    nodes = filled(store)
    with Registry(tmp_path / "a.sqlite") as stepwise, Registry(tmp_path / "b.sqlite") as rebuilt:
        stepwise.index([record for record in store.records() if record["stage"] != "compare"])
        record = store.record(nodes["compare"].key)
        stepwise.index([record], [store.failure(nodes["bad"].key) or {}], lambda key: FOUND)
        rebuilt.rebuild(store)
        rebuilt.rebuild(store)
        for table in ("experiments", "nodes", "node_inputs", "trials", "metrics", "comparisons"):
            sql = f"select * from {table} order by 1, 2, 3"
            assert stepwise.query(sql) == rebuilt.query(sql) != [], table


def test_a_rebuild_that_fails_leaves_the_registry_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    nodes = filled(store)
    (store.folder(nodes["compare"].key) / FINDINGS).write_text("{}")
    with published(tmp_path / "r.sqlite") as registry:
        with pytest.raises(ValueError, match=r"findings|missing|short|changed"):
            registry.rebuild(store)
        assert len(registry.leaderboard()) == len(ROWS)


def test_failures_costs_and_curves_can_be_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    filled(store)
    with Registry(tmp_path / "r.sqlite") as registry:
        registry.rebuild(store)
        failed = registry.query("select * from failures")
        assert {(one["kind"], one["label"]) for one in failed} == {
            ("node", "mean_diff L9"), ("row", "broken"), ("row", "silent"), ("row", "wild"),
        }  # fmt: skip
        costs = {(one["stage"], one["method"]): one["seconds"] for one in registry.query("select * from costs")}
        assert costs["fit", "mean_diff"] == 2.5
        assert costs["answer", "mean_diff"] == 4.0
        curve = registry.query("select dose, value from dose_response where metric = 'effect' order by dose")
        assert [(one["dose"], one["value"]) for one in curve] == [(-1.0, -0.1), (0.0, 0.0), (1.0, 0.1)]
        assert registry.query("select * from drift") == []


def test_results_of_other_package_versions_show_as_drift(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    filled(store)
    records = list(store.records())
    old = {**records[0], "key": "old", "started": "2020-01-01T00:00:00+00:00"}
    old["packages"] = {**old["packages"], "torch": "1.0"}
    with Registry(tmp_path / "r.sqlite") as registry:
        registry.index([*records, old])
        (found,) = registry.query("select * from drift")
    assert (found["package"], found["version"], found["key"]) == ("torch", "1.0", "old")


def test_a_failure_that_succeeds_later_is_one_node(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    nodes = filled(store)
    with Registry(tmp_path / "r.sqlite") as registry:
        registry.rebuild(store)
        put(store, nodes["bad"])
        registry.index(store.records())
        (one,) = registry.query("select status, error from nodes where key = ?", [nodes["bad"].key])
    assert one == {"status": "have", "error": None}


def test_a_view_follows_its_file_and_a_view_without_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "views"
    folder.mkdir()
    (folder / "answer.sql").write_text("select 41 as it;\n")
    (folder / "gone.sql").write_text("select 1 as it")
    monkeypatch.setattr(schema, "VIEWS", folder)
    Registry(tmp_path / "r.sqlite").close()
    (folder / "answer.sql").write_text("select 42 as it")
    (folder / "gone.sql").unlink()
    with Registry(tmp_path / "r.sqlite") as registry:
        assert registry.query("select * from answer") == [{"it": 42}]
        assert [view.name for view in registry.db.views] == ["answer"]


def test_opening_an_unchanged_registry_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    published(path).close()
    before = path.read_bytes()
    Registry(path).close()
    Registry(path, write=False).close()
    assert path.read_bytes() == before


def test_reading_cannot_write(tmp_path: Path) -> None:
    published(tmp_path / "r.sqlite").close()
    with Registry(tmp_path / "r.sqlite", write=False) as registry:
        assert len(registry.leaderboard()) == len(ROWS)
        with pytest.raises(RegistryError, match="cannot be written"):
            registry.publish("k2", "owls", PARAMS, {}, FOUND)


def test_a_damaged_file_says_that_it_can_be_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"not a database, but long enough to be read as one" * 40)
    with pytest.raises(RegistryError, match=r"delete it and run: orch registry rebuild"):
        Registry(path)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("create table bookmarks (url text)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RegistryError, match="another program's database"):
        Registry(path)
    assert path.read_bytes() == before


def test_a_registry_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.sqlite") as registry:
        registry.db["_sqlite_migrations"].insert({"migration_set": "orch", "name": "columns_of_2030", "applied_at": ""})
    with pytest.raises(RegistryError, match=r"newer version of orch.*columns_of_2030"):
        Registry(tmp_path / "r.sqlite")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [("", True, "is a folder"), ("absent/r.sqlite", True, "not there"), ("absent.sqlite", False, "registry rebuild")],
)
def test_a_path_that_cannot_be_a_registry_is_refused(tmp_path: Path, name: str, write: bool, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        Registry(tmp_path / name, write=write)


def test_a_wrong_question_says_where_the_tables_are_listed(tmp_path: Path) -> None:
    with Registry(tmp_path / "r.sqlite") as registry, pytest.raises(RegistryError, match="sqlite-utils schema"):
        registry.query("select * from nothing")


def _publish_many(path: Path, start: int) -> None:
    with Registry(path) as registry:
        for number in range(start, start + 15):
            registry.publish(f"k{number}", f"e{number}", PARAMS, {}, FOUND)


def test_several_processes_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_publish_many, args=(path, start)) for start in (0, 15, 30)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    with Registry(path) as registry:
        assert registry.query("select count(*) as n from experiments") == [{"n": 45}]


def test_sqlite_utils_reads_the_leaderboard_from_the_command_line(tmp_path: Path) -> None:
    published(tmp_path / "r.sqlite").close()
    command = [sys.executable, "-m", "sqlite_utils", "query", str(tmp_path / "r.sqlite")]
    done = subprocess.run(
        [*command, "select trial from leaderboard where rank = 1", "--csv"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["trial", "strong"]


def test_datasette_shows_the_leaderboard(tmp_path: Path) -> None:
    app = pytest.importorskip("datasette.app")
    published(tmp_path / "r.sqlite").close()

    async def get() -> Any:
        return await app.Datasette([str(tmp_path / "r.sqlite")]).client.get("/r/leaderboard.json?_shape=array&rank=1")

    answer = asyncio.run(get())
    assert answer.status_code == 200
    assert [one["trial"] for one in answer.json()] == ["strong"]
