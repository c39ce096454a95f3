"""One thread per engine that gathers the requests of all running samples, tasks and doses, and sends them as one call.

The engine is fast when it sees everything at once: equal prefixes of all doses' questions are computed once. So the
thread waits until as many samples have asked as `expect` announced. Without an announcement, or when samples fail
before they ask, it goes by silence.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.engine import Engine, Row

QUIET = 0.03  # seconds without a new request after which all are taken to have asked
PATIENCE = 10.0  # the same while announced samples are missing (starting many arms has long pauses)

OptionTokens = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, eq=False)
class Request:
    """One row for one of the engine's verbs. `call` is the verb and its settings; requests with equal ones share it."""

    arm: str
    row: Row
    call: tuple[Any, ...]
    options: OptionTokens | None = None
    seed: int = 0


class Ticket:
    """Requests that were submitted together; `future` has their results once all are there, or the first error."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.future: Future[list[Any]] = Future()
        self._results: list[Any] = [None] * len(requests)
        self._left = set(range(len(requests)))

    def result(self, index: int, value: Any) -> bool:
        """Fill in one result; True when it is the last. A second one for the same request is ignored: a retried batch
        repeats what it had."""
        if index not in self._left or self.future.done():
            return False
        self._left.remove(index)
        self._results[index] = value
        if not self._left:
            self.future.set_result(self._results)
        return not self._left

    def fail(self, error: Exception) -> None:
        """Fail all of them."""
        if not self.future.done():
            self.future.set_exception(error)


Waiting = tuple[Request, Ticket, int]


Tell = Callable[[int, int], None]
"""Told how many submissions are answered, and how many were announced."""


def _nobody(done: int, total: int) -> None:
    """Nobody wants to know."""


class Collector:
    """Gathers requests for one engine. The thread lives while there is something to do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: list[Waiting] = []
        self._tickets = 0
        self._expected = 0
        self._last = 0.0
        self._running = False
        self._tell: Tell = _nobody
        self._done = self._total = 0

    def expect(self, tickets: int, tell: Tell = _nobody) -> None:
        """Announce how many submissions to wait for before the first call; `tell` hears how many are answered."""
        self._expected = self._total = tickets
        self._tell, self._done = tell, 0

    def submit(self, requests: Sequence[Request]) -> Future[list[Any]]:
        """Queue requests; the future gets the engine's results in their order, or the engine's error."""
        ticket = Ticket(requests)
        if not requests:
            ticket.future.set_result([])
            return ticket.future
        with self._lock:
            self._waiting.extend((request, ticket, index) for index, request in enumerate(requests))
            self._tickets += 1
            self._last = time.monotonic()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="orch-collector", daemon=True).start()
        return ticket.future

    def _run(self) -> None:
        while True:
            self._settle()
            with self._lock:
                batch, self._waiting = self._waiting, []
                self._tickets = self._expected = 0
                if not batch:
                    self._running = False
                    return
            groups: dict[tuple[Any, ...], list[Waiting]] = {}
            for waiting in batch:
                groups.setdefault(waiting[0].call, []).append(waiting)
            for group in groups.values():
                self._send(group)

    def _settle(self) -> None:
        """Return when all announced samples have asked, or requests have stopped coming."""
        while not 0 < self._expected <= self._tickets:
            silence = time.monotonic() - self._last
            enough = PATIENCE if self._expected else QUIET
            if silence >= enough:
                return
            time.sleep(min(QUIET, enough - silence))

    def _send(self, batch: Sequence[Waiting]) -> None:
        """One call for the batch. When it fails and holds several arms, each arm is tried alone, so that only the arm
        whose edits or rows cannot be computed is lost."""
        try:
            self._call(batch)
        except Exception as error:
            left = [waiting for waiting in batch if not waiting[1].future.done()]
            arms = sorted({request.arm for request, _, _ in left})
            if len({request.arm for request, _, _ in batch}) == 1:
                for _, ticket, _ in left:
                    ticket.fail(error)
                return
            for arm in arms:
                self._send([waiting for waiting in left if waiting[0].arm == arm])

    def _call(self, batch: Sequence[Waiting]) -> None:
        def on_result(index: int, result: Any) -> None:
            _, ticket, place = batch[index]
            if ticket.result(place, result):
                self._done += 1
                self._tell(min(self._done, self._total), self._total)  # a sample of several turns asks more than once

        rows = [request.row for request, _, _ in batch]
        verb, *rest = batch[0][0].call
        if verb == "options":
            options = [request.options or {} for request, _, _ in batch]
            results: Sequence[Any] = self._engine.option_logprobs(rows, options, top=rest[0], on_result=on_result)
        elif verb == "tokens":
            results = self._engine.token_logprobs(rows, on_result=on_result)
        else:
            max_new_tokens, temperature, top_p, stop = rest
            seeds = [request.seed for request, _, _ in batch]
            results = self._engine.generate(
                rows, max_new_tokens, temperature=temperature, top_p=top_p, seeds=seeds, stop=stop, on_result=on_result
            )
        for index, result in enumerate(results):
            on_result(index, result)


_COLLECTORS: weakref.WeakKeyDictionary[Any, Collector] = weakref.WeakKeyDictionary()


def collector(engine: Engine) -> Collector:
    """The engine's only collector."""
    if engine not in _COLLECTORS:
        _COLLECTORS[engine] = Collector(engine)
    return _COLLECTORS[engine]
