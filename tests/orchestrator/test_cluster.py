from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cluster
from orchestrator.access import secure_token
from orchestrator.cluster import RayExecutor
from orchestrator.resources import Ask, ClusterError, check
from orchestrator.run import Event, Summary, walk
from tests.orchestrator.work import Chore, FolderStore, work


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


@pytest.fixture
def executor(ray_cluster: Any, store: FolderStore) -> Iterator[RayExecutor]:
    executor = RayExecutor(store, Ask(cpus=1), work=work)
    yield executor
    executor.close()


def do(nodes: list[Chore], store: FolderStore, executor: RayExecutor) -> tuple[Summary, list[Event]]:
    events: list[Event] = []
    return walk(nodes, store, executor, events.append), events


def test_every_node_of_the_cluster_gets_a_worker_with_its_own_threads(
    store: FolderStore, executor: RayExecutor
) -> None:
    nodes = [Chore("fit", f"n{i}", "slow") for i in range(4)]
    summary, _ = do(nodes, store, executor)
    assert summary.ok
    assert len({pid for _, pid in store.begun()}) == 2
    assert {tuple((store.folder / node.key).read_text().split()[1:]) for node in nodes} == {("1", "1")}


def test_a_worker_killed_in_the_middle_of_a_fit_costs_one_more_try(store: FolderStore, executor: RayExecutor) -> None:
    def kill() -> None:
        while not (begun := store.begun()):
            time.sleep(0.05)
        os.kill(begun[0][1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    summary, events = do(
        [Chore("fit", "a", "waits to be killed"), Chore("score", "b", inputs={"fit": "a"})], store, executor
    )
    killer.join()
    assert summary.ok
    assert [key for key, _ in store.begun()] == ["a", "a", "b"]
    assert sum(event.kind == "lost" for event in events) == 1


def test_a_node_that_always_kills_its_worker_fails_with_the_reason_and_alone(
    store: FolderStore, executor: RayExecutor
) -> None:
    nodes = [Chore("score", "poison", "always dies"), *(Chore("score", f"n{i}") for i in range(3))]
    summary, _ = do(nodes, store, executor)
    assert list(summary.failed) == ["poison"]
    assert len(summary.done) == 3
    assert "worker was lost" in (store.folder / "poison.failed").read_text()


def test_a_worker_out_of_memory_is_replaced(store: FolderStore, executor: RayExecutor) -> None:
    summary, events = do([Chore("fit", "a", "out of memory")], store, executor)
    assert summary.ok
    assert [event.text for event in events if event.kind == "lost"] == ["out of memory: 3 GiB asked"]
    first, second = (pid for _, pid in store.begun())
    assert first != second


@pytest.mark.parametrize(("stage", "runtime"), [("judge", {"residents": {}}), ("generate", {"model": "openai/x"})])
def test_what_an_api_computes_takes_no_worker_from_the_subject(
    store: FolderStore, ray_cluster: Any, stage: str, runtime: dict[str, Any]
) -> None:
    executor = RayExecutor(store, Ask(cpus=1), work=work, most=1)
    away, here = Chore(stage, "away", "waits for here", runtime=runtime), Chore("fit", "here", "waits for away")
    summary, _ = do([away, here], store, executor)  # each ends only when the other has begun
    executor.close()
    assert summary.ok, summary.failed
    assert executor.slots == 1


def test_a_worker_for_what_is_computed_away_that_dies_costs_one_more_try(
    store: FolderStore, executor: RayExecutor
) -> None:
    summary, events = do([Chore("judge", "a", "dies once", runtime={"residents": {}})], store, executor)
    assert summary.ok
    assert sum(event.kind == "lost" for event in events) == 1
    assert len({pid for _, pid in store.begun()}) == 2


def test_a_failed_node_comes_back_with_its_traceback(store: FolderStore, executor: RayExecutor) -> None:
    summary, _ = do([Chore("fit", "a", "fails"), Chore("score", "b", inputs={"fit": "a"})], store, executor)
    assert summary.failed["a"][1].endswith("ValueError: no")
    assert list(summary.blocked) == ["b"]


def test_a_worker_says_how_far_it_is_in_the_midst_of_a_call(store: FolderStore, executor: RayExecutor) -> None:
    summary, events = do([Chore("fit", "a", "counts")], store, executor)
    assert summary.ok
    assert [event.items for event in events if event.kind == "items"] == [(3, 8)]
    assert [event.kind for event in events] == ["start", "items", "finish"]


def test_a_defect_of_the_program_itself_is_raised(store: FolderStore, executor: RayExecutor) -> None:
    with pytest.raises(ZeroDivisionError, match="a defect"):
        do([Chore("fit", "a", "defect")], store, executor)


def test_workers_are_recycled_after_some_calls(
    store: FolderStore, executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CALLS_BEFORE_RECYCLING", 1)
    summary, _ = do([Chore("fit", f"n{i}", "slow") for i in range(3)], store, executor)
    assert summary.ok
    assert len({pid for _, pid in store.begun()}) == 3


def test_a_worker_whose_machine_is_short_of_memory_makes_room_for_a_new_one(
    store: FolderStore, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ROOM", 1.0)  # no machine has all its memory free
    executor = RayExecutor(store, Ask(cpus=1), work=work, most=1)
    summary, events = do([Chore("fit", f"n{i}") for i in range(3)], store, executor)
    executor.close()
    assert summary.ok
    assert len({pid for _, pid in store.begun()}) == 3
    assert not [event for event in events if event.kind == "lost"]


def test_a_node_that_joins_gets_a_worker_and_when_it_dies_its_work_is_done_elsewhere(
    ray_cluster: Any, store: FolderStore, executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.2)
    third = ray_cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def workers() -> set[int]:
        return {pid for _, pid in store.begun()}

    def kill() -> None:
        deadline = time.monotonic() + 60
        while len(workers()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        ray_cluster.remove_node(third, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    nodes = [Chore("fit", f"n{i}", "slow") for i in range(24)]  # enough for the third worker to come up meanwhile
    summary, _ = do(nodes, store, executor)
    killer.join()
    assert summary.ok
    assert len(summary.done) == len(nodes)
    assert len(workers()) == 3


def test_what_no_node_can_give_is_refused_before_anything_starts(ray_cluster: Any, store: FolderStore) -> None:
    for ask, wants in ((Ask(cpus=64), "CPU 64"), (Ask(gpus=1), "GPU 1"), (Ask(memory=2**50), "memory GiB")):
        with pytest.raises(ClusterError, match=wants) as caught:
            RayExecutor(store, ask, work=work)
        assert "`resources`" in str(caught.value)


def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    with (
        pytest.raises(ClusterError, match=r"cannot reach the Ray cluster at '127\.0\.0\.1:1'"),
        cluster.connected("127.0.0.1:1"),
    ):
        pytest.fail("connected to nothing")


@pytest.mark.parametrize(
    ("ask", "resources", "expected"),
    [
        (Ask(), {"CPU": 8}, [(8, 0)]),
        (Ask(), {"CPU": 8, "GPU": 2}, [(4, 1), (4, 1)]),
        (Ask(gpus=0.5), {"CPU": 8, "GPU": 1}, [(4, 0.5), (4, 0.5)]),
        (Ask(gpus=0), {"CPU": 8, "GPU": 1}, [(8, 0)]),
        (Ask(cpus=3), {"CPU": 8}, [(3, 0), (3, 0)]),
        (Ask(gpus=2), {"CPU": 8, "GPU": 1}, []),
        (Ask(memory=2**30), {"CPU": 4, "memory": 2**29}, []),
        (Ask(cpus=1, memory=2**30), {"CPU": 4, "memory": 2.5 * 2**30}, [(1, 0), (1, 0)]),
    ],
)
def test_a_node_is_divided_among_workers(
    ask: Ask, resources: dict[str, float], expected: list[tuple[float, float]]
) -> None:
    assert [(worker["num_cpus"], worker["num_gpus"]) for worker in ask.layout(resources)] == expected


@pytest.mark.parametrize("fraction", [0.3, 0.75, 1.5])
def test_fractions_that_ray_cannot_place_are_refused(fraction: float) -> None:
    with pytest.raises(ClusterError, match="allowed: whole numbers"):
        Ask(gpus=fraction)


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(ClusterError, match="nothing"):
        check(Ask(), [])


def test_the_token_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ray" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    secure_token()
    made = path.read_text()
    assert len(made) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    secure_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == made


def test_workers_are_told_the_settings_and_where_the_packages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_SOMETHING", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SECRET_API_KEY", "x")
    passed = cluster.passed_on()
    assert passed["ORCH_SOMETHING"] == passed["HF_HUB_OFFLINE"] == "1"
    assert passed["RAY_AUTH_MODE"] == "token"
    assert "SECRET_API_KEY" not in passed
    assert (Path(passed["PYTHONPATH"].split(os.pathsep)[0]) / "orchestrator" / "cluster.py").exists()


def test_what_ray_prints_while_it_is_connected_stays_out_of_the_result(
    ray_cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    ray.shutdown()
    capsys.readouterr()  # of the tests before
    with cluster.connected(ray_cluster.address):
        print("(raylet) The node has been marked dead")
    print("the result")
    captured = capsys.readouterr()
    assert captured.out == "the result\n"
    assert "(raylet)" in captured.err
