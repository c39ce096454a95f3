"""Bring the registry up to date with what one experiment has in the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.gather import comparison, detections
from orchestrator.identity import SHORT
from orchestrator.stage import FINDINGS, ITEMS
from orchestrator.versions import scores

if TYPE_CHECKING:
    from evals.findings import Findings
    from evals.items import Item
    from orchestrator.artifact import Store
    from orchestrator.plan import Graph
    from orchestrator.registry import Registry


def publish(planned: Graph, store: Store, registry: Registry) -> list[dict[str, Any]]:
    """Index the plan's nodes that the registry lacks, and its findings. Gives the experiment's leaderboard.

    While scores are missing the findings are made of those there are, marked as incomplete, and kept there only.
    """
    have, failed = store.keys(), store.failed()
    known = {row["key"] for row in registry.query("select key from nodes where status = 'have'")}
    records = (store.record(key) for key in planned.nodes if key[:SHORT] in have and key not in known)
    failures = (found for key in planned.nodes if key[:SHORT] in failed and (found := store.failure(key)) is not None)
    registry.index(records, failures)
    node = planned.nodes[planned.compare]
    complete = node.short in have
    registry.publish(
        node.key,
        planned.name,
        node.params,
        node.inputs,
        _kept(planned, store) if complete else _partial(planned, store, have),
        question=planned.question,
        complete=complete,
        answers={role: planned.nodes[key].inputs["answer"] for role, key in scores(node.inputs).items()},
    )
    return registry.query("select * from leaderboard where experiment_key = ?", [node.key])


def _kept(planned: Graph, store: Store) -> Findings:
    from evals import findings

    return findings.load(store.folder(planned.compare) / FINDINGS)


def _partial(planned: Graph, store: Store, have: set[str]) -> Findings:
    """Findings from the scores there are; the others have failed, with the reason."""
    from evals import compare, items

    node = planned.nodes[planned.compare]

    def items_of(key: str) -> Sequence[Item] | str:
        if key[:SHORT] in have:
            return items.load(store.folder(key) / ITEMS)
        return _reason(planned, store, key)

    def ranking_of(key: str) -> Mapping[str, Any] | None:
        return store.record(key)["outputs"]["ranking"] if key[:SHORT] in have else None

    found = compare.compare(comparison(node.params, node.inputs, items_of))
    told = detections(node.params, node.inputs, ranking_of)
    return replace(found, detections=told[0], detectors=told[1])


def _reason(planned: Graph, store: Store, key: str) -> str:
    """Why there is no result of `key`: its own failure, or the first among what it needs."""
    failure = store.failure(key)
    if failure is not None:
        return str(failure["reason"])
    missing = [needed for needed in planned.nodes[key].inputs.values() if not store.has(needed)]
    return _reason(planned, store, missing[0]) if missing else "not run"
