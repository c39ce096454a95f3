"""A run without models, as a process of its own: twelve nodes in a real store, each `pace` seconds long."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.artifact import Store
from orchestrator.plan import Node
from orchestrator.run import LocalExecutor, Summary, walk
from orchestrator.stage import Outcome, each
from orchestrator.workspace import Workspace


def nodes(count: int = 6) -> list[Node]:
    """`count` fits, each with a score."""
    fits = [Node("fit", 1, {"n": number}, {}, f"chore {number}") for number in range(count)]
    return [*fits, *(Node("score", 1, {}, {"fit": fit.key}, fit.label) for fit in fits)]


def work(pace: float) -> Any:
    """A worker that takes `pace` seconds a node and writes down which it began."""

    def run(batch: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
        def one(node: Node, draft: Any) -> int:
            with Path(store.url, "begun.log").open("a") as log:
                log.write(f"{node.key}\n")
            (draft.folder / "half").write_text("half of it")
            time.sleep(pace)
            (draft.folder / "whole").write_text("all of it")
            return 0

        return each(batch, store, one)

    return run


def go(url: str, pace: float, tell: Any = lambda event: None) -> Summary:
    """Walk what is missing."""
    store = Store(url)
    with store.lock("drive", lambda text: print(text, flush=True)):
        missing = [node for node in nodes() if not store.has(node.key)]
        return walk(missing, store, LocalExecutor(store, Workspace(), work(pace)), tell)


if __name__ == "__main__":
    try:
        print("done", len(go(sys.argv[1], float(sys.argv[2])).done), flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)
