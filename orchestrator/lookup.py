"""Finding what a person means by a few letters: a trial by its label or the key of a fit, a result by its key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.plugin import nearest
from orchestrator.registry import RegistryError

if TYPE_CHECKING:
    from orchestrator.registry import Registry

CURRENT = """
select t.experiment, t.trial, t.group_key, t.method, t.label, t.seed, t.baseline, t.fit, t.unit, e.name, e.submitted_at
from trials t join experiments e on e.key = t.experiment
order by e.submitted_at desc, e.key, t.trial
"""


@dataclass(frozen=True)
class Found:
    """A setting of an experiment with all its seeds: rows of the table `trials`, in order."""

    experiment: str
    """The experiment's name."""
    key: str
    """The experiment's key."""
    group: str
    label: str
    method: str
    baseline: bool
    seeds: Sequence[Mapping[str, Any]]


def trial(registry: Registry, text: str, experiment: str | None = None) -> Found:
    """The trial with label `text`, or with a fit whose key begins with it, in the latest experiment that has one.

    Raises RegistryError where there is none, with the nearest labels.
    """
    rows = [row for row in registry.query(CURRENT) if experiment is None or row["name"] == experiment]
    if experiment is not None and not rows:
        known = sorted({row["name"] for row in registry.query("select name from experiments")})
        raise RegistryError(f"unknown experiment {experiment!r}{nearest(experiment, known)}; known: {', '.join(known)}")
    chosen = next((row for row in rows if row["label"] == text), None)
    if chosen is None and len(text) >= 4:
        chosen = next((row for row in rows if (row["fit"] or "").startswith(text)), None)
    if chosen is None:
        labels = list(dict.fromkeys(row["label"] for row in rows))
        shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        raise RegistryError(
            f"no trial {text!r}{nearest(text, labels)}; trials: {shown or 'none yet'}; or give a fit's key"
        )
    same = ("experiment", "group_key")
    seeds = [row for row in rows if all(row[name] == chosen[name] for name in same)]
    return Found(
        chosen["name"],
        chosen["experiment"],
        chosen["group_key"],
        chosen["label"],
        chosen["method"],
        bool(chosen["baseline"]),
        seeds,
    )


def node(registry: Registry, key: str | None) -> dict[str, Any]:
    """A row of `nodes` with its JSON read; {} for a key that it does not have."""
    found = registry.query("select * from nodes where key = ?", [key]) if key else []
    if not found:
        return {}
    row = found[0]
    return row | {name: json.loads(row[name]) for name in ("params", "outputs", "versions") if row[name] is not None}


def calibration(registry: Registry, fit: str | None, unit: float | None) -> dict[str, Any]:
    """What the calibration of `fit` that gave `unit` found: damage, whether the sign was flipped and why; {} without.

    Every dose that it tried is in its record.
    """
    sql = """select n.outputs from nodes n join node_inputs i on i.node = n.key
             where n.stage = 'calibrate' and i.role = 'state' and i.input = ?
             and json_extract(n.outputs, '$.unit') = ?"""
    rows = registry.query(sql, [fit, unit]) if fit and unit is not None else []
    found: dict[str, Any] = json.loads(rows[0]["outputs"]) if rows else {}
    return {name: value for name, value in found.items() if name != "tried"}


def identity(registry: Registry, found: Found) -> dict[str, Any]:
    """What makes a trial what it is, flat: method, settings, subject and data, as they enter keys; without the seed."""
    fit = next((row["fit"] for row in found.seeds if row["fit"]), None)
    whole = node(registry, fit)
    params = {name: value for name, value in whole.get("params", {}).items() if name != "seed"}
    sql = "select role, input from node_inputs where node = ? and (role = 'data' or role like 'data/%')"
    for row in registry.query(sql, [fit]) if fit else []:
        data = node(registry, row["input"]).get("params", {})
        params[row["role"]] = {name: value for name, value in data.items() if name not in ("seed", "subject")}
    return dict(flat(params))


def flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """(`settings.layer`, 14) for every leaf."""
    if isinstance(value, Mapping) and value:
        return [leaf for name, item in value.items() for leaf in flat(item, f"{path}.{name}" if path else str(name))]
    return [(path, value)]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What two flat mappings do not share, by name."""
    names = sorted(a.keys() | b.keys())
    return [{"what": name, "a": a.get(name), "b": b.get(name)} for name in names if a.get(name) != b.get(name)]
