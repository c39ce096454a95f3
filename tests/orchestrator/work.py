"""What fake workers do in the tests of scheduling: importable by name, because Ray workers are other processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.stage import Outcome, WorkerLost


@dataclass(frozen=True)
class Chore:
    """A node that does what its label says."""

    stage: str
    key: str
    label: str = "quick"
    inputs: dict[str, str] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FolderStore:
    """A file for each record, and one line in `work.log` for each time a node was begun."""

    folder: Path

    def has(self, key: str) -> bool:
        return (self.folder / key).exists()

    def fail(self, node: Chore, error: str) -> None:
        (self.folder / f"{node.key}.failed").write_text(error)

    def begin(self, key: str) -> None:
        with (self.folder / "work.log").open("a") as log:
            log.write(f"{key} {os.getpid()}\n")

    def begun(self) -> list[tuple[str, int]]:
        log = self.folder / "work.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]


def work(nodes: Sequence[Any], store: Any, workspace: Any) -> list[Outcome]:
    """Do each chore: quick, slow, say how far it is, wait for one, die once, always die, run out of memory, fail."""
    outcomes = []
    for node in nodes:
        store.begin(node.key)
        first = [key for key, _ in store.begun()].count(node.key) == 1
        if node.label == "slow":
            time.sleep(1.0)
        if node.label == "counts":
            time.sleep(1.2)
            workspace.tell(3, 8)
            time.sleep(2.5)
        if node.label.startswith("waits for ") and not _has_begun(node.label.removeprefix("waits for "), store):
            outcomes.append(Outcome(node.key, "Traceback\nTimeoutError: the other did not begin"))
            continue
        if node.label == "waits to be killed" and first:
            time.sleep(60)
        if node.label == "always dies" or (node.label == "dies once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if node.label == "out of memory" and first:
            raise WorkerLost("out of memory: 3 GiB asked")
        if node.label == "fails":
            outcomes.append(Outcome(node.key, "Traceback\nValueError: no"))
            continue
        if node.label == "defect":
            raise ZeroDivisionError("a defect")
        (store.folder / node.key).write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {workspace.threads}")
        outcomes.append(Outcome(node.key, seconds=0.1))
    return outcomes


def _has_begun(key: str, store: FolderStore) -> bool:
    deadline = time.monotonic() + 60
    while all(begun != key for begun, _ in store.begun()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
