"""What came of experiments, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from evals.findings import Findings
    from orchestrator.artifact import Store
    from orchestrator.plan import Plan


@click.command()
@click.argument("experiment", required=False)
@options.store
@options.as_json
@click.option("--markdown", is_flag=True, help="A Markdown table.")
def leaderboard(experiment: str | None, store: str, as_json: bool, markdown: bool) -> None:
    """Rank the interventions of EXPERIMENT, or of every one, by transfer; what cannot be ranked stands below."""
    from orchestrator.artifact import Store

    rows = list(_recorded(Store(store), experiment))
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    for line in table(rows, markdown=markdown):
        click.echo(line)


def _recorded(store: Store, experiment: str | None) -> Iterable[dict[str, Any]]:
    """Rows of every comparison in the store, the best first."""
    from evals import findings
    from orchestrator.stages import FINDINGS

    for record in store.records("compare"):
        name = record["label"]
        if experiment in (None, name):
            yield from ranked(name, findings.load(store.folder(record["key"]) / FINDINGS))


def of_plan(planned: Plan, store: Store) -> list[dict[str, Any]]:
    """Rows of an experiment. While scores are missing they are made of those there are, and not kept."""
    from evals import compare, findings, items
    from orchestrator.gather import comparison
    from orchestrator.stages import FINDINGS, ITEMS

    node = planned.nodes[planned.compare]
    if store.has(node.key):
        return ranked(node.label, findings.load(store.folder(node.key) / FINDINGS))

    def items_of(key: str) -> Sequence[items.Item] | str:
        if store.has(key):
            return items.load(store.folder(key) / ITEMS)
        failure = store.failure(planned.nodes[key].inputs["answer"]) or store.failure(key)
        return failure["reason"] if failure else "not run"

    return ranked(node.label, compare.compare(comparison(node.params, node.inputs, items_of)))


def ranked(experiment: str, found: Findings) -> list[dict[str, Any]]:
    """Rows as plain data with their rank among the rankable rows of their eval, those first."""
    from dataclasses import asdict

    best = sorted(found.rows, key=lambda row: (row.eval, not row.rankable, -(row.transfer or 0.0), row.label))
    rows = []
    place: dict[str, int] = {}
    for row in best:
        place[row.eval] = place.get(row.eval, 0) + row.rankable
        rows.append({"experiment": experiment, "rank": place[row.eval] if row.rankable else None, **asdict(row)})
    return rows


COLUMNS = (
    "rank",
    "intervention",
    "dose",
    "transfer",
    "95 % interval",
    "p (Holm)",
    "ΔNLL",
    "specificity",
    "seeds",
    "items",
)


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> list[str]:
    """One table an eval, and the notes of its rows."""
    lines: list[str] = []
    for experiment, name in dict.fromkeys((row["experiment"], row["eval"]) for row in rows):
        of_eval = [row for row in rows if (row["experiment"], row["eval"]) == (experiment, name)]
        lines += [f"{'### ' if markdown else ''}{experiment}: {name}", *([""] if markdown else [])]
        lines += _aligned([COLUMNS, *(_cells(row) for row in of_eval)], markdown)
        lines += [f"  {row['label']}: {row['notes']}" for row in of_eval if row["notes"]]
        lines.append("")
    return lines or ["no results yet"]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    interval = "" if row["ci_low"] is None else f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
    return (
        str(row["rank"]) if row["rank"] is not None else row["status"],
        row["label"] + (" (baseline)" if row["baseline"] else ""),
        _number(row["dose"], "g") if row["contrast"] != "odd" else f"±{row['dose']:g}",
        _number(row["transfer"], "+.3f") + ("*" if row["significant"] else ""),
        interval,
        _number(row["p_holm"], ".2g"),
        _number(row["delta_nll"], "+.3f"),
        _number(row["specificity"], ".2f"),
        str(row["n_seeds"]),
        str(row["n_items"]),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


COMMANDS = (leaderboard,)
