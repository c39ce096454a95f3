"""What every kind of work shares: the contract of a stage, its outcomes, and how a node is published.

Inputs are read from the store by key, results are published to it, and only outcomes go back to the driver.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.storage import StoreError, full_disk

if TYPE_CHECKING:
    from experiments.engine import Engine
    from orchestrator.artifact import Publication, Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace

EXAMPLES, SAID, STATE, LOG = "examples.jsonl", "said.jsonl", "state.safetensors", "answer.eval"
ITEMS, FINDINGS = "items.json", "findings.json"


class WorkerLost(RuntimeError):
    """This process cannot go on (out of memory): it should be replaced, and its work tried again elsewhere."""


class StageError(ValueError):
    """A result that must not be published: an intervention that never acted, an eval that did not finish."""


@dataclass(frozen=True)
class Outcome:
    """What came of one node."""

    key: str
    error: str | None = None
    """Traceback of a failure; the same text is in `failed.json`."""
    seconds: float = 0.0
    items: int = 0
    """Items answered, for the meter."""


def here(node: Node) -> bool:
    """Nothing of it is computed elsewhere."""
    return False


@dataclass(frozen=True)
class Stage:
    """One kind of node. `order`: lower runs first. `most`: nodes in one worker call; they agree on `fuse_by`.

    `spread`: such nodes are dealt out over the workers; otherwise they go to one together. `away`: whether somebody
    else's machine computes a node (a judge or a teacher behind an API), which then takes no worker from the others.
    """

    run: Callable[[Sequence[Node], Store, Workspace], list[Outcome]]
    order: int
    most: int
    fuse_by: Callable[[Node], Hashable]
    spread: bool = True
    away: Callable[[Node], bool] = here


def each(nodes: Sequence[Node], store: Store, work: Callable[[Node, Publication], int]) -> list[Outcome]:
    """`work` on each node by itself; it fills the draft and gives the number of items."""
    return [one(node, store, work) for node in nodes]


def one(node: Node, store: Store, work: Callable[[Node, Publication], int], seconds: float = 0.0) -> Outcome:
    """Publish what `work` makes of `node`, or why it could not. `seconds` were spent on it before."""
    if store.has(node.key):  # another run was quicker
        return Outcome(node.key)
    started = time.monotonic()
    items, error = 0, None
    try:
        with store.publishing(node) as draft:
            items = work(node, draft)
    except Exception as caught:  # the named boundary: a failed node is a record with a traceback
        raise_if_hopeless(caught)
        error = "".join(traceback.format_exception(caught))
    return Outcome(node.key, error, seconds + time.monotonic() - started, items)


def raise_if_hopeless(error: BaseException) -> None:
    """Out of memory is the worker's end; a full disk is the whole run's, whose next node would only meet it again."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise WorkerLost(f"out of memory: {first}") from error
    if isinstance(error, StoreError) and error.__cause__ is not None and full_disk(error.__cause__):
        raise error


def engine_of(node: Node, workspace: Workspace) -> Engine:
    """The engine of the subject that the node's key means."""
    return loaded(node.runtime["subject"], node.params["subject"], workspace)


def loaded(settings: Mapping[str, Any], wanted: Mapping[str, Any], workspace: Workspace) -> Engine:
    """The engine of the subject that `wanted` identifies; refuses another one, whatever its settings say."""
    from experiments.spec import SubjectSpec
    from experiments.subject import SubjectError

    spec = SubjectSpec.model_validate({**settings, "dtype": wanted["dtype"]})
    engine = workspace.engine(spec)
    found = engine.subject.identity
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise SubjectError(
            f"subject {spec.model!r} is not the one that was planned: {name} is {found.get(name)!r}, planned was "
            f"{wanted.get(name)!r}; do all machines have the same files? then plan again"
        )
    return engine


def failure(node: Node, store: Store, error: BaseException) -> Outcome:
    """Publish a failure that happened outside the node's own publication."""

    def work(node: Node, draft: Publication) -> int:
        raise error

    return one(node, store, work)
