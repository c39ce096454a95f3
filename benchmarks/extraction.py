"""How long 8 direction methods at 8 layers take to fit, and how often each text passes the subject.

    python -m benchmarks.extraction [pairs] [repeats]

The 64 fits are planned from a spec and walked in this process, as `orch submit` does it, records included. `passes`
are the tokens that go through the first decoder layer, over those of all texts (sides of pairs): 1 is one pass a text,
less means that equal beginnings were computed once.

Beside it, transformers as notebooks use it: padded batches with all hidden states, one pass (forward, and backward for
the two methods that read gradients) for each method, or for each method and layer. One pass of either kind is measured
and multiplied, without any linear algebra; repeng trains its one method at all layers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments import dataset, spec
from experiments.contrast import Contrast
from experiments.datasets._bank import PROMPTS, lines
from experiments.engine import Engine
from experiments.gradients import Separation
from experiments.spec import EMBEDDED
from orchestrator.artifact import Store
from orchestrator.plan import Node, Plan, plan
from orchestrator.run import LocalExecutor, walk
from orchestrator.stage import EXAMPLES
from orchestrator.workspace import Workspace

ACTIVATIONS = ("mean_diff", "pca", "pca_centred", "pca_weighted", "probe", "sspace")
GRADIENTS = ("svd_gradient", "fisher")
LAYERS = tuple(range(6, 22, 2))
BATCH = 16  # texts of a padded batch

Rows = list[tuple[int, ...]]


def prompts(n: int, folder: str) -> str:
    """A file of n prompts: the built-in bank, and the same again with a wish behind each."""
    wishes = ("", " Be brief.", " Take your time.", " Give an example.", " Say why.")
    found = [text + wish for wish in wishes for text in lines(PROMPTS)]
    if n > len(found):
        raise SystemExit(f"{n} pairs: at most {len(found)} can be made")
    path = Path(folder) / "prompts.txt"
    path.write_text("\n".join(found[:n]), encoding="utf-8")
    return str(path)


def planned(pairs: int, folder: str) -> Plan:
    """The graph of the 64 fits."""
    return plan(
        spec.from_data(
            {
                "name": "extraction",
                "subject": {"model": EMBEDDED},
                "data": {
                    "pairs": {
                        "recipe": "persona_pairs",
                        "positive": "You are an honest assistant.",
                        "negative": "You are a dishonest assistant.",
                        "responses": "shared",
                        "n": pairs,
                        "prompts": prompts(pairs, folder),
                    }
                },
                "interventions": [{"method": name, "layer": list(LAYERS)} for name in ACTIVATIONS + GRADIENTS],
                "doses": [-1, 1],
                "evals": [{"task": "animal_preference", "target": "owl"}],
                "seeds": [0],
                "baselines": [],
            }
        )
    )


def engine_of(workspace: Workspace, node: Node) -> Engine:
    """The engine that the fits will find in `workspace`."""
    named = {**node.runtime["subject"], "dtype": node.params["subject"]["dtype"]}
    return workspace.engine(spec.SubjectSpec.model_validate(named))


def fits(nodes: list[Node], store: Store) -> tuple[float, int, Engine]:
    """Seconds of all fits in an engine that has read nothing, the tokens that passed, and that engine."""
    workspace = Workspace()
    engine = engine_of(workspace, nodes[0])
    seen: list[int] = []
    handle = engine.subject.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    started = time.perf_counter()
    done = walk(nodes, store, LocalExecutor(store, workspace), lambda event: None)
    took = time.perf_counter() - started
    handle.remove()
    if not done.ok:
        raise RuntimeError(f"{len(done.failed)} fits failed: {next(iter(done.failed.values()))[1]}")
    return took, sum(seen), engine


def padded(rows: Rows) -> dict[str, torch.Tensor]:
    """Rows as a left-padded batch, and logits of the last token alone."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "logits_to_keep": torch.tensor([longest - 1])}


def activation_pass(engine: Engine, rows: Rows) -> None:
    """All texts once, all hidden states kept for the batch."""
    subject = engine.subject
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            subject.model(**padded(rows[start : start + BATCH]), output_hidden_states=True)


def gradient_pass(engine: Engine, rows: Rows) -> None:
    """All texts once, and the gradient of the pairs' separation at the lowest of the layers."""
    subject = engine.subject
    target = Separation().target(subject)
    for start in range(0, len(rows), BATCH):
        batch = padded(rows[start : start + BATCH])
        leaf = torch.zeros(len(batch["input_ids"]), 1, subject.d_model, requires_grad=True)

        def add(_: Any, __: Any, output: Any, leaf: torch.Tensor = leaf) -> Any:
            moved = (output[0] if isinstance(output, tuple) else output) + leaf.to(subject.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = subject.blocks[LAYERS[0]].register_forward_hook(add)
        hidden = subject.model(**batch, output_hidden_states=True).hidden_states
        handle.remove()
        last = hidden[target + 1][:, -1].float()
        (-(last[0::2] - last[1::2]).norm(dim=-1).sum()).backward()


def repeng_pass(engine: Engine, rows: Rows) -> None:
    """repeng's ControlVector.train: its default method at all layers."""
    np.float_ = np.float64  # repeng 0.4.0 was written for NumPy 1
    from repeng import ControlVector, DatasetEntry

    subject = engine.subject
    texts = [subject.tokenizer.decode(tokens) for tokens in rows]
    entries = [DatasetEntry(*both) for both in zip(texts[0::2], texts[1::2], strict=True)]
    ControlVector.train(subject.model, subject.tokenizer, entries, batch_size=BATCH)


def seconds(work: Callable[[Engine, Rows], None], engine: Engine, rows: Rows, repeats: int) -> float:
    """Median seconds of `work`."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work(engine, rows)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    """Print the table."""
    given = [int(each) for each in sys.argv[1:]]
    pairs, repeats = given + [500, 3][len(given) :]
    with tempfile.TemporaryDirectory() as bank:
        measure(planned(pairs, bank), pairs, repeats)


def measure(made: Plan, pairs: int, repeats: int) -> None:
    """Print what the fits of `made` take, and what others would."""
    data = [node for node in made.nodes.values() if node.stage == "dataset"]
    nodes = [node for node in made.nodes.values() if node.stage == "fit"]
    ours, tokens = [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder)
            walk(data, store, LocalExecutor(store, Workspace()), lambda event: None)
            took, tokens, engine = fits(nodes, store)
            examples = dataset.load(store.folder(data[0].key) / EXAMPLES, "pairs")
        ours.append(took)
    rows = [row.tokens for row in Contrast(engine, examples, "last").rows]
    total = sum(map(len, rows))
    median = statistics.median(ours)
    forward, both, theirs = (
        seconds(work, engine, rows, repeats) for work in (activation_pass, gradient_pass, repeng_pass)
    )
    n, g, layers = len(ACTIVATIONS), len(GRADIENTS), len(LAYERS)
    table = [
        (f"orch: {len(nodes)} fits, measured", tokens / total, median),
        ("transformers: a pass for each method", n + g, n * forward + g * both),
        ("transformers: for each method and layer", (n + g) * layers, layers * (n * forward + g * both)),
        ("repeng: its PCA alone, all layers, measured", 1, theirs),
    ]
    print(
        f"{pairs} pairs, {total} tokens, {engine.subject.dtype}, {torch.get_num_threads()} threads, median of {repeats}"
    )
    print(f"one padded pass: forward {forward:.2f} s, with backward {both:.2f} s")
    print(f"{'':46} passes   seconds     ratio")
    for name, passes, took in table:
        print(f"{name:46} {passes:6.2f} {took:9.2f} {took / median:8.1f}x")


if __name__ == "__main__":
    main()
