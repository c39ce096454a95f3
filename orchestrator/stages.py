"""The pipeline as one table: what each stage does, what may share a worker call, and in which order."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.canonical import canonical
from orchestrator import asking, learning, teaching
from orchestrator.stage import Outcome, Stage
from orchestrator.teaching import data_of

if TYPE_CHECKING:
    from orchestrator.artifact import Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace


def run(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Do `nodes`, which are of one stage and agree on its `fuse_by`; publish each, its failure too.

    A node that fails leaves the others alone. Raises WorkerLost when this process should not be used again.
    """
    return STAGES[nodes[0].stage].run(nodes, store, workspace)


def _asks_alike(node: Node) -> Hashable:
    """Answers fuse when the same questions go to the same subject."""
    params = node.params
    return canonical(params["subject"]), params["task"], canonical(params["settings"])


def _reads_alike(node: Node) -> Hashable:
    """Fits fuse when they read the same data with the same subject and keep what they read, and when they are students
    of one class."""
    if "class" in node.runtime:
        return canonical(node.params["subject"]), node.runtime["class"]
    if not node.runtime.get("reads"):
        return node.key
    return canonical(node.params["subject"]), *data_of(node)


def _served_alike(node: Node) -> Hashable:
    """Shards that one vLLM server answers share it; what the engine answers is a call each."""
    if node.params.get("by") != "vllm":
        return node.key
    return canonical(node.params["subject"]), node.inputs.get("state"), node.params.get("dose")


def _by_api(node: Node) -> bool:
    return node.runtime.get("model") is not None


def _judged_by_api(node: Node) -> bool:
    return not node.runtime["residents"]


def _alone(node: Node) -> Hashable:
    return node.key


def _together(node: Node) -> Hashable:
    return None


STAGES: Mapping[str, Stage] = {
    "dataset": Stage(teaching.make, order=0, most=1, fuse_by=_alone),
    "generate": Stage(teaching.generate, order=3, most=64, fuse_by=_served_alike, spread=False, away=_by_api),
    "score": Stage(asking.score, order=1, most=64, fuse_by=_together),
    "fit": Stage(learning.fit, order=4, most=256, fuse_by=_reads_alike, spread=False),
    "interpret": Stage(teaching.interpret, order=4, most=1, fuse_by=_alone),
    "calibrate": Stage(teaching.calibrate, order=5, most=1, fuse_by=_alone),
    "answer": Stage(asking.answer, order=6, most=32, fuse_by=_asks_alike),
    "judge": Stage(asking.judge, order=7, most=1, fuse_by=_alone, away=_judged_by_api),
    "compare": Stage(asking.compare, order=8, most=1, fuse_by=_alone),
}
"""The untouched subject's answers come before the fits: see `run.py`."""
