from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.artifact import Store, StoreError
from orchestrator.plan import Node
from orchestrator.run import LocalExecutor, walk
from orchestrator.stage import Outcome, WorkerLost, each
from orchestrator.workspace import Workspace
from tests.orchestrator import drive

ROOT = Path(__file__).parent.parent.parent


def start(store: Path, pace: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.orchestrator.drive", str(store), str(pace)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def begun(store: Path) -> list[str]:
    log = store / "begun.log"
    return log.read_text().split() if log.exists() else []


def wait_until_begun(store: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(begun(store)) < count:
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)


def records(store: Path) -> set[str]:
    return {record["key"] for record in Store(store).records()}


def finish(store: Path) -> set[str]:
    """Submit again, to the end. Gives what was computed once more although it had a record: nothing, that is."""
    had = records(store)
    before = begun(store)
    assert drive.go(str(store), 0.0).ok
    assert records(store) == {node.key for node in drive.nodes()}
    for record in Store(store).records():
        assert set(record["files"]) == {"half", "whole"}
    return had & set(begun(store)[len(before) :])


def leftovers(store: Path) -> list[Path]:
    return [path for path in store.rglob(".tmp-*") if path.is_dir()]


def test_a_run_killed_in_the_middle_of_a_node_is_finished_by_the_next_one(tmp_path: Path) -> None:
    process = start(tmp_path, 0.3)
    wait_until_begun(tmp_path, 3)
    process.kill()
    process.wait()
    assert 0 < len(records(tmp_path)) < 12
    assert finish(tmp_path) == set()
    assert max(Counter(begun(tmp_path)).values()) == 2
    assert leftovers(tmp_path) == []


def test_an_interrupted_run_leaves_nothing_half_written_and_resumes(tmp_path: Path) -> None:
    process = start(tmp_path, 1.0)  # so slow that a busy machine still sends the signal in time
    wait_until_begun(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output == "interrupted\n"
    assert leftovers(tmp_path) == []
    assert not any(Store(tmp_path).failure(node.key) for node in drive.nodes())
    assert finish(tmp_path) == set()


def test_of_two_runs_at_once_the_second_waits_says_so_and_finds_everything_done(tmp_path: Path) -> None:
    first = start(tmp_path, 0.1)
    wait_until_begun(tmp_path, 1)
    second = start(tmp_path, 0.1)
    told, _ = second.communicate(timeout=30)
    assert first.wait() == second.returncode == 0
    assert f"waiting for process {first.pid}" in told
    assert told.endswith("done 0\n")
    assert set(Counter(begun(tmp_path)).values()) == {1}


def test_a_full_disk_stops_the_run_with_one_message_and_the_next_run_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        if self.name == "whole" and len(begun(tmp_path)) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(StoreError, match="no space left"):
            drive.go(str(tmp_path), 0.0)
    assert len(begun(tmp_path)) == 4
    assert len(records(tmp_path)) == 3
    assert leftovers(tmp_path) == []
    assert finish(tmp_path) == set()


def test_a_record_edited_by_hand_is_refused_and_only_what_needs_it_stops(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fits, scores = drive.nodes(2)[:2], drive.nodes(2)[2:]
    walk(fits, store, LocalExecutor(store, Workspace(), drive.work(0.0)), lambda event: None)
    path = next(tmp_path.glob("fit/chore-0-*/record.json"))
    path.write_text(path.read_text().replace('"label": "chore 0"', '"label": "chore nought"'))

    def read(batch: Any, store: Store, workspace: Workspace) -> list[Outcome]:
        return each(batch, store, lambda node, draft: len(str(store.folder(node.inputs["fit"]))))

    summary = walk(scores, store, LocalExecutor(store, Workspace(), read), lambda event: None)
    assert len(summary.done) == 1
    ((_, reason),) = summary.failed.values()
    assert "changed after it was written" in reason
    assert "delete" in reason


def test_out_of_memory_ends_the_worker_and_is_no_failure_of_the_node(tmp_path: Path) -> None:
    class OutOfMemoryError(RuntimeError):
        """Named like torch's."""

    store = Store(tmp_path)
    node = Node("fit", 1, {"n": 1}, {}, "large")
    for error in (MemoryError(), OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")):

        def burst(node: Node, draft: Any, error: Exception = error) -> int:
            raise error

        with pytest.raises(WorkerLost, match="out of memory"):
            each([node], store, burst)


def test_a_node_that_loses_every_worker_fails_and_is_all_that_the_next_run_does_with_what_it_blocked(
    tmp_path: Path,
) -> None:
    poison = drive.nodes()[2].key

    def work(batch: Any, store: Store, workspace: Workspace) -> list[Outcome]:
        if any(node.key == poison for node in batch):
            raise WorkerLost("out of memory: 3 GiB asked")
        return drive.work(0.0)(batch, store, workspace)

    store = Store(tmp_path)
    summary = walk(drive.nodes(), store, LocalExecutor(store, Workspace(), work), lambda event: None)
    assert set(summary.failed) == {poison}
    assert len(summary.done) == 10
    assert "out of memory" in str(store.failure(poison))
    before = len(begun(tmp_path))
    assert finish(tmp_path) == set()
    assert len(begun(tmp_path)) - before == 2


def test_a_node_that_another_run_made_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = drive.nodes()[0]
    drive.work(0.0)([first], store, Workspace())
    before = begun(tmp_path)
    (outcome,) = drive.work(0.0)([first], store, Workspace())
    assert outcome == Outcome(first.key)
    assert begun(tmp_path) == before


def test_a_read_only_store_is_refused_with_advice(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="choose another --store"):
        drive.go(str(tmp_path), 0.0)
