"""Ray, in the file that knows it (beside `jobs.py`): a cluster to start or join, and workers that keep a subject.

Ray executes and remembers nothing: artefacts travel as keys through the store, and what ran is what has a record there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import stages
from orchestrator.access import secure_token
from orchestrator.resources import Ask, ClusterError, check
from orchestrator.run import Batch, Finished, Watch, Work, unwatched
from orchestrator.stage import WorkerLost
from orchestrator.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.artifact import Store
    from orchestrator.plan import Node
    from orchestrator.stage import Outcome

CALLS_BEFORE_RECYCLING = 200
"""Calls after which a worker is replaced, so that what leaks stays small."""
ROOM = 0.2
"""Share of the machine's memory below which a worker is replaced after its call."""
SECONDS_WITHOUT_WORKERS = 60.0
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_BEFORE_TELLING = 30.0
SECONDS_BETWEEN_NOTES = 1.0
"""How often a worker says how far it is."""
BAD_STARTS = 5
"""Workers in a row that do not come up before the cluster is given up."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's smallest comfortable object store: artefacts never travel through it."""
PASSED_ON = ("ORCH_", "HF_", "TRANSFORMERS_", "INSPECT_", "RAY_AUTH_MODE", "TOKENIZERS_PARALLELISM")


@contextlib.contextmanager
def connected(address: str | None, *, dashboard: bool = True, cpus: int | None = None) -> Iterator[str | None]:
    """A running Ray: the one at `address`, or a local one that lives as long as the block. Gives the dashboard's URL.

    Meanwhile what is printed goes to the error stream, because Ray prints when it likes; a result comes after the
    block. Raises ClusterError when `address` cannot be joined.
    """
    secure_token()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": cpus or len(os.sched_getaffinity(0)),
            "include_dashboard": dashboard,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": f"/tmp/orch-ray-{os.getuid()}",  # sockets live below it and their paths have a short limit
        }
    else:
        options["address"] = address
        _knock(address)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield _joined(address, options)
        finally:
            ray.shutdown()


def _joined(address: str | None, options: Mapping[str, Any]) -> str | None:
    """Connect this process; the dashboard's URL. Raises ClusterError."""
    try:
        context = ray.init(**options)
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address!r}" if address else "a local Ray cluster"
        raise ClusterError(
            f"cannot reach {where}: {first_line(error)}; allowed: auto, HOST:PORT or ray://HOST:PORT of a running "
            "cluster with the same token (~/.ray/auth_token); no --address starts one here, --local runs without Ray"
        ) from error
    url = getattr(context, "dashboard_url", None)
    return f"http://{url}" if url else None


def _knock(address: str) -> None:
    """Is anyone there? Ray itself asks for minutes before it gives up. Raises ClusterError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`, which Ray resolves at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"cannot reach the Ray cluster at {address!r}: {error}; start it, or leave --address out to start one here"
        ) from error


def passed_on() -> dict[str, str]:
    """Environment of the workers: a running cluster has not the driver's, and they must import this very code."""
    chosen = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    root = str(Path(__file__).resolve().parent.parent)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    return chosen | {"PYTHONPATH": os.pathsep.join([root, *others])}


class Board:
    """Where workers write how far they are, for the driver to read: a worker in the midst of a call answers nobody."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}

    def write(self, key: str, done: int, total: int) -> None:
        """`done` of `total` items are answered in the batch whose first node is `key`."""
        self.counts[key] = done, total

    def read(self) -> dict[str, tuple[int, int]]:
        """What was written since the last time."""
        found, self.counts = self.counts, {}
        return found


class Worker:
    """Runs batches one after the other in its own process. Not async: inspect evaluates in the main thread only."""

    def __init__(self, store: Store, cpus: int, work: Work, board: Any, room: float) -> None:
        self.store = store
        self.workspace = Workspace(threads=cpus)
        self.work = work
        self.board = board
        self.room = room

    def run(self, nodes: Sequence[Node]) -> tuple[list[Outcome], bool]:
        """What `work` says, and whether the machine is so short of memory that this process, whose heap never shrinks,
        had better make room for a new one. Raises WorkerLost when it must be replaced."""
        written = time.monotonic()

        def write(done: int, total: int) -> None:
            nonlocal written
            if time.monotonic() - written > SECONDS_BETWEEN_NOTES:
                written = time.monotonic()
                self.board.write.remote(nodes[0].key, done, total)

        self.workspace.tell = write
        outcomes = self.work(nodes, self.store, self.workspace)
        memory = psutil.virtual_memory()
        return outcomes, memory.available < self.room * memory.total


@dataclass
class _Seat:
    """One worker's place on a node."""

    node: str
    actor: Any
    waits_for: Any
    """Of Ray: that the worker is up, or what came of its batch. None while it is idle."""
    batch: Batch | None = None
    calls: int = 0
    up: bool = False
    away: bool = False
    """It only waits for somebody else's machine: it holds no subject and takes nothing of the node's."""


class RayExecutor:
    """Batches on Ray actors, one batch a worker at a time, on every node of the cluster.

    One more worker, which takes no core, has the batches that are computed away, so that judges behind an API read
    while the subject answers. A worker that is lost (killed, out of memory, its node gone) is replaced where there is
    room, and its batch reported as lost; nodes that join later get workers as well. `tell` hears why nothing starts.
    Raises ClusterError when `ask` fits nowhere.
    """

    def __init__(
        self,
        store: Store,
        ask: Ask | None = None,
        *,
        most: int | None = None,
        work: Work = stages.run,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.store = store
        self.ask = ask or Ask()
        self.most = most
        self.work = work
        self.tell = tell
        self.watch: Watch = unwatched
        self._board: Any = ray.remote(Board).options(num_cpus=0, max_restarts=-1).remote()
        self._notes: Any = None
        self._seats: list[_Seat] = []
        self._looked = 0.0
        self._idle_since = time.monotonic()
        self._bad_starts = 0
        self._told = False
        check(self.ask, [resources for _, resources in self._nodes()])
        self._fill()

    @property
    def _resident(self) -> list[_Seat]:
        """The workers that hold a subject."""
        return [seat for seat in self._seats if not seat.away]

    @property
    def slots(self) -> int:
        """Workers there are, those included that are not up yet; without the one for what is computed away."""
        return max(1, len(self._resident))

    def free(self, away: bool = False) -> int:
        """Workers that are up and without a batch; the one for what is computed away starts when it is needed."""
        if away:
            return int(not any(seat.away and seat.waits_for is not None for seat in self._seats))
        return sum(seat.waits_for is None for seat in self._resident)

    def submit(self, batch: Batch) -> None:
        """Give `batch` to an idle worker."""
        away = batch.away
        seat = next((each for each in self._seats if each.waits_for is None and each.away == away), None)
        if seat is None:
            seat = self._hire_away()
        seat.batch, seat.calls = batch, seat.calls + 1
        seat.waits_for = seat.actor.run.options(name=batch.name).remote(list(batch.nodes))

    def wait(self, timeout: float) -> list[Finished]:
        """Batches that ended. Raises ClusterError when no worker can be had."""
        self._look()
        self._hear()
        waiting = {seat.waits_for: seat for seat in self._seats if seat.waits_for is not None}
        if not waiting:
            time.sleep(timeout)
            return []
        ended, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout)
        if ended:
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        return [finished for call in ended if (finished := self._collect(waiting[call]))]

    def close(self) -> None:
        """Kill the workers."""
        for seat in self._seats:
            ray.kill(seat.actor)
        self._seats.clear()
        ray.kill(self._board)

    def _hear(self) -> None:
        """Pass on what the board says. It is news only: without it the work goes on."""
        if self._notes is not None:
            if not ray.wait([self._notes], timeout=0)[0]:
                return
            with contextlib.suppress(RayError):
                notes = ray.get(self._notes)
                for seat in self._seats:
                    if seat.batch is not None and seat.batch.nodes[0].key in notes:
                        self.watch(seat.batch, *notes[seat.batch.nodes[0].key])
        self._notes = self._board.read.remote()

    def _collect(self, seat: _Seat) -> Finished | None:
        """What a worker waited for: None when it only came up, or did not."""
        batch, call = seat.batch, seat.waits_for
        seat.batch = seat.waits_for = None
        try:
            found = ray.get(call)
        except (RayActorError, OutOfMemoryError, WorkerLost) as error:
            self._drop(seat)
            if batch is None:
                self._bad_start(error)
                return None
            self._fill()
            return Finished(batch, lost=_reason(error))
        except RayTaskError as error:  # a defect of this program, not of a node: raise it as it was
            raise error.cause from error
        self._idle_since, self._bad_starts = time.monotonic(), 0
        if batch is None:
            seat.up = True
            return None
        outcomes, tired = found
        if tired or seat.calls >= CALLS_BEFORE_RECYCLING:
            self._drop(seat)
            self._fill()
        return Finished(batch, outcomes)

    def _bad_start(self, error: BaseException) -> None:
        """A worker did not come up. Its node may be on its way out; the next look will tell, unless it is always so."""
        self._looked = time.monotonic()
        self._bad_starts += 1
        if self._bad_starts >= BAD_STARTS:
            raise ClusterError(f"workers do not start ({_reason(error)}); does every node have this project installed?")

    def _drop(self, seat: _Seat) -> None:
        ray.kill(seat.actor)
        self._seats.remove(seat)

    def _look(self) -> None:
        """From time to time: have nodes joined or left, and is there anything to run on?"""
        now = time.monotonic()
        if now - self._looked > SECONDS_BETWEEN_LOOKS:
            self._fill()
        if any(seat.up for seat in self._resident):
            return
        alone = now - self._idle_since
        if not self._resident and alone > SECONDS_WITHOUT_WORKERS:
            raise ClusterError(
                f"no node that can hold a worker for {alone:.0f} s; start one (`ray start --address ...`) and run the "
                "same command again: finished nodes are kept"
            )
        if alone > SECONDS_BEFORE_TELLING and not self._told:
            self._told = True
            self.tell("waiting for room on the cluster: others hold what the workers need")

    def _nodes(self) -> list[tuple[str, dict[str, float]]]:
        return [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]

    def _fill(self) -> None:
        """A worker for every place that has none."""
        self._looked = time.monotonic()
        nodes = self._nodes()
        alive = {node for node, _ in nodes}
        self._seats = [seat for seat in self._seats if seat.node in alive or seat.waits_for is not None]
        for node, resources in nodes:
            taken = sum(seat.node == node for seat in self._resident)
            for options in self.ask.layout(resources)[taken:]:
                if self.most is None or len(self._resident) < self.most:
                    actor = self._hire(node, options)
                    self._seats.append(_Seat(node, actor, waits_for=actor.__ray_ready__.remote()))

    def _hire_away(self) -> _Seat:
        """The worker for what is computed away, on the first node that is alive. Raises ClusterError without any."""
        node = next((node for node, _ in self._nodes()), None)
        if node is None:
            raise ClusterError("the cluster has no node left; start it again and run the same command")
        seat = _Seat(node, self._hire(node, {"num_cpus": 0.0, "num_gpus": 0.0}), waits_for=None, up=True, away=True)
        self._seats.append(seat)
        return seat

    def _hire(self, node: str, options: dict[str, float]) -> Any:
        cpus = max(1, int(options["num_cpus"]))
        env = {"OMP_NUM_THREADS": str(cpus)}
        if not options["num_gpus"]:
            env["CUDA_VISIBLE_DEVICES"] = ""  # without it a worker that asked for no GPU sees them all
        settings = options | {
            "max_restarts": 0,  # the executor hires again, where there is room now, and counts the attempts
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            "runtime_env": {"env_vars": passed_on() | env},
        }
        return ray.remote(Worker).options(**settings).remote(self.store, cpus, self.work, self._board, ROOM)


def _reason(error: BaseException) -> str:
    if isinstance(error, RayTaskError):
        return str(error.cause)
    text = str(error)
    for mark in ("Worker exit detail: ", "died because its node has died"):
        if mark in text:
            return f"{type(error).__name__}: {text[text.index(mark) :].splitlines()[0][:300]}"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of its text that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
