"""`orch plan` and `orch why`: what a submit would do, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from orchestrator.costs import Asked
    from orchestrator.plan import Plan
    from orchestrator.status import NodeStatus, State

STAGES = ("dataset", "generate", "interpret", "fit", "calibrate", "answer", "judge", "score", "compare")
MOST_LINES = 40
"""Nodes of one stage that are shown; `--all` shows every one, and JSON always does."""


@click.command("plan")
@options.spec
@options.store
@options.registry
@options.as_json
@click.option("--all", "everything", is_flag=True, help=f"Every node; else at most {MOST_LINES} of each stage.")
def plan_command(spec: Path, store: str, registry: Path, as_json: bool, everything: bool) -> None:
    """Show what a submit of SPEC would do: each node have, run, blocked or failed before, and why."""
    from experiments.spec import load
    from orchestrator import costs
    from orchestrator.artifact import Store
    from orchestrator.plan import plan
    from orchestrator.progress import clock
    from orchestrator.registry import RegistryError
    from orchestrator.status import status

    experiment, _ = load(spec)
    planned = plan(experiment)
    states = status(planned, Store(store))
    try:
        known = paces(registry)
    except RegistryError as error:
        click.echo(f"note: no estimate: {error}", err=True)
        known = {}
    guess = estimate(states, known)
    asked = costs.asked(planned, states)
    if as_json:
        click.echo(json.dumps(_document(planned, states, guess, asked), indent=1))
        return
    for line in describe(planned, states, None if everything else MOST_LINES):
        click.echo(line)
    if guess["nodes"] and guess["seconds"] is not None:
        unknown = f"; {guess['unknown']:,} of a kind not met yet" if guess["unknown"] else ""
        click.echo(f"about {clock(guess['seconds'])}, by what such nodes took before{unknown}")
    for line in costs.lines(asked):
        click.echo(line)
    for warning in experiment.warnings():
        click.echo(f"note: {warning}", err=True)


def paces(registry: Path) -> dict[tuple[str, str | None], float]:
    """Mean seconds of a node by (stage, method), from what the registry has; a registry that is not there has nothing.

    Raises RegistryError for one that cannot be read.
    """
    from orchestrator.registry import Registry

    if not registry.exists():
        return {}
    took = "coalesce(json_extract(outputs, '$.eval_seconds'), json_extract(outputs, '$.fit_seconds'), seconds)"
    sql = f"select stage, method, avg({took}) as seconds from nodes where status = 'have' group by stage, method"
    with Registry(registry, write=False) as index:
        return {(row["stage"], row["method"]): row["seconds"] for row in index.query(sql)}


def estimate(states: Sequence[NodeStatus], known: Mapping[tuple[str, str | None], float]) -> dict[str, Any]:
    """How long what is missing takes one after the other: nodes, seconds (null when nothing like it was met), and how
    many nodes are of an unknown kind."""
    missing = [one.node for one in states if one.state != "have"]
    kinds = [(node.stage, node.runtime.get("method") or node.params.get("method")) for node in missing]
    seconds = [known[kind] for kind in kinds if kind in known]
    total = round(sum(seconds), 1) if seconds or not missing else None
    return {"nodes": len(missing), "seconds": total, "unknown": len(missing) - len(seconds)}


def _document(
    planned: Plan, states: Sequence[NodeStatus], guess: Mapping[str, Any], asked: Sequence[Asked]
) -> dict[str, Any]:
    return {
        "experiment": planned.experiment.name,
        "trials": len(planned.trials),
        "counts": Counter(one.state for one in states),
        "estimate": dict(guess),
        "asked": [one.to_plain() for one in asked],
        "warnings": planned.experiment.warnings(),
        "nodes": [
            {
                "key": one.node.key,
                "stage": one.node.stage,
                "label": one.node.label,
                "inputs": dict(one.node.inputs),
                "status": one.state,
                "reason": one.why,
            }
            for one in states
        ],
    }


def describe(planned: Plan, states: Sequence[NodeStatus], most: int | None) -> list[str]:
    """A line a node under a line a stage, and the sum."""
    lines = []
    for stage in STAGES:
        of_stage = [one for one in states if one.node.stage == stage]
        if not of_stage:
            continue
        lines.append(f"{stage}: {told(of_stage)}")
        lines += [f"  {one.state:<13} {one.node.name}{_dose(one)}  {one.why}" for one in of_stage[:most]]
        if most is not None and len(of_stage) > most:
            lines.append(f"  ... {len(of_stage) - most:,} more (--all shows them)")
    lines.append(f"{planned.experiment.name}: {len(planned.trials):,} trials, {len(states):,} nodes: {told(states)}")
    return lines


def told(states: Sequence[NodeStatus]) -> str:
    """`12 have, 3 run`."""
    counts = Counter(one.state for one in states)
    order: tuple[State, ...] = ("have", "run", "blocked", "failed before")
    return ", ".join(f"{counts[state]:,} {state}" for state in order if counts[state])


def _dose(one: NodeStatus) -> str:
    dose = one.node.params.get("dose")
    return f" dose {dose:g}" if dose is not None else ""


@click.command()
@click.argument("key")
@options.store
def why(key: str, store: str) -> None:
    """Show what is behind a result: the record whose key begins with KEY, or why it failed."""
    from orchestrator.artifact import Store, StoreError
    from orchestrator.identity import SHORT

    place = Store(store)
    known = sorted(short for short in place.keys() | place.failed() if short.startswith(key[:SHORT]))
    if len(known) != 1:
        more = f"; it fits {', '.join(known[:5])}" if known else ""
        raise StoreError(f"{len(known)} results or failures have a key that begins with {key!r} in {store}{more}")
    failure = place.failure(known[0])
    click.echo(json.dumps(failure if failure is not None else place.record(known[0]), indent=1))


COMMANDS = (plan_command, why)
