"""Fits: one after the other, or as a class of students that learn in one batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.stage import STATE, Outcome, each, engine_of, failure, one, raise_if_hopeless
from orchestrator.teaching import examples

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.intervention import State
    from experiments.students import Student
    from experiments.training import Losses
    from orchestrator.artifact import Publication, Store
    from orchestrator.plan import Node
    from orchestrator.workspace import Workspace


def fit(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Students of one class learn together. Of other fits those that read gradients come first: what they read serves
    the others."""
    if len(nodes) > 1 and "class" in nodes[0].runtime:
        return _together(nodes, store, workspace)

    def work(node: Node, draft: Publication) -> int:
        if shared := node.inputs.get("fit"):
            shutil.copyfile(store.folder(shared) / STATE, draft.folder / STATE)
            draft.outputs |= {**store.record(shared)["outputs"], "fit_seconds": 0.0}
            return 0
        method, data = _lesson(node, store)
        engine = engine_of(node, workspace)
        started = time.monotonic()
        state = method.fit(engine, data, node.params["seed"])
        return _publish(draft, state, len(data), time.monotonic() - started)

    return each(sorted(nodes, key=lambda node: node.runtime.get("reads") != "gradients"), store, work)


def _lesson(node: Node, store: Store) -> tuple[Any, list[Any]]:
    """The method, and the data that it is to learn from."""
    from experiments import intervention

    method = intervention.method(node.runtime["method"]).model_validate(node.runtime["settings"])
    data = examples(node, store)
    intervention.refuse_masks(method, data)
    return method, data


def _publish(draft: Publication, state: State, n_examples: int, seconds: float) -> int:
    """Fill the draft of a fit; how many examples there were."""
    state.save(draft.folder / STATE)
    draft.outputs |= {
        "facts": dict(state.facts),
        "examples": n_examples,
        "parameters": state.size,
        "fit_seconds": round(seconds, 3),
    }
    return n_examples


@dataclass(frozen=True, eq=False)
class Pupil:
    """A fit that has begun."""

    node: Node
    student: Student
    finish: Callable[[Losses], State]
    n_examples: int


def _together(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Whoever cannot begin, or is lost on the way, leaves the others be."""
    from experiments.students import train_together

    outcomes: list[Outcome] = []
    try:
        engine = engine_of(nodes[0], workspace)
        started = time.monotonic()
        pupils = _begun(nodes, store, engine, outcomes)
        learned = train_together(engine, [pupil.student for pupil in pupils])
    except Exception as error:  # what is wrong with the whole batch
        raise_if_hopeless(error)
        told = {outcome.key for outcome in outcomes}
        return outcomes + [failure(node, store, error) for node in nodes if node.key not in told]
    seconds = (time.monotonic() - started) / max(1, len(pupils))
    for pupil, losses in zip(pupils, learned, strict=True):

        def work(_: Node, draft: Publication, pupil: Pupil = pupil, losses: Losses | Exception = losses) -> int:
            if isinstance(losses, Exception):
                raise losses
            draft.outputs["learned_beside"] = len(pupils) - 1
            return _publish(draft, pupil.finish(losses), pupil.n_examples, seconds)

        outcomes.append(one(pupil.node, store, work, seconds))
    return outcomes


def _begun(nodes: Sequence[Node], store: Store, engine: Engine, outcomes: list[Outcome]) -> list[Pupil]:
    """Those who can begin; `outcomes` receives the others."""
    pupils = []
    for node in nodes:
        if store.has(node.key):  # another run was quicker
            outcomes.append(Outcome(node.key))
            continue
        try:
            method, data = _lesson(node, store)
            student, finish = method.begin(engine, data, node.params["seed"])
            pupils.append(Pupil(node, student, finish, len(data)))
        except Exception as error:  # the named boundary: a failed node is a record with a traceback
            raise_if_hopeless(error)
            outcomes.append(failure(node, store, error))
    return pupils
