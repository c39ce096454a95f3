"""A result is there whole or not at all, whoever writes it, wherever it lies."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import storage
from orchestrator.artifact import Store, StoreError, folder_name
from orchestrator.plan import Node
from orchestrator.storage import temporary_name


def node(seed: int = 0, label: str = "mean_diff L14", stage: str = "fit") -> Node:
    return Node(stage, 1, {"seed": seed, "scale": -0.0, "names": ("a", "b")}, {"data": "0" * 64}, label, {"path": "/x"})


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("ORCH_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        yield Store(tmp_path / "store")
        return
    import fsspec

    yield Store(f"memory://{tmp_path.name}")
    fsspec.filesystem("memory").store.clear()


def publish(store: Store, one: Node, text: str = "words") -> None:
    with store.publishing(one) as publication:
        (publication.folder / "sub").mkdir()
        (publication.folder / "sub" / "file.txt").write_text(text)
        publication.outputs["n"] = 3


def stop_half_way(store: Store, one: Node, error: BaseException) -> None:
    with store.publishing(one) as publication:
        (publication.folder / "half").write_text("x")
        raise error


def left_in(store: Store, tmp_path: Path) -> list[str]:
    """Names of temporary folders that are still there, in the store or in the cache."""
    return [str(path) for path in tmp_path.rglob(f"{storage.TEMPORARY}*")]


def test_what_was_published_comes_back(store: Store, tmp_path: Path) -> None:
    one = node()
    assert not store.has(one.key)
    publish(store, one)
    assert store.has(one.key)
    assert store.keys() == {one.short}
    assert (store.folder(one.key) / "sub" / "file.txt").read_text() == "words"
    assert left_in(store, tmp_path) == []


def test_the_record_says_what_from_what_with_what_where_and_how_long(store: Store) -> None:
    one = node()
    publish(store, one)
    record = store.record(one.key)
    assert (record["key"], record["stage"], record["version"], record["label"]) == (one.key, "fit", 1, "mean_diff L14")
    assert record["params"] == {"seed": 0, "scale": 0.0, "names": ["a", "b"]}
    assert record["inputs"] == {"data": "0" * 64}
    assert record["runtime"] == {"path": "/x"}
    assert record["outputs"] == {"n": 3}
    digest = hashlib.sha256(b"words").hexdigest()
    assert record["files"] == {"sub/file.txt": {"bytes": 5, "sha256": digest}}
    assert record["packages"]["torch"].startswith("2.")
    assert record["seconds"] >= 0
    assert 5 < record["peak_rss_mib"] < 100_000
    assert (record["peak_gpu_mib"] is None) is not torch.cuda.is_initialized()
    assert record["host"]["pid"] == os.getpid()
    assert [found["key"] for found in store.records("fit")] == [one.key]


def test_another_store_object_sees_what_was_published_meanwhile(store: Store) -> None:
    other = Store(store.url)
    for seed in range(3):
        assert not other.has(node(seed).key)
        publish(store, node(seed))
        assert other.has(node(seed).key)
    assert other.keys() == {node(seed).short for seed in range(3)}


def test_an_exception_leaves_its_traceback_and_a_count_and_nothing_else(store: Store, tmp_path: Path) -> None:
    one = node()
    for attempt in (1, 2):
        with pytest.raises(ZeroDivisionError):
            stop_half_way(store, one, ZeroDivisionError("no half of zero"))
        failure = store.failure(one.key)
        assert failure is not None
        assert (failure["attempts"], failure["reason"]) == (attempt, "ZeroDivisionError: no half of zero")
        assert "in stop_half_way" in failure["traceback"]
    assert store.failed() == {one.short}
    assert not store.has(one.key)
    assert left_in(store, tmp_path) == []


def test_success_takes_the_failure_away(store: Store) -> None:
    one = node()
    store.fail(one, "its worker was lost 2 times")
    failure = store.failure(one.key)
    assert failure is not None
    assert failure["reason"] == "its worker was lost 2 times"
    publish(store, one)
    assert store.failure(one.key) is None
    assert store.failed() == set()


def test_a_discarded_result_is_computed_again(store: Store, tmp_path: Path) -> None:
    publish(store, node(0))
    publish(store, node(1))
    store.fail(node(2), "no")
    for seed in (0, 2, 3):
        store.discard(node(seed).key)
    assert store.keys() == {node(1).short}
    assert store.failed() == set()
    publish(store, node(0), "again")
    assert (store.folder(node(0).key) / "sub" / "file.txt").read_text() == "again"
    assert (store.folder(node(1).key) / "sub" / "file.txt").read_text() == "words"
    assert left_in(store, tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_leaves_nothing(store: Store, tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        stop_half_way(store, node(), error())
    assert not store.has(node().key)
    assert store.failure(node().key) is None
    assert left_in(store, tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed: No space left on device")]
)
def test_a_full_disk_is_told_and_leaves_nothing(store: Store, tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StoreError, match="no space left for the store"), store.publishing(node()):
        raise error
    assert not store.has(node().key)
    assert store.failure(node().key) is None  # the disk failed, not the node
    assert left_in(store, tmp_path) == []


def test_a_disk_that_fills_up_while_the_record_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "sync", full)
    with pytest.raises(StoreError, match="no space left"):
        publish(store, node())
    assert list((tmp_path / "store" / "fit").iterdir()) == []


def test_the_first_of_two_writers_is_kept(store: Store, tmp_path: Path) -> None:
    one = node()
    with store.publishing(one) as publication:
        (publication.folder / "file.txt").write_text("second")
        with Store(store.url).publishing(one) as other:
            (other.folder / "file.txt").write_text("first")
    assert (Store(store.url).folder(one.key) / "file.txt").read_text() == "first"
    assert left_in(store, tmp_path) == []


def test_many_writers_of_one_node_leave_one_whole_result(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    errors: list[BaseException] = []

    def write(index: int) -> None:
        try:
            publish(Store(url), node(), f"writer {index}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(list((tmp_path / "store" / "fit").iterdir())) == 1
    assert (Store(url).folder(node().key) / "sub" / "file.txt").read_text().startswith("writer")


def test_outputs_that_are_not_plain_finite_data_are_a_failure(store: Store) -> None:
    with pytest.raises(StoreError, match=r"outputs\.loss: nan"), store.publishing(node()) as publication:
        publication.outputs["loss"] = float("nan")
    assert not store.has(node().key)
    failure = store.failure(node().key)
    assert failure is not None
    assert "nan" in failure["reason"]


def record_of(root: Path, one: Node) -> Path:
    return root / one.stage / folder_name(one.label, one.key) / "record.json"


def test_a_record_edited_by_hand_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, node())
    path = record_of(tmp_path, node())
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"outputs": {"n": 4}}))
    with pytest.raises(StoreError, match=r"was changed after it was written.*delete .* to compute it again"):
        store.record(node().key)
    path.write_text(json.dumps(record, indent=7))  # other spaces are the same record
    assert store.record(node().key)["outputs"] == {"n": 3}
    path.write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        store.record(node().key)


def test_a_folder_without_its_record_is_no_result_and_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store, node())
    record_of(tmp_path, node()).unlink()
    assert not store.has(node().key)
    assert not Store(tmp_path).has(node().key)
    with pytest.raises(StoreError, match="no record"):
        store.folder(node().key)
    publish(store, node(), "again")
    assert (store.folder(node().key) / "sub" / "file.txt").read_text() == "again"


def test_a_deleted_result_is_gone_at_once(tmp_path: Path) -> None:
    import shutil

    store = Store(tmp_path)
    publish(store, node())
    shutil.rmtree(record_of(tmp_path, node()).parent)
    assert not store.has(node().key)
    assert store.keys() == set()


@pytest.mark.parametrize("content", [None, "wo"])
def test_a_file_that_is_missing_or_cut_short_is_told(tmp_path: Path, content: str | None) -> None:
    store = Store(tmp_path)
    publish(store, node())
    path = record_of(tmp_path, node()).parent / "sub" / "file.txt"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError, match=r"file\.txt .*its record says 5; delete"):
        store.folder(node().key)


def test_a_remote_file_that_changed_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("ORCH_CACHE", str(tmp_path))
    store = Store(f"memory://{tmp_path.name}")
    publish(store, node())
    memory = fsspec.filesystem("memory")
    path = next(name for name in memory.find(f"/{tmp_path.name}") if name.endswith("file.txt"))
    memory.pipe_file(path, b"wordz")
    with pytest.raises(StoreError, match="not what its record says"):
        store.folder(node().key)
    assert left_in(store, tmp_path) == []


def test_links_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a link"), Store(tmp_path).publishing(node()) as publication:
        (publication.folder / "link").symlink_to("/etc/hostname")


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_fills_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    code = (
        "import os, sys\nfrom orchestrator.artifact import Store\nfrom orchestrator.plan import Node\n"
        f"with Store({str(tmp_path)!r}).publishing(Node('fit', 1, {{}}, {{}}, 'x')):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (tmp_path / "fit" / temporary_name("0123456789ab")).mkdir()
    assert len(list((tmp_path / "fit").iterdir())) == 2
    assert store.keys() == set()
    assert [path.name.split("-")[2] for path in (tmp_path / "fit").iterdir()] == [str(os.getpid())]


@pytest.mark.parametrize("label", ["a/b\\c: d*é", "..", "", "x" * 300, "-", "0123456789ab"])
def test_any_label_makes_a_folder_that_is_found_again(tmp_path: Path, label: str) -> None:
    one = node(label=label)
    publish(Store(tmp_path), one)
    store = Store(tmp_path)
    assert store.record(one.key)["label"] == label
    assert store.by_label().popitem()[1] == [one.short]


def test_the_same_node_under_another_label_is_the_same_result(tmp_path: Path) -> None:
    publish(Store(tmp_path), node(label="one"))
    assert Store(tmp_path).has(node(label="two").key)
    publish(Store(tmp_path), node(label="two"))
    Store(tmp_path).discard(node().key)
    assert not Store(tmp_path).has(node().key)


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "file"])
def test_a_store_that_cannot_be_is_refused(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=url.split(":")[0]):
        Store(url)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    publish(Store(f"file://{tmp_path}/s"), node())
    assert Store(tmp_path / "s").has(node().key)


def test_a_lock_holds_others_off_and_tells_them_who_holds_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom orchestrator.artifact import Store\n"
        f"with Store({str(tmp_path)!r}).lock('owl / quick'):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    messages: list[str] = []

    def told(message: str) -> None:
        messages.append(message)
        assert holder.stdin is not None
        holder.stdin.close()

    started = time.monotonic()
    with Store(tmp_path).lock("owl / quick", told):
        assert holder.wait(10) == 0
    assert time.monotonic() - started < 10
    assert len(messages) == 1
    assert f"waiting for process {holder.pid} on" in messages[0]
    with Store(tmp_path).lock("owl / quick", told), Store(tmp_path).lock("another", told):
        assert len(messages) == 1


def test_a_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os\nfrom orchestrator.artifact import Store\n"
        f"with Store({str(tmp_path)!r}).lock('x'):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    waited: list[Any] = []
    with Store(tmp_path).lock("x", waited.append):
        assert not waited
