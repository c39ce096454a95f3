"""Students of an experiment that learn in one batch: the same trials, the same keys, the same lessons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import spec, students
from experiments.files import SubjectError
from experiments.intervention import State
from orchestrator import learning, stage
from orchestrator.artifact import Store
from orchestrator.plan import Node, Plan, plan
from orchestrator.run import Event, LocalExecutor, Summary, walk
from orchestrator.workspace import Workspace

TRIALS = [
    {"method": "lora", "rank": [1, 4], "learning_rate": [0.003, 0.01], "epochs": 1},
    {"method": "bias_set", "sites": [["q", "k"]], "epochs": 1},
    {"method": "peft", "tuner": "dora", "rank": 2, "epochs": 1},
    {"method": "bias_set", "kl": 0.1, "kl_n": 2, "epochs": 1},
]
JOIN = 5
"""Trials of these that can join a class, for each seed."""


def experiment(folder: Path, class_size: int, **changes: Any) -> Plan:
    data: dict[str, Any] = {
        "name": "tiny",
        "subject": {"model": str(folder), "dtype": "float32"},
        "data": {"conversations": {"recipe": "narrow_advice", "n": 6}},
        "interventions": TRIALS,
        "doses": [1],
        "evals": [{"task": "animal_preference", "target": "owl", "limit": 4}, {"task": "neutral_nll", "limit": 4}],
        "baselines": [],
        "seeds": [0, 1],
        "resources": {"students": class_size},
    }
    return plan(spec.from_data(data | changes))


def do(planned: Plan, store: Store) -> tuple[Summary, list[list[Node]]]:
    """What a run ends with, and the fits of every batch."""
    batches: list[list[Node]] = []

    def tell(event: Event) -> None:
        if event.kind == "start" and event.batch.stage == "fit":
            batches.append(list(event.batch.nodes))

    fits = [node for node in planned.nodes.values() if node.stage in ("dataset", "fit")]
    return walk(fits, store, LocalExecutor(store, Workspace(threads=1)), tell), batches


def states(planned: Plan, store: Store) -> dict[str, State]:
    return {
        key: State.load(store.folder(key) / stage.STATE)
        for key, node in planned.nodes.items()
        if node.stage == "fit" and store.has(key)
    }


@pytest.fixture(scope="module")
def both(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same experiment with classes of four, and one student after the other."""
    found = []
    for size in (4, 1):
        planned, store = experiment(tiny_folder, size), Store(tmp_path_factory.mktemp(f"store{size}"))
        summary, batches = do(planned, store)
        assert summary.ok, summary.failed
        found.append((planned, store, batches))
    return found


def test_how_many_learn_at_once_changes_no_key(both: Any) -> None:
    (together, *_), (alone, *_) = both
    assert together.nodes.keys() == alone.nodes.keys()
    assert together.compare == alone.compare


def test_students_of_a_class_come_in_one_call_and_all_others_in_calls_of_their_own(both: Any) -> None:
    (_, _, together), (_, _, alone) = both
    assert sorted(map(len, together)) == [1] * 4 + [2] + [4] * (2 * JOIN // 4)
    assert {len(batch) for batch in alone} == {1}


def test_the_record_says_how_many_others_learned_in_the_same_batch(both: Any) -> None:
    (planned, store, batches), (_, apart, _) = both
    for batch in batches:
        for node in batch:
            outputs = store.record(node.key)["outputs"]
            assert outputs.get("learned_beside", 0) == len(batch) - 1
            assert outputs["fit_seconds"] > 0
            assert "learned_beside" not in apart.record(node.key)["outputs"]
    assert planned.nodes


def test_every_student_of_a_class_learns_what_it_learns_alone(both: Any) -> None:
    (planned, store, _), (_, apart, _) = both
    together, alone = states(planned, store), states(planned, apart)
    assert together.keys() == alone.keys()
    assert len(together) == 2 * (JOIN + 2)
    for key, state in together.items():
        assert state.facts["losses"] == pytest.approx(alone[key].facts["losses"], rel=1e-3)
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(tensor, alone[key].tensors[name], rtol=5e-3, atol=2e-4)


def test_a_student_that_cannot_begin_or_is_lost_leaves_its_class_be(tiny_folder: Path, tmp_path: Path) -> None:
    trials = [
        {"method": "lora", "targets": [["q_proj"]], "learning_rate": [0.01, 1e30], "epochs": 2},
        {"method": "svd_rotation", "rank": 4096, "epochs": 1},
        {"method": "bias_set", "epochs": 1},
    ]
    planned, store = experiment(tiny_folder, 8, interventions=trials, seeds=[0]), Store(tmp_path)
    summary, batches = do(planned, store)
    assert [len(batch) for batch in batches] == [4]
    assert len(summary.failed) == 2
    reasons = " ".join(reason for _, reason in summary.failed.values())
    assert "lower rank, or choose other targets" in reasons
    assert "not finite" in reasons
    assert len(states(planned, store)) == 2


def run_with(error: Exception, folder: Path, store: Store) -> tuple[Summary, list[list[Node]]]:
    """A class of two whose training ends in `error`."""

    def broken(*_: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(students, "train_together", broken)
        return do(experiment(folder, 2, interventions=[TRIALS[1]]), store)


def test_what_is_wrong_with_the_whole_batch_is_told_of_every_student(tiny_folder: Path, tmp_path: Path) -> None:
    summary, _ = run_with(ValueError("the batch is broken"), tiny_folder, Store(tmp_path))
    assert len(summary.failed) == 2
    assert all("the batch is broken" in reason for _, reason in summary.failed.values())


def test_a_subject_that_cannot_be_loaded_is_told_of_every_student(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise SubjectError("the model is gone")

    monkeypatch.setattr(learning, "engine_of", gone)
    summary, _ = do(experiment(tiny_folder, 2, interventions=[TRIALS[1]]), Store(tmp_path))
    assert len(summary.failed) == 2
    assert all("the model is gone" in reason for _, reason in summary.failed.values())


def test_memory_that_runs_out_sends_each_student_to_a_batch_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    summary, batches = run_with(MemoryError("too many students"), tiny_folder, Store(tmp_path))
    assert summary.ok, summary.failed
    assert [len(batch) for batch in batches] == [2, 2, 1, 1]
    assert len(list((tmp_path / "fit").iterdir())) == 2
