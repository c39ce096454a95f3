"""The pipeline as one table: what each stage does, what may share a worker call, and in which order.

Inputs are read from the store by key, results are published to it, and only outcomes go back to the driver.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.canonical import canonical
from orchestrator.artifact import slug
from orchestrator.gather import comparison
from orchestrator.storage import StoreError, full_disk

if TYPE_CHECKING:
    from evals.evaluate import Answer, Arm
    from experiments.edit import Edit
    from experiments.engine import Engine
    from orchestrator.artifact import Publication, Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace

EXAMPLES, STATE, LOG = "examples.jsonl", "state.safetensors", "answer.eval"
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


@dataclass(frozen=True)
class Stage:
    """One kind of node. `order`: lower runs first. `most`: nodes in one worker call; they agree on `fuse_by`.

    `spread`: such nodes are dealt out over the workers; otherwise they go to one together.
    """

    run: Callable[[Sequence[Node], Store, Workspace], list[Outcome]]
    order: int
    most: int
    fuse_by: Callable[[Node], Hashable]
    spread: bool = True


def run(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Do `nodes`, which are of one stage and agree on its `fuse_by`; publish each, its failure too.

    A node that fails leaves the others alone. Raises WorkerLost when this process should not be used again.
    """
    return STAGES[nodes[0].stage].run(nodes, store, workspace)


def _each(nodes: Sequence[Node], store: Store, work: Callable[[Node, Publication], int]) -> list[Outcome]:
    """`work` on each node by itself; it fills the draft and gives the number of items."""
    return [_one(node, store, work) for node in nodes]


def _one(node: Node, store: Store, work: Callable[[Node, Publication], int], seconds: float = 0.0) -> Outcome:
    """Publish what `work` makes of `node`, or why it could not. `seconds` were spent on it before."""
    if store.has(node.key):  # another run was quicker
        return Outcome(node.key)
    started = time.monotonic()
    items, error = 0, None
    try:
        with store.publishing(node) as draft:
            items = work(node, draft)
    except Exception as caught:  # the named boundary: a failed node is a record with a traceback
        _raise_if_hopeless(caught)
        error = "".join(traceback.format_exception(caught))
    return Outcome(node.key, error, seconds + time.monotonic() - started, items)


def _raise_if_hopeless(error: BaseException) -> None:
    """Out of memory is the worker's end; a full disk is the whole run's, whose next node would only meet it again."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise WorkerLost(f"out of memory: {first}") from error
    if isinstance(error, StoreError) and error.__cause__ is not None and full_disk(error.__cause__):
        raise error


def _engine(node: Node, workspace: Workspace) -> Engine:
    """The engine of the subject that the node's key means; refuses another one, whatever the settings say."""
    from experiments.spec import SubjectSpec
    from experiments.subject import SubjectError

    wanted = node.params["subject"]
    spec = SubjectSpec.model_validate({**node.runtime["subject"], "dtype": wanted["dtype"]})
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


def _dataset(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    from experiments import dataset

    def work(node: Node, draft: Publication) -> int:
        recipe = dataset.recipe(node.runtime["recipe"]).model_validate(node.runtime["settings"])
        engine = _engine(node, workspace) if recipe.needs_subject else None
        examples = recipe.build(engine, node.params["seed"])
        dataset.save(examples, draft.folder / EXAMPLES)
        draft.outputs |= {"examples": len(examples), "provides": recipe.provides}
        return len(examples)

    return _each(nodes, store, work)


def _data_of(node: Node) -> list[str]:
    """Keys of the datasets that a node reads: its input `data`, or one `data/KIND` for each kind."""
    return [key for role, key in sorted(node.inputs.items()) if role.partition("/")[0] == "data"]


def _examples(node: Node, store: Store) -> list[Any]:
    """Every example that a node reads, kind by kind."""
    from experiments import dataset

    return [
        example
        for key in _data_of(node)
        for example in dataset.load(store.folder(key) / EXAMPLES, store.record(key)["outputs"]["provides"])
    ]


def _fit(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Those that read gradients first: what they read serves the others."""
    from experiments import intervention

    def work(node: Node, draft: Publication) -> int:
        if shared := node.inputs.get("fit"):
            shutil.copyfile(store.folder(shared) / STATE, draft.folder / STATE)
            draft.outputs |= {**store.record(shared)["outputs"], "fit_seconds": 0.0}
            return 0
        method = intervention.method(node.runtime["method"]).model_validate(node.runtime["settings"])
        data = _examples(node, store)
        engine = _engine(node, workspace)
        started = time.monotonic()
        state = method.fit(engine, data, node.params["seed"])
        seconds = time.monotonic() - started
        state.save(draft.folder / STATE)
        draft.outputs |= {
            "facts": dict(state.facts),
            "examples": len(data),
            "fit_seconds": round(seconds, 3),
        }
        return len(data)

    return _each(sorted(nodes, key=lambda node: node.runtime.get("reads") != "gradients"), store, work)


def _calibrate(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    from evals.calibrate import calibrate
    from experiments import dataset, intervention
    from experiments.parts import Calibrate

    def work(node: Node, draft: Publication) -> int:
        method = intervention.method(node.runtime["method"]).model_validate(node.runtime["settings"])
        state = intervention.State.load(store.folder(node.inputs["state"]) / STATE)
        pairs = [each for each in _examples(node, store) if isinstance(each, dataset.Pair)]
        params = node.params
        wanted = Calibrate.model_validate(params["wanted"])
        engine = _engine(node, workspace)
        edits_of = partial(method.edits, state)
        found = calibrate(engine, edits_of, params["kind"], wanted, params["dev"], pairs)
        draft.outputs |= found.facts()
        return len(found.tried)

    return _each(nodes, store, work)


def _answer(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """One inspect eval over all `nodes`, which ask the same task of the same subject."""
    arms: dict[str, Arm] = {}
    failed: dict[str, Outcome] = {}
    for node in nodes:
        try:
            arms[node.key] = _arm(node, store)
        except Exception as error:  # only this dose cannot be applied
            failed[node.key] = _failure(node, store, error)
    left = [node for node in nodes if node.key in arms]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orch-answer-") as temporary:
        try:
            answers, fired = _ask(left, list(arms.values()), workspace, Path(temporary)) if left else ({}, {})
        except Exception as error:  # nothing of this call can be used
            _raise_if_hopeless(error)
            failed |= {node.key: _failure(node, store, error) for node in left}
            answers = {}
        share = (time.monotonic() - started) / max(1, len(left))
        done = {
            key: _publish_answer(node, store, arms[key], answers[key], fired, share)
            for node in left
            if (key := node.key) in answers
        }
    return [(failed | done)[node.key] for node in nodes]


def _arm(node: Node, store: Store) -> Arm:
    """The edits of one dose; the untouched subject has none."""
    from evals.evaluate import Arm
    from experiments import intervention

    if node.runtime["method"] is None:
        return Arm(_model_name(node), (), node.label)
    method = intervention.method(node.runtime["method"]).model_validate(node.runtime["settings"])
    state = intervention.State.load(store.folder(node.inputs["state"]) / STATE)
    dose = node.params["dose"]
    if unit := node.inputs.get("unit"):
        dose *= store.record(unit)["outputs"]["unit"]
    label, edits = f"{node.label} dose {dose:g}", tuple(method.edits(state, dose))
    if not edits and method.dose_kind != "on_off":  # a sign of an on/off method may be the subject's own context
        raise StageError(f"{label}: no edit is made, so that it would be the untouched subject; use another dose")
    return Arm(_model_name(node), edits, label)


def _model_name(node: Node) -> str:
    """`mean_diff-L14_+2@3fa9c1d2b7e4`: what a viewer shows; the key makes it the name of one content."""
    label = slug(node.label.partition(" ")[2])
    dose = node.params.get("dose")
    return label + ("" if dose is None else f"_{dose:+g}") + f"@{node.short}"


def _ask(
    nodes: Sequence[Node], arms: Sequence[Arm], workspace: Workspace, folder: Path
) -> tuple[dict[str, Answer], Mapping[Edit, int]]:
    """The answers by node key, and how many tokens each edit acted on."""
    from evals.evaluate import evaluate

    engine = _engine(nodes[0], workspace)
    engine.fired.clear()
    first = nodes[0]
    task, arguments = first.params["task"], first.runtime["arguments"]
    found = evaluate(engine, arms, task, arguments, lambda key: folder / key, workspace.tell)
    return {node.key: answer for node, answer in zip(nodes, found, strict=True)}, dict(engine.fired)


def _publish_answer(
    node: Node, store: Store, arm: Arm, answer: Answer, fired: Mapping[Edit, int], share: float
) -> Outcome:
    """Publish one arm's log. `share` is its part of the call's seconds: the arms ran side by side."""

    def work(node: Node, draft: Publication) -> int:
        if answer.error is not None or answer.log is None:
            raise StageError(f"the eval did not finish: {answer.error}")
        counts = _counts(arm, fired)
        answer.log.rename(draft.folder / LOG)
        draft.outputs |= {"samples": answer.samples, "tokens": answer.tokens, "edits": len(arm.edits), "fired": counts}
        draft.outputs["eval_seconds"] = round(share, 3)
        return answer.samples

    return _one(node, store, work, share)


def _counts(arm: Arm, fired: Mapping[Edit, int]) -> list[int]:
    """Tokens each edit acted on, in their order; of a Prompt, the tokens that it changed.

    Raises StageError for one that never did: its dose would be the base in disguise.
    """
    from experiments.edit import Prompt

    idle = [edit for edit in arm.edits if not fired.get(edit)]
    if not idle:
        return [fired[edit] for edit in arm.edits]
    edit = idle[0]
    told = f"{arm.label}: {len(idle)} of {len(arm.edits)} edits acted on no token"
    if isinstance(edit, Prompt):
        raise StageError(f"{told}: the system prompt {edit.system!r} is the one that is in force without it")
    where = getattr(edit, "site", None) or getattr(edit, "module", None) or getattr(edit, "parameter", "")
    raise StageError(
        f"{told}, as {type(edit).__name__} at {where} with positions {getattr(edit, 'positions', 'all')!r}; choose "
        "positions that this eval has"
    )


def _failure(node: Node, store: Store, error: BaseException) -> Outcome:
    """Publish a failure that happened outside the node's own publication."""

    def work(node: Node, draft: Publication) -> int:
        raise error

    return _one(node, store, work)


def _score(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    from evals import items

    def work(node: Node, draft: Publication) -> int:
        found = items.items(store.folder(node.inputs["answer"]) / LOG)
        items.save(found, draft.folder / ITEMS)
        draft.outputs |= {"items": len(found), "unscored": sum(one.reason is not None for one in found)}
        return len(found)

    return _each(nodes, store, work)


def _compare(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    from evals import compare, findings, items

    def items_of(key: str) -> Sequence[items.Item]:
        return items.load(store.folder(key) / ITEMS)

    def work(node: Node, draft: Publication) -> int:
        found = compare.compare(comparison(node.params, node.inputs, items_of))
        findings.save(found, draft.folder / FINDINGS)
        draft.outputs |= {"rows": len(found.rows), "points": len(found.points)}
        return 0

    return _each(nodes, store, work)


def _asks_alike(node: Node) -> Hashable:
    """Answers fuse when the same questions go to the same subject."""
    params = node.params
    return canonical(params["subject"]), params["task"], canonical(params["settings"])


def _reads_alike(node: Node) -> Hashable:
    """Fits fuse when they read the same data with the same subject, and keep what they read."""
    if not node.runtime.get("reads"):
        return node.key
    return canonical(node.params["subject"]), *_data_of(node)


def _alone(node: Node) -> Hashable:
    return node.key


def _together(node: Node) -> Hashable:
    return None


STAGES: Mapping[str, Stage] = {
    "dataset": Stage(_dataset, order=0, most=1, fuse_by=_alone),
    "score": Stage(_score, order=1, most=64, fuse_by=_together),
    "fit": Stage(_fit, order=3, most=256, fuse_by=_reads_alike, spread=False),
    "calibrate": Stage(_calibrate, order=4, most=1, fuse_by=_alone),
    "answer": Stage(_answer, order=5, most=32, fuse_by=_asks_alike),
    "compare": Stage(_compare, order=6, most=1, fuse_by=_alone),
}
"""The untouched subject's answers come before the fits: see `run.py`."""
