"""The last stages: what subjects answer, how that is scored, and what comes of the comparison."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.acting import counts, dose_of, edits_of
from orchestrator.artifact import slug
from orchestrator.filters import ABOUT
from orchestrator.gather import comparison, detections
from orchestrator.stage import (
    FINDINGS,
    ITEMS,
    LOG,
    SAID,
    Outcome,
    StageError,
    each,
    engine_of,
    failure,
    loaded,
    one,
    raise_if_hopeless,
)

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.model import Model

    from evals.evaluate import Answer, Arm
    from experiments.edit import Edit
    from orchestrator.artifact import Publication, Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace


def answer(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """One inspect eval over all `nodes`, which ask the same task of the same subject."""
    arms: dict[str, Arm] = {}
    failed: dict[str, Outcome] = {}
    for node in nodes:
        try:
            arms[node.key] = arm(node, store)
        except Exception as error:  # only this dose cannot be applied
            failed[node.key] = failure(node, store, error)
    left = [node for node in nodes if node.key in arms]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="orch-answer-") as temporary:
        try:
            answers, fired = _ask(left, list(arms.values()), workspace, Path(temporary)) if left else ({}, {})
        except Exception as error:  # nothing of this call can be used
            raise_if_hopeless(error)
            failed |= {node.key: failure(node, store, error) for node in left}
            answers = {}
        share = (time.monotonic() - started) / max(1, len(left))
        done = {
            key: _publish_answer(node, store, arms[key], answers[key], fired, share)
            for node in left
            if (key := node.key) in answers
        }
    return [(failed | done)[node.key] for node in nodes]


def arm(node: Node, store: Store) -> Arm:
    """The edits of one dose; the untouched subject has none."""
    from evals.evaluate import Arm

    if node.runtime["method"] is None:
        return Arm(_model_name(node), (), node.label)
    return Arm(_model_name(node), edits_of(node, store), f"{node.label} dose {dose_of(node, store):g}")


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

    engine = engine_of(nodes[0], workspace)
    engine.fired.clear()
    first = nodes[0]
    task, arguments = first.params["task"], first.runtime["arguments"]
    score = not first.runtime.get("judged")
    found = evaluate(engine, arms, task, arguments, lambda key: folder / key, workspace.tell, score)
    return {node.key: answer for node, answer in zip(nodes, found, strict=True)}, dict(engine.fired)


def _publish_answer(
    node: Node, store: Store, arm: Arm, answer: Answer, fired: Mapping[Edit, int], share: float
) -> Outcome:
    """Publish one arm's log. `share` is its part of the call's seconds: the arms ran side by side."""

    def work(node: Node, draft: Publication) -> int:
        if answer.error is not None or answer.log is None:
            raise StageError(f"the eval did not finish: {answer.error}")
        acted = counts(arm.label, arm.edits, fired)
        answer.log.rename(draft.folder / LOG)
        draft.outputs |= {"samples": answer.samples, "tokens": answer.tokens, "edits": len(arm.edits), "fired": acted}
        draft.outputs["eval_seconds"] = round(share, 3)
        return answer.samples

    return one(node, store, work, share)


def judge(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Verdicts on stored answers, in a copy of their log, or on what a teacher said; nobody else is asked again."""
    from agents.judge import Judge
    from evals import RUBRICS
    from evals.judging import finished, judge_answers
    from evals.task import load_task

    def work(node: Node, draft: Publication) -> int:
        settings = Judge.model_validate(node.runtime["judge"])
        rows = "said" in node.inputs
        roles = node.params["rubrics"] if rows else load_task(node.runtime["task"]).RUBRICS
        rubrics = settings.rubrics_for(roles, RUBRICS)
        found = {role: one.digest for role, one in rubrics.items()}
        if found != dict(node.params["rubrics"]):
            raise StageError(f"the rubrics are not those that were planned: {found}; plan again")
        with residents(node, workspace) as models:
            log = _said(node, store) if rows else finished(store.folder(node.inputs["answer"]) / LOG)
            out, subject = draft.folder / LOG, node.runtime["subject"]
            judged = judge_answers(log, settings, rubrics, out, subject=subject, models=models, tell=workspace.tell)
        draft.outputs |= asdict(judged)
        return judged.samples

    return each(nodes, store, work)


def _said(node: Node, store: Store) -> EvalLog:
    """What a teacher said, for judges."""
    from evals.rows import log_of
    from experiments.dataset import Said, read

    return log_of(read(store.folder(node.inputs["said"]) / SAID, Said), node.params.get(ABOUT))


@contextmanager
def residents(node: Node, workspace: Workspace) -> Iterator[dict[str, Model]]:
    """The judges that run in this process, as inspect's models."""
    from inspect_ai.model import get_model

    from evals import provider

    keys: list[str] = []
    models: dict[str, Model] = {}
    try:
        for name, spec in node.runtime["residents"].items():
            key = f"{name}-judge@{node.short}"
            provider.register(key, loaded(spec, node.params["residents"][name], workspace), ())
            keys.append(key)
            models[name] = get_model(f"orch/{key}", memoize=False)
        yield models
    finally:
        for key in keys:
            provider.unregister(key)


def score(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """What the task itself scored, or what it makes of its judges' verdicts."""
    from evals import items

    def work(node: Node, draft: Publication) -> int:
        judged = node.inputs.get("judged")
        if judged is None:
            found = items.items(store.folder(node.inputs["answer"]) / LOG)
        else:
            from evals.judged import judged_items

            found = judged_items(store.folder(judged) / LOG, node.runtime["task"], node.runtime["arguments"])
            compromised = store.record(judged)["outputs"]["compromised"]
            found = [replace(item, extras={**item.extras, "compromised": compromised}) for item in found]
            draft.outputs["compromised"] = compromised
        items.save(found, draft.folder / ITEMS)
        draft.outputs |= {"items": len(found), "unscored": sum(item.reason is not None for item in found)}
        return len(found)

    return each(nodes, store, work)


def compare(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    from evals import compare, findings, items

    def items_of(key: str) -> Sequence[items.Item]:
        return items.load(store.folder(key) / ITEMS)

    def work(node: Node, draft: Publication) -> int:
        found = compare.compare(comparison(node.params, node.inputs, items_of))
        told = detections(node.params, node.inputs, lambda key: store.record(key)["outputs"]["ranking"])
        found = replace(found, detections=told[0], detectors=told[1])
        findings.save(found, draft.folder / FINDINGS)
        draft.outputs |= {"rows": len(found.rows), "points": len(found.points)}
        return 0

    return each(nodes, store, work)
