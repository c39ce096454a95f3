"""What a terminal shows while nodes run: bars for a person, one plain line a batch for a file."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

    from orchestrator.plan import Node
    from orchestrator.run import Event

SECONDS_BETWEEN_LINES = 60.0
"""How often a plain line says how far a long batch is."""
NOUNS = {
    "dataset": "datasets built",
    "fit": "trials fitted",
    "calibrate": "doses calibrated",
    "answer": "doses answered",
    "score": "doses scored",
    "compare": "tables compared",
}


class Progress(Protocol):
    """A context that is told every event."""

    def __enter__(self) -> Callable[[Event], None]: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def progress(nodes: Sequence[Node], *, terminal: bool, quiet: bool, write: Callable[[str], None]) -> Progress:
    """Bars on a terminal, lines through `write` elsewhere; with `quiet` only what went wrong, through `write`."""
    if terminal and not quiet:
        return Bars(nodes)
    return Lines(nodes, write, quiet=quiet)


class Lines:
    """One line for each finished batch, without control characters."""

    def __init__(self, nodes: Sequence[Node], write: Callable[[str], None], *, quiet: bool = False) -> None:
        self.left = Left(nodes)
        self.write = write
        self.quiet = quiet
        self._wrote = time.monotonic()

    def __enter__(self) -> Callable[[Event], None]:
        return self._tell

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def _tell(self, event: Event) -> None:
        if event.kind == "lost":
            self.left.take(event)
            self.write(f"lost   {event.batch.name}: {event.text}")
        elif event.kind == "items":
            self.left.take(event)
            if not self.quiet and time.monotonic() - self._wrote > SECONDS_BETWEEN_LINES:
                self._wrote = time.monotonic()
                self.write(f"{self.left.fraction()} {event.batch.name}  {self.left.brief(event.batch.stage)}")
        elif event.kind == "finish":
            self.left.take(event)
            self._wrote = time.monotonic()
            if not self.quiet:
                self.write(f"{self.left.fraction()} {event.batch.name}{self.left.note(event)}")
            for line in failures(event):
                self.write(line)


class Bars:
    """A bar for each stage, with items and the time that is left."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.left = Left(nodes)
        self.rich = RichProgress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {
            stage: self.rich.add_task(NOUNS[stage], total=count, note="")
            for stage, count in sorted(self.left.totals.items(), key=lambda pair: list(NOUNS).index(pair[0]))
        }

    def __enter__(self) -> Callable[[Event], None]:
        self.rich.start()
        return self._tell

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rich.stop()

    def _tell(self, event: Event) -> None:
        task = self.tasks[event.batch.stage]
        if event.kind == "start":
            self.rich.update(task, note=event.batch.name.split("[", 1)[1].rsplit("]", 1)[0])
        elif event.kind == "items":
            self.left.take(event)
            stage = event.batch.stage
            self.rich.update(task, completed=self.left.so_far(stage), note=self.left.brief(stage))
        elif event.kind == "lost":
            self.left.take(event)
            self.rich.console.print(f"lost {event.batch.name}: {event.text}", markup=False, highlight=False)
        elif event.kind == "finish":
            self.left.take(event)
            stage = event.batch.stage
            self.rich.update(task, completed=self.left.so_far(stage), note=self.left.brief(stage))
            for line in failures(event):
                self.rich.console.print(line, markup=False, highlight=False)


class Left:
    """Counts of nodes done and to do, and the time that the rest will take at the pace of its own stage."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.totals = Counter(node.stage for node in nodes)
        self.done: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self._last = time.monotonic()
        self._running: dict[str, dict[str, tuple[int, float]]] = {stage: {} for stage in self.totals}
        self._spent: dict[str, float] = dict.fromkeys(self.totals, 0.0)

    def take(self, event: Event) -> None:
        """Count what a batch has done: of a running one its items, and the share of its nodes that they make."""
        stage, key, now = event.batch.stage, event.batch.nodes[0].key, time.monotonic()
        self._spent[stage] += now - self._last  # what lay between two events is time of the later one's stage
        self._last = now
        if event.kind == "items":
            done, total = event.items
            self._running[stage][key] = done, len(event.batch.nodes) * done / max(1, total)
            return
        self._running[stage].pop(key, None)
        self.done[stage] += len(event.outcomes)
        self.items[stage] += sum(outcome.items for outcome in event.outcomes)

    def so_far(self, stage: str) -> float:
        """Nodes of `stage` that are done, with those in work by their share."""
        return self.done[stage] + sum(share for _, share in self._running[stage].values())

    def fraction(self) -> str:
        """`[12/340]`, as wide as it will ever be."""
        total = self.totals.total()
        return f"[{self.done.total():>{len(str(total))}}/{total}]"

    def eta(self, stage: str) -> float | None:
        """Seconds that the rest of `stage` will take, None before anything of it was done."""
        done = self.so_far(stage)
        if not done:
            return None
        return self._spent[stage] / done * (self.totals[stage] - done)

    def brief(self, stage: str) -> str:
        """Items so far and the time that is left, of one stage."""
        items = self.items[stage] + sum(done for done, _ in self._running[stage].values())
        parts = [f"{items:,} items"] if items else []
        left = self.eta(stage)
        if left:
            parts.append(f"about {clock(left)} left")
        return ", ".join(parts)

    def note(self, event: Event) -> str:
        """What a plain line says after the batch's name."""
        parts = [f"{sum(outcome.seconds for outcome in event.outcomes):.1f} s"]
        failed = sum(outcome.error is not None for outcome in event.outcomes)
        if failed:
            parts.append(f"{failed} FAILED")
        brief = self.brief(event.batch.stage)
        return "  " + ", ".join(parts + ([brief] if brief else []))


def failures(event: Event) -> list[str]:
    """One line for each failed node: its label, and the last line of its traceback."""
    assert event.batch is not None
    labels = {node.key: f"{node.stage}[{node.label}]:{node.key[:12]}" for node in event.batch.nodes}
    return [f"FAILED {labels[outcome.key]}: {last_line(outcome.error)}" for outcome in event.outcomes if outcome.error]


def last_line(text: str) -> str:
    """The last line that says something: of a traceback, the error itself, its class without the module's name."""
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return re.sub(r"^(?:\w+\.)+(\w+: )", r"\1", last)


def clock(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
