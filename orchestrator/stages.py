"""The pipeline as one table: what each stage does, what may share a worker call, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.artifact import Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace


class WorkerLost(RuntimeError):
    """This process cannot go on (out of memory): it should be replaced, and its work tried again elsewhere."""


@dataclass(frozen=True)
class Outcome:
    """What came of one node."""

    key: str
    error: str | None = None
    """Traceback of a failure; the same text is in `failed.json`."""
    seconds: float = 0.0
    items: int = 0
    """Items answered, for the meter."""


@dataclass(frozen=True)
class Stage:
    """One kind of node. `order`: lower runs first. `most`: nodes in one worker call; they agree on `fuse_by`."""

    run: Callable[[Sequence[Node], Store, Workspace], list[Outcome]]
    version: int
    order: int
    most: int
    fuse_by: Callable[[Node], Hashable]


def run(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Do `nodes`, which are of one stage and agree on its `fuse_by`; publish each, its failure too.

    A node that fails leaves the others alone. Raises WorkerLost when this process should not be used again.
    """
    return STAGES[nodes[0].stage].run(nodes, store, workspace)


def _x(nodes, store, workspace):
    return []


STAGES: Mapping[str, Stage] = {
    "dataset": Stage(_x, version=1, order=0, most=1, fuse_by=lambda n: 0),
    "score": Stage(_x, version=1, order=1, most=64, fuse_by=lambda n: 0),
    "fit": Stage(_x, version=1, order=3, most=1, fuse_by=lambda n: 0),
    "answer": Stage(_x, version=1, order=4, most=64, fuse_by=lambda n: 0),
    "compare": Stage(_x, version=1, order=5, most=8, fuse_by=lambda n: 0),
}
