"""The first stages: data, what teachers say, what is told from it, and how large a dose of 1 is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from orchestrator import filters
from orchestrator.acting import acts, counts, edits_of
from orchestrator.stage import EXAMPLES, LOG, SAID, STATE, Outcome, each, engine_of, failure, raise_if_hopeless

if TYPE_CHECKING:
    from orchestrator.artifact import Publication, Store
    from orchestrator.plan import Node
    from orchestrator.server import Server
    from orchestrator.workspace import Workspace


def make(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Datasets: from nothing but settings, from the subject, or from other data."""
    from experiments import dataset

    def work(node: Node, draft: Publication) -> int:
        recipe = dataset.recipe(node.runtime["recipe"]).model_validate(node.runtime["settings"])
        engine = engine_of(node, workspace) if recipe.needs_subject else None
        if isinstance(recipe, dataset.Derived):
            made = recipe.derive_with(engine, _given(node, store), node.params["seed"])
        else:
            made = dataset.Made(recipe.build(engine, node.params["seed"]))
        dataset.save(made.examples, draft.folder / EXAMPLES)
        draft.outputs |= {"examples": len(made.examples), "provides": recipe.provides}
        facts = dict(made.facts)
        if by := filters.facts(node, store):
            facts["judge"] = {**facts.get("judge", {}), **by}
        if facts:
            draft.outputs["facts"] = facts
        return len(made.examples)

    return each(nodes, store, work)


def _given(node: Node, store: Store) -> dict[str, list[Any]]:
    """What a derived recipe is made from, by name: datasets, what teachers said and verdicts on it, shard by shard."""
    from experiments import dataset

    given: dict[str, list[Any]] = {}
    for role, key in sorted(node.inputs.items()):
        kind, name = role.split("/")[:2]
        if kind == "said":
            given.setdefault(name, []).extend(dataset.read(store.folder(key) / SAID, dataset.Said))
        elif kind == "judged":
            from evals.rows import rulings

            given.setdefault(f"{kind}/{name}", []).extend(rulings(store.folder(key) / LOG))
        else:
            given[name] = _stored(key, store)
    return given


def _stored(key: str, store: Store) -> list[Any]:
    """The examples of a dataset."""
    from experiments import dataset

    return dataset.load(store.folder(key) / EXAMPLES, store.record(key)["outputs"]["provides"])


def generate(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """Shards of what a teacher says: asks `first` to `first + count`. Several share a server of theirs."""
    if nodes[0].params.get("by") != "vllm":
        return each(nodes, store, partial(_shard, store=store, workspace=workspace, server=None))
    from orchestrator.serving import teacher

    try:
        with teacher(nodes[0], store, workspace) as server:
            return each(nodes, store, partial(_shard, store=store, workspace=workspace, server=server))
    except Exception as error:  # no server: none of the shards can be answered
        raise_if_hopeless(error)
        return [failure(node, store, error) for node in nodes]


def _shard(node: Node, draft: Publication, store: Store, workspace: Workspace, server: Server | None) -> int:
    from experiments import dataset, speech

    params = node.params
    asks = _stored(node.inputs["asks"], store)[params["first"] : params["first"] + params["count"]]
    sampling = speech.Sampling.model_validate(params["sampling"])
    if server is not None:
        from orchestrator import serving

        said = serving.answers(server, asks, params, sampling)
    elif node.runtime["model"] is not None:
        from evals import speaking

        said = speaking.answers(node.runtime["model"], asks, params["system"], sampling, params["seed"])
    else:
        engine = engine_of(node, workspace)
        engine.fired.clear()
        edits = edits_of(node, store)
        said = speech.answers(engine, asks, edits, params["system"], sampling, params["seed"])
        draft.outputs["fired"] = counts(node.label, [edit for edit in edits if acts(edit)], engine.fired)
    dataset.save(said, draft.folder / SAID)
    draft.outputs |= {"answers": len(said), "stopped": sum(one.stopped for one in said)}
    draft.outputs["tokens"] = sum(one.tokens for one in said)
    return len(said)


def data_of(node: Node) -> list[str]:
    """Keys of the datasets that a node reads: its input `data`, or one `data/KIND` for each kind."""
    return [key for role, key in sorted(node.inputs.items()) if role.partition("/")[0] == "data"]


def examples(node: Node, store: Store) -> list[Any]:
    """Every example that a node reads, kind by kind."""
    return [example for key in data_of(node) for example in _stored(key, store)]


def interpret(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    """What a detector says of data, from the untouched subject alone."""
    from experiments.detector import detector

    def work(node: Node, draft: Publication) -> int:
        settings = detector(node.runtime["detector"]).model_validate(node.runtime["settings"])
        data, control = (_stored(node.inputs[role], store) for role in ("data", "control"))
        engine = engine_of(node, workspace)
        found = settings.scores(engine, data, control, node.params["candidates"], node.params["seed"])
        draft.outputs["ranking"] = found.to_plain()
        return len(data) + len(control)

    return each(nodes, store, work)


def calibrate(nodes: Sequence[Node], store: Store, workspace: Workspace) -> list[Outcome]:
    from evals.calibrate import calibrate
    from experiments import dataset, intervention
    from experiments.parts import Calibrate

    def work(node: Node, draft: Publication) -> int:
        method = intervention.method(node.runtime["method"]).model_validate(node.runtime["settings"])
        state = intervention.State.load(store.folder(node.inputs["state"]) / STATE)
        pairs = [each for each in examples(node, store) if isinstance(each, dataset.Pair)]
        params = node.params
        wanted = Calibrate.model_validate(params["wanted"])
        engine = engine_of(node, workspace)
        edits_of = partial(method.edits, state)
        found = calibrate(engine, edits_of, params["kind"], wanted, params["dev"], pairs)
        draft.outputs |= found.facts()
        return len(found.tried)

    return each(nodes, store, work)
