"""One thread per engine that gathers the requests of all running samples, tasks and doses, and sends them as one call.

The engine is fast when it sees everything at once: equal prefixes of all doses' questions are computed once. So the thread waits until no
request has come for `QUIET` seconds (every sample in flight has then asked) or `MOST` are waiting.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.engine import Engine, Row

QUIET = 0.03  # seconds without a new request
MOST = 20_000  # requests

OnResult = Callable[[int, Any], None]
OptionTokens = Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(eq=False)
class Request:
    """One row for one of the engine's verbs. Requests with equal `call` may share a call."""

    arm: str
    row: Row
    call: tuple[Hashable, ...]
    options: OptionTokens | None = None
    seed: int | None = None
    future: Future[Any] = field(default_factory=Future)


class Collector:
    """Gathers requests for one engine. The thread lives while there is something to do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: list[Request] = []
        self._last = 0.0
        self._running = False

    def submit(self, request: Request) -> Future[Any]:
        """Queue a request; its future gets the engine's result for this row, or the engine's error."""
        with self._lock:
            self._waiting.append(request)
            self._last = time.monotonic()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="orch-collector", daemon=True).start()
        return request.future

    def _run(self) -> None:
        while True:
            self._settle()
            with self._lock:
                batch, self._waiting = self._waiting, []
                if not batch:
                    self._running = False
                    return
            for _, group in groupby(sorted(batch, key=lambda r: repr(r.call)), key=lambda r: repr(r.call)):
                self._send(list(group))

    def _settle(self) -> None:
        """Return when requests have stopped coming."""
        while len(self._waiting) < MOST:
            silence = time.monotonic() - self._last
            if silence >= QUIET:
                return
            time.sleep(QUIET - silence)

    def _send(self, batch: Sequence[Request]) -> None:
        """One call for the batch. When it fails and holds several arms, each arm is tried alone, so that only the arm
        whose edits or rows cannot be computed is lost."""
        try:
            self._call(batch)
        except Exception as error:
            left = [request for request in batch if not request.future.done()]
            arms = {request.arm for request in batch}
            if len(arms) == 1:
                for request in left:
                    request.future.set_exception(error)
                return
            for arm in sorted(arms):
                alone = [request for request in left if request.arm == arm]
                if alone:
                    self._send(alone)

    def _call(self, batch: Sequence[Request]) -> None:
        def on_result(index: int, result: Any) -> None:
            if not batch[index].future.done():
                batch[index].future.set_result(result)

        rows = [request.row for request in batch]
        verb, *rest = batch[0].call
        if verb == "options":
            results: Sequence[Any] = self._engine.option_logprobs(
                rows, [request.options or {} for request in batch], top=rest[0], on_result=on_result
            )
        elif verb == "tokens":
            results = self._engine.token_logprobs(rows, on_result=on_result)
        else:
            max_new_tokens, temperature, top_p, stop = rest
            seeds = [request.seed or 0 for request in batch]
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
