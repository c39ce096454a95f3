from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from orchestrator.run import Batch, Event, Finished, LocalExecutor, Summary, walk
from orchestrator.stage import Outcome, WorkerLost
from orchestrator.stages import STAGES


@dataclass(frozen=True)
class FakeNode:
    stage: str
    key: str
    inputs: dict[str, str] = field(default_factory=dict)
    group: str = "one"
    runtime: dict[str, Any] = field(default_factory=lambda: {"residents": {}})

    @property
    def label(self) -> str:
        return f"label {self.key}"


class FakeStore:
    """Remembers which keys have a record, which failed, and how often each was worked on."""

    def __init__(self) -> None:
        self.records: set[str] = set()
        self.failures: dict[str, str] = {}
        self.worked: Counter[str] = Counter()

    def has(self, key: str) -> bool:
        return key in self.records

    def fail(self, node: FakeNode, error: str) -> None:
        self.failures[node.key] = error


class FakeExecutor:
    """`behave(batch, store)` says what comes back; several batches may be held before any is answered."""

    def __init__(self, store: FakeStore, slots: int = 1, behave: Callable[[Batch], Finished] | None = None) -> None:
        self.store = store
        self.slots = slots
        self.behave = behave or self.succeed
        self.batches: list[Batch] = []
        self.held: list[Batch] = []
        self.closed = False

    def succeed(self, batch: Batch) -> Finished:
        for node in batch.nodes:
            self.store.worked[node.key] += 1
            self.store.records.add(node.key)
        return Finished(batch, [Outcome(node.key) for node in batch.nodes])

    def free(self, away: bool = False) -> int:
        if away:
            return 1 - sum(batch.away for batch in self.held)
        return self.slots - sum(not batch.away for batch in self.held)

    def submit(self, batch: Batch) -> None:
        assert self.free(batch.away) > 0
        self.batches.append(batch)
        self.held.append(batch)

    def wait(self, timeout: float) -> list[Finished]:
        return [self.behave(self.held.pop(0))] if self.held else []

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, replace(stage, fuse_by=lambda node: node.group))


def chain(number: int) -> list[Any]:
    """fit -> answer -> score of one trial."""
    fit = FakeNode("fit", f"fit{number}")
    answer = FakeNode("answer", f"answer{number}", {"state": fit.key})
    return [fit, answer, FakeNode("score", f"score{number}", {"answer": answer.key})]


def quietly(event: Event) -> None:
    """Nobody watches."""


def order_of(executor: FakeExecutor) -> list[str]:
    return [node.key for batch in executor.batches for node in batch.nodes]


def test_every_node_runs_once_and_after_its_inputs() -> None:
    store = FakeStore()
    nodes = [node for number in range(5) for node in chain(number)]
    executor = FakeExecutor(store, slots=2)
    summary = walk(reversed(nodes), store, executor, quietly)
    order = order_of(executor)
    assert summary.ok
    assert Counter(order) == Counter(node.key for node in nodes)
    for node in nodes:
        assert all(order.index(needed) < order.index(node.key) for needed in node.inputs.values())


def test_inputs_outside_the_walk_count_as_done() -> None:
    store = FakeStore()
    _, answer, score = chain(0)
    summary = walk([answer, score], store, FakeExecutor(store), quietly)
    assert [node.key for node in summary.done] == [answer.key, score.key]


def test_the_untouched_subject_answers_before_the_fits_and_the_fits_before_other_answers() -> None:
    store = FakeStore()
    base = FakeNode("answer", "base")
    executor = FakeExecutor(store)
    walk([*chain(0), base, *chain(1), FakeNode("dataset", "data")], store, executor, quietly)
    order = order_of(executor)
    assert order[:2] == ["data", "base"]
    assert max(order.index("fit0"), order.index("fit1")) < min(order.index("answer0"), order.index("answer1"))


def test_what_is_computed_away_is_handed_out_beside_what_fills_the_workers() -> None:
    store = FakeStore()
    nodes = [FakeNode("judge", "away"), FakeNode("judge", "resident", runtime={"residents": {"embedded": {}}})]
    held: list[set[str]] = []

    def behave(batch: Batch) -> Finished:
        held.append({node.key for other in (batch, *executor.held) for node in other.nodes})
        return executor.succeed(batch)

    executor = FakeExecutor(store, slots=1, behave=behave)
    summary = walk([*nodes, FakeNode("fit", "fit")], store, executor, quietly)
    assert summary.ok
    assert held[0] == {"away", "fit"}  # and the judge that needs a worker waits for one


def test_ready_nodes_of_one_group_share_a_call_up_to_the_stages_limit() -> None:
    store = FakeStore()
    most = STAGES["answer"].most
    nodes = [FakeNode("answer", f"a{n}", group="x") for n in range(most + 3)] + [FakeNode("answer", "b", group="y")]
    executor = FakeExecutor(store)
    walk(nodes, store, executor, quietly)
    assert sorted(len(batch.nodes) for batch in executor.batches) == [1, 3, most]
    assert all(len({node.group for node in batch.nodes}) == 1 for batch in executor.batches)


def test_a_group_is_spread_over_the_workers_there_are() -> None:
    store = FakeStore()
    executor = FakeExecutor(store, slots=4)
    walk([FakeNode("answer", f"a{n}") for n in range(8)], store, executor, quietly)
    assert len(executor.batches) >= 4


def test_fits_that_share_what_they_read_stay_together_however_many_workers_there_are() -> None:
    executor = FakeExecutor(FakeStore(), slots=4)
    walk([FakeNode("fit", f"f{n}", group="xy"[n % 2]) for n in range(16)], FakeStore(), executor, quietly)
    assert [len(batch.nodes) for batch in executor.batches] == [8, 8]


def test_a_slow_group_is_handed_out_in_calls_of_minutes_so_that_a_crash_costs_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("orchestrator.run.time.monotonic", lambda: clock[0])
    base = FakeNode("answer", "base")
    fits = [FakeNode("fit", f"f{number}", group="fits") for number in range(40)]
    answers = [FakeNode("answer", f"a{number}", {"state": f"f{number}"}) for number in range(40)]
    store = FakeStore()

    def slow(batch: Batch) -> Finished:
        clock[0] += {"answer": 25.0, "fit": 0.0}[batch.stage] * len(batch.nodes)
        return executor.succeed(batch)

    executor = FakeExecutor(store, behave=slow)
    walk([base, *fits, *answers], store, executor, lambda event: None)
    sizes = [len(batch.nodes) for batch in executor.batches if batch.stage == "answer"]
    assert sizes == [1, 12, 12, 12, 4]  # 25 s a node: twelve in about five minutes

    clock[0], executor.batches = 0.0, []
    monkeypatch.setattr("orchestrator.run.CALL_SECONDS", 30.0)
    walk([base, *fits, *answers], store, executor, lambda event: None)
    sizes = [len(batch.nodes) for batch in executor.batches if batch.stage == "answer"]
    assert sizes == [1, 8, 8, 8, 8, 8]  # never so few that they share nothing


def test_a_fused_call_holds_no_more_items_than_memory_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.run.CALL_ITEMS", 1000)
    base = FakeNode("answer", "base")
    answers = [FakeNode("answer", f"a{number}", {"state": "fit"}) for number in range(9)]

    def many(batch: Batch) -> Finished:
        return Finished(batch, [Outcome(node.key, items=250) for node in batch.nodes])

    executor = FakeExecutor(FakeStore(), behave=many)
    walk([base, FakeNode("fit", "fit"), *answers], FakeStore(), executor, quietly)
    assert [len(batch.nodes) for batch in executor.batches if batch.stage == "answer"] == [1, 4, 4, 1]


def test_a_failed_node_blocks_what_depends_on_it_and_nothing_else() -> None:
    store = FakeStore()

    def behave(batch: Batch) -> Finished:
        if any(node.key == "fit1" for node in batch.nodes):
            return Finished(batch, [Outcome(n.key, "boom" if n.key == "fit1" else None) for n in batch.nodes])
        return executor.succeed(batch)

    executor = FakeExecutor(store, behave=behave)
    summary = walk([*chain(0), *chain(1), *chain(2)], store, executor, quietly)
    assert not summary.ok
    assert {key: reason for key, (_, reason) in summary.failed.items()} == {"fit1": "boom"}
    assert {key: because for key, (_, because) in summary.blocked.items()} == {"answer1": "fit1", "score1": "fit1"}
    assert {"score0", "score2"} <= {node.key for node in summary.done}
    assert "answer1" not in order_of(executor)


def test_a_lost_worker_costs_one_more_try() -> None:
    store = FakeStore()
    losses = iter([True])

    def behave(batch: Batch) -> Finished:
        return Finished(batch, lost="killed") if next(losses, False) else executor.succeed(batch)

    executor = FakeExecutor(store, behave=behave)
    events: list[Event] = []
    summary = walk(chain(0), store, executor, events.append)
    assert summary.ok
    assert [batch.attempt for batch in executor.batches if batch.stage == "fit"] == [1, 2]
    assert [event.text for event in events if event.kind == "lost"] == ["killed"]


def test_what_a_lost_worker_had_published_is_not_computed_again() -> None:
    store = FakeStore()
    nodes = [FakeNode("answer", f"a{n}") for n in range(4)]

    def behave(batch: Batch) -> Finished:
        if batch.attempt == 1:
            executor.succeed(Batch(batch.stage, batch.nodes[:3]))
            return Finished(batch, lost="killed")
        return executor.succeed(batch)

    executor = FakeExecutor(store, behave=behave)
    summary = walk(nodes, store, executor, quietly)
    assert summary.ok
    assert set(store.worked.values()) == {1}


def test_a_poison_node_is_found_alone_and_takes_no_other_down() -> None:
    store = FakeStore()
    nodes = [FakeNode("answer", f"a{n}") for n in range(6)]

    def behave(batch: Batch) -> Finished:
        if any(node.key == "a3" for node in batch.nodes):
            return Finished(batch, lost="out of memory")
        return executor.succeed(batch)

    executor = FakeExecutor(store, behave=behave)
    summary = walk(nodes, store, executor, quietly)
    assert list(summary.failed) == ["a3"]
    assert "out of memory" in store.failures["a3"]
    assert len(summary.done) == 5
    assert sum("a3" in [node.key for node in batch.nodes] for batch in executor.batches) == 3


def test_an_interrupt_closes_the_executor_and_goes_on_up() -> None:
    store = FakeStore()

    def behave(batch: Batch) -> Finished:
        raise KeyboardInterrupt

    executor = FakeExecutor(store, behave=behave)
    with pytest.raises(KeyboardInterrupt):
        walk(chain(0), store, executor, quietly)
    assert executor.closed


def test_an_input_that_nothing_makes_is_an_error_not_a_wait() -> None:
    store = FakeStore()
    loop = [FakeNode("fit", "x", {"data": "y"}), FakeNode("answer", "y", {"state": "x"})]
    with pytest.raises(RuntimeError, match="wait for inputs"):
        walk(loop, store, FakeExecutor(store), quietly)


def test_a_batch_without_an_outcome_for_each_node_is_an_error() -> None:
    store = FakeStore()
    executor = FakeExecutor(store, behave=lambda batch: Finished(batch, []))
    with pytest.raises(RuntimeError, match="no outcome"):
        walk(chain(0), store, executor, quietly)


def test_a_batch_is_named_for_people() -> None:
    one = FakeNode("fit", "3fa9c1d2e3f4")
    assert Batch("fit", (one,)).name == "fit[label 3fa9c1d2e3f4]:3fa9c1"
    assert Batch("fit", (one, one)).name == "fit[label 3fa9c1d2e3f4, 2 nodes]:3fa9c1"


def test_the_local_executor_reports_a_lost_worker_and_starts_afresh() -> None:
    class Workspace:
        dropped = 0

        def drop(self) -> None:
            self.dropped += 1

    def lose(nodes: Sequence[Any], store: Any, workspace: Any) -> list[Outcome]:
        raise WorkerLost("out of memory")

    workspace: Any = Workspace()
    store: Any = FakeStore()
    executor = LocalExecutor(store, workspace, work=lose)
    batch = Batch("fit", (FakeNode("fit", "a"),))
    executor.submit(batch)
    assert executor.free() == 0
    assert executor.wait(0) == [Finished(batch, lost="out of memory")]
    assert workspace.dropped == 1


def test_a_summary_with_a_failure_is_not_ok() -> None:
    node: Any = FakeNode("fit", "a")
    assert Summary(done=[node]).ok
    assert not Summary(failed={"a": (node, "x")}).ok
    assert not Summary(blocked={"a": (node, "b")}).ok
