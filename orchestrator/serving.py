"""Teachers whose answers a vLLM server of our own computes: one server for all shards that the same teacher answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.acting import acts, edits_of
from orchestrator.server import Server, ServerError, serving
from orchestrator.stage import engine_of

if TYPE_CHECKING:
    from experiments.dataset import Ask, Said
    from experiments.speech import Sampling
    from orchestrator.artifact import Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace


@contextmanager
def teacher(node: Node, store: Store, workspace: Workspace) -> Iterator[Server]:
    """A server of the node's subject; one that was trained or steered is baked into a checkpoint first.

    Raises ServerError, BakeError for what no checkpoint can hold.
    """
    from experiments.bake import bake
    from experiments.identity import model_folder
    from experiments.spec import SubjectSpec

    wanted = node.params["subject"]
    spec = SubjectSpec.model_validate({**node.runtime["subject"], "dtype": wanted["dtype"]})
    if spec.chat_template is not None or spec.init is not None:
        raise ServerError(
            f"{spec.model} has a chat template or an init of its own, which no server is told of; leave out by: vllm"
        )
    edits = [edit for edit in edits_of(node, store) if acts(edit)]
    with tempfile.TemporaryDirectory(prefix="orch-served-") as temporary:
        folder = model_folder(spec, weights=True)
        if edits:
            folder = bake(engine_of(node, workspace), edits, Path(temporary) / "teacher").folder
        with serving(folder, wanted["dtype"], threads=workspace.threads) as server:
            yield server


def answers(server: Server, asks: Sequence[Ask], params: Mapping[str, Any], sampling: Sampling) -> list[Said]:
    """What the served teacher says, under its system prompt or the subject's own."""
    from evals import speaking

    system = params["system"] if params["system"] is not None else params["subject"]["system"]
    return speaking.answers(server.model(), asks, system, sampling, params["seed"], served=True)
