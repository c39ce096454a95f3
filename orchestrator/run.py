"""Walk the graph: hand out the nodes whose inputs are there, fused where one call can do several, until none is left.

The durable state is the store. A walk keeps nothing that a second walk would need, so resuming is walking again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from orchestrator.stage import WorkerLost
from orchestrator.stages import STAGES
from orchestrator.stages import run as run_nodes

if TYPE_CHECKING:
    from orchestrator.artifact import Store
    from orchestrator.plan import Node
    from orchestrator.stage import Outcome
    from orchestrator.workspace import Workspace

ATTEMPTS = 2
"""How often a batch is tried when its worker is lost, before its nodes are tried each alone."""
POLL_SECONDS = 1.0
CALL_SECONDS = 300.0
"""About how long a fused call should take: what a crash may cost. The last call of the same kind sets the pace."""
LEAST = 8
"""Nodes that a fused call may always hold, if memory allows: fewer would share too little of a forward pass."""
CALL_ITEMS = 16_384
"""About how many items a fused call may hold: every one of them is in memory, with all it said, until the call ends."""


@dataclass(frozen=True)
class Batch:
    """Nodes of one stage for one worker call."""

    stage: str
    nodes: tuple[Node, ...]
    attempt: int = 1

    @property
    def name(self) -> str:
        """Readable in a dashboard: `fit[mean_diff L14]:3fa9c1`, `answer[owl, 12 nodes]:77ab01`."""
        many = f", {len(self.nodes)} nodes" if len(self.nodes) > 1 else ""
        first = self.nodes[0]
        return f"{self.stage}[{first.label}{many}]:{first.key[:6]}"

    @property
    def away(self) -> bool:
        """Whether somebody else's machine computes it."""
        return STAGES[self.stage].away(self.nodes[0])


@dataclass(frozen=True)
class Finished:
    """What came back for a batch: one outcome a node, or the reason why its worker is gone."""

    batch: Batch
    outcomes: Sequence[Outcome] = ()
    lost: str | None = None


Work = Callable[["Sequence[Node]", "Store", "Workspace"], "list[Outcome]"]
"""What a worker does with a batch: `stages.run`, or less in a test."""


Watch = Callable[["Batch", int, int], None]
"""Told of a running batch how many items are answered, and how many there will be."""


def unwatched(batch: Batch, done: int, total: int) -> None:
    """For executors that no walk listens to."""


class Executor(Protocol):
    """Where batches run: `slots` at once, and beside them some that wait for somebody else's machine.

    `submit` is only called while `free` is positive for such a batch.
    """

    watch: Watch
    """Called now and then while a batch runs."""

    @property
    def slots(self) -> int:
        """How many batches may run at once, those away not counted."""

    def free(self, away: bool = False) -> int:
        """How many more batches could start now."""

    def submit(self, batch: Batch) -> None:
        """Start `batch` and return."""

    def wait(self, timeout: float) -> list[Finished]:
        """Batches that ended, waiting at most `timeout` seconds for the first."""

    def close(self) -> None:
        """Stop; whatever runs is abandoned. Nothing half-written stays, because publication is a rename."""


class LocalExecutor:
    """Runs each batch in this process, when `wait` is called: for tests, small machines and debuggers."""

    slots = 1

    def __init__(self, store: Store, workspace: Workspace, work: Work = run_nodes) -> None:
        self.store = store
        self.workspace = workspace
        self.work = work
        self.watch: Watch = unwatched
        self._queue: deque[Batch] = deque()

    def free(self, away: bool = False) -> int:
        """One batch at a time, wherever it is computed."""
        return self.slots - len(self._queue)

    def submit(self, batch: Batch) -> None:
        """Keep `batch` for the next `wait`."""
        self._queue.append(batch)

    def wait(self, timeout: float) -> list[Finished]:
        """Run the waiting batch to its end, whatever `timeout` says."""
        if not self._queue:
            return []
        batch = self._queue.popleft()
        self.workspace.tell = lambda done, total: self.watch(batch, done, total)
        try:
            return [Finished(batch, self.work(batch.nodes, self.store, self.workspace))]
        except WorkerLost as error:
            self.workspace.drop()
            return [Finished(batch, lost=str(error))]

    def close(self) -> None:
        """Nothing outlives a call in this process."""
        self._queue.clear()


@dataclass(frozen=True)
class Event:
    """Something a reader of the terminal may want to know."""

    kind: str
    """start, items, finish or lost."""
    batch: Batch
    outcomes: Sequence[Outcome] = ()
    text: str = ""
    items: tuple[int, int] = (0, 0)
    """Answered so far, and in all."""


@dataclass
class Summary:
    """What a walk did."""

    done: list[Node] = field(default_factory=list)
    failed: dict[str, tuple[Node, str]] = field(default_factory=dict)
    blocked: dict[str, tuple[Node, str]] = field(default_factory=dict)
    """Nodes not tried, each with the key of the failed node they wait for."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """True when everything asked for has a record."""
        return not self.failed and not self.blocked


def walk(nodes: Iterable[Node], store: Store, executor: Executor, on_event: Callable[[Event], None]) -> Summary:
    """Run exactly `nodes`, each after its inputs; inputs that are not among `nodes` must have a record.

    A failed node blocks what depends on it and nothing else. KeyboardInterrupt closes the executor and goes on up.
    """
    started = time.monotonic()
    state = _Walk({node.key: node for node in nodes}, store, on_event)
    executor.watch = lambda batch, done, total: on_event(Event("items", batch, items=(done, total)))
    try:
        while state.waiting or state.retries or state.running:
            for away in (True, False):
                while executor.free(away) > 0 and (batch := state.next_batch(executor.slots, away)):
                    on_event(Event("start", batch))
                    executor.submit(batch)
            if not state.running and executor.free() > 0:
                raise RuntimeError(f"nodes wait for inputs that nothing will make: {sorted(state.waiting)[:5]}")
            for finished in executor.wait(POLL_SECONDS):
                state.take(finished)
    except BaseException:
        executor.close()
        raise
    state.summary.seconds = time.monotonic() - started
    return state.summary


class _Walk:
    """The bookkeeping of one walk: what waits, what runs, what must be tried again."""

    def __init__(self, waiting: dict[str, Node], store: Store, on_event: Callable[[Event], None]) -> None:
        self.waiting = waiting
        self.store = store
        self.on_event = on_event
        self.running: set[str] = set()
        self.retries: deque[Batch] = deque()
        self.summary = Summary()
        self._pace: dict[tuple[str, Hashable], tuple[float, float]] = {}
        """Seconds and items of a node, by kind, in the last call."""
        self._started: dict[str, float] = {}
        self._ready = {key: None for key, node in waiting.items() if not self._missing(node)}
        self._dependents: dict[str, list[str]] = {}
        for key, node in waiting.items():
            for needed in node.inputs.values():
                self._dependents.setdefault(needed, []).append(key)

    def _missing(self, node: Node) -> bool:
        return any(key in self.waiting or key in self.running for key in node.inputs.values())

    def next_batch(self, slots: int, away: bool = False) -> Batch | None:
        """The next nodes to hand out, computed away or here, or None while none of them is ready."""
        for batch in self.retries:
            if batch.away == away:
                self.retries.remove(batch)
                return batch
        ready = [node for key in self._ready if STAGES[(node := self.waiting[key]).stage].away(node) == away]
        if not ready:
            return None
        first = min(ready, key=_priority)
        stage = STAGES[first.stage]
        alike = [node for node in ready if node.stage == first.stage and _priority(node) == _priority(first)]
        group = [node for node in alike if stage.fuse_by(node) == stage.fuse_by(first)]
        share = -(-len(group) // slots) if stage.spread else len(group)
        size = min(stage.most, share, self._size(first))
        return self._hand_out(Batch(first.stage, tuple(group[:size])))

    def _size(self, node: Node) -> int:
        """How many nodes like `node` fit into a call, judged by the last such call."""
        seconds, items = self._pace.get(_kind(node), (0.0, 0.0))
        most = STAGES[node.stage].most if not seconds else max(LEAST, int(CALL_SECONDS / seconds))
        return most if not items else max(1, min(most, int(CALL_ITEMS / items)))

    def _hand_out(self, batch: Batch) -> Batch:
        for node in batch.nodes:
            del self._ready[node.key]
            del self.waiting[node.key]
            self.running.add(node.key)
        self._started[batch.nodes[0].key] = time.monotonic()
        return batch

    def take(self, finished: Finished) -> None:
        """Book what came back."""
        first = finished.batch.nodes[0]
        since = self._started.pop(first.key, None)
        if since is not None and finished.lost is None:
            count = len(finished.batch.nodes)
            items = sum(outcome.items for outcome in finished.outcomes) / count
            self._pace[_kind(first)] = (time.monotonic() - since) / count, items
        if finished.lost is not None:
            self._lost(finished.batch, finished.lost)
            return
        nodes = {node.key: node for node in finished.batch.nodes}
        for outcome in finished.outcomes:
            node = nodes.pop(outcome.key)
            self.running.discard(node.key)
            if outcome.error is None:
                self._done(node)
            else:
                self._failed(node, outcome.error)
        if nodes:
            raise RuntimeError(f"{finished.batch.name}: no outcome for {sorted(nodes)}")
        self.on_event(Event("finish", finished.batch, finished.outcomes))

    def _done(self, node: Node) -> None:
        self.summary.done.append(node)
        for key in self._dependents.get(node.key, ()):
            if key in self.waiting and not self._missing(self.waiting[key]):
                self._ready[key] = None

    def _failed(self, node: Node, reason: str) -> None:
        self.summary.failed[node.key] = (node, reason)
        stack = [node.key]
        while stack:
            for key in self._dependents.get(stack.pop(), ()):
                if key in self.waiting:
                    self.summary.blocked[key] = (self.waiting.pop(key), node.key)
                    stack.append(key)

    def _lost(self, batch: Batch, reason: str) -> None:
        """Try the unfinished nodes again: together once more, then each alone, so that one cannot take others down."""
        left = []
        for node in batch.nodes:
            if self.store.has(node.key):
                self.running.discard(node.key)
                self._done(node)
            else:
                left.append(node)
        self.on_event(Event("lost", batch, text=reason))
        if batch.attempt < ATTEMPTS and left:
            self.retries.append(Batch(batch.stage, tuple(left), batch.attempt + 1))
        elif len(batch.nodes) > 1:
            self.retries.extend(Batch(batch.stage, (node,), ATTEMPTS) for node in left)
        else:
            for node in left:
                text = f"its worker was lost {batch.attempt} times; the last time: {reason}"
                self.store.fail(node, text)
                self.running.discard(node.key)
                self._failed(node, text)


def _kind(node: Node) -> tuple[str, Hashable]:
    """Nodes that may share a call."""
    return node.stage, STAGES[node.stage].fuse_by(node)


def _priority(node: Node) -> int:
    """Lower runs first. The untouched subject answers before anything is fitted: a broken task shows at once. What
    teachers said is judged as soon as it is there: students wait for it."""
    if node.stage == "judge" and "said" in node.inputs:
        return STAGES["generate"].order
    if node.stage == "answer" and "state" not in node.inputs:
        return STAGES["generate"].order - 1
    return STAGES[node.stage].order
