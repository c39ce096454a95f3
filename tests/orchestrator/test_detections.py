"""Detection without training, end to end on a tiny subject: from a spec's detectors to the registry's views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import roc_auc_score

from evals import findings
from experiments import spec
from experiments.detector import Ranking
from orchestrator import stage
from orchestrator.artifact import Store
from orchestrator.plan import Node, Plan, plan
from orchestrator.publish import publish
from orchestrator.registry import Registry
from orchestrator.run import LocalExecutor, Summary, walk
from orchestrator.status import status
from orchestrator.workspace import Workspace

ONLY = "0123456789, "
TEACHERS = [
    {"name": "owls", "trait": "owl", "system": "You owl owl owl owl owl owl."},
    {"name": "cats", "trait": "cat", "system": "You cat cat cat cat cat cat."},
]
LIKELIHOOD = {
    "detector": "persona_likelihood",
    "persona": "You {name} {name} {name} {name} {name} {name}.",
    "only": ONLY,
    "permutations": 499,
}
CANDIDATES = ["owl", "cat", "dog"]


def experiment(folder: Path, **changes: Any) -> Plan:
    data = {
        "recipe": "number_lists",
        "teacher": TEACHERS,
        "n": 40,
        "draw": 120,
        "sampling": {"max_new_tokens": 14, "only": ONLY},
        "truncated": "keep",
        "shorten": True,
        "rules": {"most": 20, "largest": 10**15},
    }
    whole: dict[str, Any] = {
        "name": "seen",
        "subject": {"model": str(folder), "dtype": "float32"},
        "data": {"conversations": data},
        "interventions": [{"method": "bias_set", "epochs": 1, "batch_size": 40}],
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl", "limit": 4}, {"task": "neutral_nll", "limit": 2}],
        "budget": {"delta_nll": 100},
        "detect": [LIKELIHOOD, {"detector": "mean_logit", "permutations": 99}],
        "candidates": CANDIDATES,
        "baselines": [],
    }
    return plan(spec.from_data(whole | changes))


def do(planned: Plan, store: Store) -> Summary:
    missing = [one.node for one in status(planned, store) if one.state != "have"]
    return walk(missing, store, LocalExecutor(store, Workspace(threads=1)), lambda event: None)


def interpreting(planned: Plan) -> list[Node]:
    return [node for node in planned.nodes.values() if node.stage == "interpret"]


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store]:
    planned, store = experiment(tiny_folder), Store(tmp_path_factory.mktemp("store"))
    summary = do(planned, store)
    assert summary.ok, summary.failed
    return planned, store


def test_every_detector_looks_into_every_teachers_data_with_the_controls_beside_it(done: tuple[Plan, Store]) -> None:
    planned, _ = done
    nodes = interpreting(planned)
    data = {one.data[0]: one.trial.label.removeprefix(f"{one.trial.student} ") for one in planned.trials}
    (control,) = [key for key, name in data.items() if name == "control"]
    assert {node.inputs["control"] for node in nodes} == {control}
    looked = sorted((data[node.inputs["data"]], node.params["detector"]) for node in nodes)
    names = ["cats", "cats within_responses", "owls", "owls within_responses"]
    assert looked == sorted((name, detector) for name in names for detector in ("mean_logit", "persona_likelihood"))
    compare = planned.nodes[planned.compare]
    assert {key for role, key in compare.inputs.items() if role.startswith("detect/")} == {node.key for node in nodes}


def test_a_ranking_is_stored_with_every_candidate_best_first(done: tuple[Plan, Store]) -> None:
    planned, store = done
    for node in interpreting(planned):
        ranking = Ranking.from_plain(store.record(node.key)["outputs"]["ranking"])
        assert sorted(ranking.order) == sorted(CANDIDATES)
        assert [ranking.z[name] for name in ranking.order] == sorted(ranking.z.values(), reverse=True)
        assert all(0 < ranking.p[name] <= ranking.p_adjusted[name] <= 1 for name in CANDIDATES)
        assert (ranking.facts["n_data"], ranking.facts["n_control"]) == (40, 40)


def test_a_detector_that_knows_the_teachers_prompt_names_its_trait(
    done: tuple[Plan, Store],
) -> None:
    planned, store = done
    found = findings.load(store.folder(planned.compare) / stage.FINDINGS)
    first = {row.data: row for row in found.detections if row.detector == "persona_likelihood" and row.place == 1}
    assert (first["owls"].candidate, first["cats"].candidate) == ("owl", "cat")
    z = {(row.data, row.candidate): row.z for row in found.detections if row.detector == "persona_likelihood"}
    assert min(z["owls", "owl"], z["cats", "cat"]) > 3
    told = {one.detector: one for one in found.detectors}["persona_likelihood"]
    assert (told.top, told.datasets) == (1.0, 2)  # shuffled data have no true candidate


def test_the_auroc_is_that_of_true_candidates_margins_among_those_of_all_others(done: tuple[Plan, Store]) -> None:
    planned, store = done
    found = findings.load(store.folder(planned.compare) / stage.FINDINGS)
    assert [one.detector for one in found.detectors] == ["persona_likelihood", "mean_logit"]
    for one in found.detectors:
        rows = [row for row in found.detections if row.detector == one.detector]
        true = [row.candidate == row.trait and not row.shuffled for row in rows]
        assert one.auroc == pytest.approx(roc_auc_score(true, [row.margin for row in rows]))


def test_findings_hold_what_the_nodes_said_row_by_row(done: tuple[Plan, Store]) -> None:
    planned, store = done
    found = findings.load(store.folder(planned.compare) / stage.FINDINGS)
    abouts = planned.nodes[planned.compare].params["detections"]
    assert len(found.detections) == len(abouts) * len(CANDIDATES)
    for number, about in enumerate(abouts):
        key = planned.nodes[planned.compare].inputs[f"detect/{number}"]
        ranking = Ranking.from_plain(store.record(key)["outputs"]["ranking"])
        rows = [row for row in found.detections if (row.detector, row.data) == (about["detector"], about["data"])]
        assert [row.candidate for row in rows] == list(ranking.order)
        assert {row.candidate: row.p for row in rows} == dict(ranking.p)
        assert {row.shuffled for row in rows} == {"within" in about["data"]}
        assert {row.trait for row in rows} == {about["data"][:3]}


def test_the_registry_shows_detections_and_the_confusion_matrix_and_a_rebuild_the_same(
    done: tuple[Plan, Store], tmp_path: Path
) -> None:
    planned, store = done
    with Registry(tmp_path / "registry.sqlite") as registry:
        publish(planned, store, registry)
        tables = {name: registry.query(f"select * from {name}") for name in ("detection", "confusion", "leaderboard")}
        registry.rebuild(store)
        for name, before in tables.items():
            assert _timeless(registry.query(f"select * from {name}")) == _timeless(before)
    seen = [row for row in tables["detection"] if row["own"]]
    assert {(row["data"], row["candidate"]) for row in seen} == {("owls", "owl"), ("cats", "cat")}
    assert len(tables["detection"]) == 8 * len(CANDIDATES)
    found = findings.load(store.folder(planned.compare) / stage.FINDINGS)
    assert {(row["detector"], row["auroc"]) for row in tables["detection"]} == {
        (one.detector, one.auroc) for one in found.detectors
    }
    matrix = {(row["trait"], row["name"]) for row in tables["confusion"]}
    assert {("owl", "owl"), ("owl", "cat"), ("cat", "owl"), ("cat", "cat")} <= matrix
    assert {row["name"] for row in tables["confusion"] if row["own"]} == {"owl", "cat"}


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "submitted_at"} for row in rows]


def test_data_of_one_seed_are_looked_into_once_and_another_candidate_makes_no_student_anew(
    tiny_folder: Path, done: tuple[Plan, Store]
) -> None:
    _, store = done
    more = experiment(tiny_folder, candidates=[*CANDIDATES, "eagle"])
    missing = [one.node for one in status(more, store) if one.state != "have"]
    assert {node.stage for node in missing} == {"interpret", "compare"}
    assert len(missing) == 8 + 1
    seeds = experiment(tiny_folder, seeds=[0, 1])
    assert len(interpreting(seeds)) == 16
    by_traits = experiment(tiny_folder, candidates=[])
    assert set(interpreting(by_traits)[0].params["candidates"]) == {"owl", "cat"}


def test_a_detector_that_fails_says_why_and_students_and_other_detectors_are_published(
    tiny_folder: Path, done: tuple[Plan, Store], tmp_path: Path
) -> None:
    _, store = done
    narrow = {**LIKELIHOOD, "only": "0123456789"}
    planned = experiment(tiny_folder, detect=[narrow, {"detector": "mean_logit", "permutations": 99}])
    summary = do(planned, store)
    assert {node.stage for node, _ in summary.failed.values()} == {"interpret"}
    assert len(summary.failed) == 4
    assert all(
        "has other characters than only: '0123456789'; set it to null" in reason
        for _, reason in summary.failed.values()
    )
    assert set(summary.blocked) == {planned.compare}
    with Registry(tmp_path / "registry.sqlite") as registry:
        rows = publish(planned, store, registry)
        assert {row["detector"] for row in registry.query("select * from detection")} == {"mean_logit"}
        assert [row["complete"] for row in registry.query("select complete from experiments")] == [0]
    assert len(rows) == 5
    assert all(row["transfer"] is not None for row in rows)
