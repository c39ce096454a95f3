"""`orch status`, `orch show`, `orch diff`: how far an experiment is, what one trial is, and how two differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from orchestrator.lookup import Found
    from orchestrator.plan import Plan
    from orchestrator.registry import Registry
    from orchestrator.status import NodeStatus

COMPARED = ("status", "dose", "unit", "transfer", "transfer_low", "transfer_high", "p_holm", "delta_nll", "specificity")
"""Columns of the leaderboard that a difference of two trials shows."""
within = click.option("--experiment", help="Look in this experiment only; else in the latest that has such a trial.")


@click.command()
@options.spec
@options.store
@options.as_json
def status(spec: Path, store: str, as_json: bool) -> None:
    """Say how far SPEC is: trials done, nodes by stage, what failed, and who is at work on it."""
    from experiments.spec import load
    from orchestrator.artifact import Store
    from orchestrator.plan import plan
    from orchestrator.status import status as states_of

    experiment, _ = load(spec)
    planned, place = plan(experiment), Store(store)
    found = _progress(planned, states_of(planned, place), place.holder(experiment.name))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    done, total, failed = (found["trials"][name] for name in ("done", "total", "failed"))
    click.echo(f"{found['experiment']}: {done:,} of {total:,} trials done, {failed:,} failed")
    for stage, counts in found["stages"].items():
        click.echo(f"  {stage:<10} " + ", ".join(f"{count:,} {state}" for state, count in counts.items()))
    for one in found["failures"]:
        click.echo(f"  failed     {one['label']}: {one['reason']}  (orch why {one['key']})")
    click.echo(f"  at work    {found['running'] or 'nobody on this machine'}")


def _progress(planned: Plan, states: Sequence[NodeStatus], holder: str | None) -> dict[str, Any]:
    state_of = {one.node.key: one.state for one in states}
    stages: dict[str, Counter[str]] = {}
    for one in states:
        stages.setdefault(one.node.stage, Counter())[one.state] += 1
    of_trials = [[state_of[key] for key in trial.scores.values()] for trial in planned.trials]
    failed = [one for one in states if one.state == "failed before"]
    lost = {one.node.key for one in failed}
    return {
        "experiment": planned.experiment.name,
        "trials": {
            "total": len(of_trials),
            "done": sum(all(state == "have" for state in each) for each in of_trials),
            "failed": sum(_needs(planned, set(trial.scores.values()), lost) for trial in planned.trials),
        },
        "stages": {stage: dict(counts) for stage, counts in stages.items()},
        "failures": [{"key": one.node.short, "label": one.node.name, "reason": one.why} for one in failed],
        "running": holder,
    }


def _needs(planned: Plan, keys: set[str], lost: set[str]) -> bool:
    """Whether any of `keys` rests on a lost node."""
    todo, seen = list(keys), set(keys)
    while todo:
        key = todo.pop()
        if key in lost:
            return True
        new = [needed for needed in planned.nodes[key].inputs.values() if needed not in seen]
        seen.update(new)
        todo += new
    return False


@click.command()
@click.argument("trial")
@within
@options.registry
@options.as_json
def show(trial: str, experiment: str | None, registry: Path, as_json: bool) -> None:
    """Show all about TRIAL, named by its label or a fit's key: settings, what each seed's fit found, rows, curves."""
    from orchestrator import lookup
    from orchestrator.registry import Registry

    with Registry(registry, write=False) as index:
        about = _about(index, lookup.trial(index, trial, experiment))
    if as_json:
        click.echo(json.dumps(about, indent=1))
        return
    for line in _described(about):
        click.echo(line)


def _described(about: Mapping[str, Any]) -> Iterator[str]:
    """The page of one trial, line by line."""
    yield f"{about['trial']}, of {about['experiment']}" + (", a baseline" if about["baseline"] else "")
    for name, value in about["identity"].items():
        if name == "method" or name.startswith(("settings.", "data.")):
            yield f"  {name:<26} {_short(value)}"
    for seed in about["seeds"]:
        facts = ", ".join(f"{name} {_short(value)}" for name, value in seed["facts"].items())
        unit = "" if seed["unit"] is None else f", a dose of 1 is {seed['unit']:g}"
        yield f"  seed {seed['seed']:<4} fit {(seed['fit'] or '-')[:12]}{unit}  {facts}"[:160].rstrip()
        if (turned := seed["calibrated"]) and turned.get("margin") is not None:
            how = "FLIPPED: a positive dose is a negative one of the fit" if turned["flipped"] else "kept"
            margin, error, pairs = (_short(turned.get(name)) for name in ("margin", "margin_se", "pairs"))
            yield f"            sign {how}; margin {margin} +- {error} nats over {pairs} pairs"
    for row in about["rows"]:
        shown = [f"{name} {_short(row[name])}" for name in COMPARED if row[name] is not None]
        yield f"{row['eval']}: {', '.join(shown)}"
        for point in about["curve"]:
            if point["eval"] == row["eval"]:
                yield f"  {point['metric']:<10} at {point['dose']:<+6g} {_short(point['value'])} (n {point['n']})"


def _about(index: Registry, found: Found) -> dict[str, Any]:
    from orchestrator import lookup

    where = [found.key, found.group]
    curve = """select eval, dose, metric, value, se, n from metrics where experiment = ? and group_key = ?
               and split = 'test' and metric not like 'other.%' order by eval, metric, dose"""
    return {
        "trial": found.label,
        "experiment": found.experiment,
        "method": found.method,
        "baseline": found.baseline,
        "identity": lookup.identity(index, found),
        "seeds": [
            {
                "seed": row["seed"],
                "fit": row["fit"],
                "unit": row["unit"],
                "calibrated": lookup.calibration(index, row["fit"], row["unit"]),
                "facts": lookup.node(index, row["fit"]).get("outputs", {}).get("facts", {}),
            }
            for row in found.seeds
        ],
        "rows": index.query("select * from leaderboard where experiment_key = ? and group_key = ?", where),
        "curve": index.query(curve, where),
    }


@click.command()
@click.argument("a")
@click.argument("b")
@within
@options.registry
@options.as_json
def diff(a: str, b: str, experiment: str | None, registry: Path, as_json: bool) -> None:
    """Show how trials A and B differ: in what they are, and in what came of them."""
    from orchestrator import lookup
    from orchestrator.registry import Registry

    with Registry(registry, write=False) as index:
        both = [lookup.trial(index, text, experiment) for text in (a, b)]
        found: dict[str, Any] = {
            "a": f"{both[0].experiment}: {both[0].label}",
            "b": f"{both[1].experiment}: {both[1].label}",
            "identity": lookup.differences(*(lookup.identity(index, one) for one in both)),
            "results": lookup.differences(*(_results(index, one) for one in both)),
        }
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"a  {found['a']}\nb  {found['b']}")
    for part in ("identity", "results"):
        click.echo(f"{part}: " + ("the same" if not found[part] else ""))
        for one in found[part]:
            click.echo(f"  {one['what']:<44} {_short(one['a'])} | {_short(one['b'])}")


def _results(index: Registry, found: Found) -> dict[str, Any]:
    rows = index.query("select * from leaderboard where experiment_key = ? and group_key = ?", [found.key, found.group])
    return {f"{row['eval']} {name}": row[name] for row in rows for name in COMPARED}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"


COMMANDS = (status, show, diff)
