"""`orch judge`: what a judge's verdicts are worth."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.commands import options

if TYPE_CHECKING:
    from orchestrator.judges import Asked

SHOWN = (
    "rubric",
    "yes from",
    "split",
    "arm",
    "n",
    "TPR",
    "TNR",
    "J or slope",
    "AUROC",
    "kappa",
    "length r",
    "unscored",
    "mass",
)


@click.group("judge")
def judge_group() -> None:
    """Measure what the verdicts of judges are worth."""


@judge_group.command()
@click.option("--spec", type=click.Path(path_type=Path), help="Take the judge and the subject of this spec.")
@click.option("--model", "models", multiple=True, help="A judge as inspect names it, or `embedded`; several: a panel.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="JSON lines of labelled answers; default: the built-in ones."
)
@click.option("--role", "roles", multiple=True, help="Measure this rubric only; default: all that have answers.")
@click.option("--rubric", "rubrics", multiple=True, metavar="ROLE=FILE", help="A rubric's file for a role.")
@click.option(
    "--threshold", "thresholds", multiple=True, metavar="ROLE=NUMBER", help="Also measure verdicts from this value on."
)
@click.option(
    "--drawn-from",
    metavar="EXPERIMENT",
    help="The labelled answers are a random sample of this experiment's: its estimates are prediction-powered too.",
)
@click.option("--markdown", is_flag=True, help="A Markdown table of the test answers.")
@click.option("--fresh", is_flag=True, help="Ask again, even if the judge was measured before.")
@options.store
@options.registry
@options.as_json
def calibrate(markdown: bool, fresh: bool, store: str, registry: Path, as_json: bool, **given: Any) -> None:
    """Have a judge read labelled answers, and keep the table of its errors: the leaderboard is corrected by it."""
    from orchestrator import judges
    from orchestrator.artifact import Store
    from orchestrator.registry import Registry
    from orchestrator.workspace import Workspace

    asked = _asked(**given)
    with Registry(registry) as index:
        node, place = judges.planned(asked), Store(store)
        if fresh:
            place.discard(node.key)
        record = judges.calibrate(node, place, Workspace(), _tell)
        index.index([record])
        rows = index.query("select * from judges where key = ?", [node.key])
    if as_json:
        click.echo(json.dumps(rows, indent=1, allow_nan=False))
        return
    if markdown:
        click.echo(page(row for row in rows if row["split"] == "test"))
        return
    outputs = record["outputs"]
    click.echo(f"{'+'.join(outputs['models'])} ({outputs['judge'][:12]}) on {outputs['answers']} labelled answers")
    for line in lines(rows):
        click.echo(line)
    click.echo(f"instructions inside answers obeyed: {outputs['obeyed']} of {outputs['canaries']}")


def _asked(
    spec: Path | None,
    models: tuple[str, ...],
    labels: Path | None,
    roles: tuple[str, ...],
    rubrics: tuple[str, ...],
    thresholds: tuple[str, ...],
    drawn_from: str | None,
) -> Asked:
    """What the options mean. Raises CalibrationError, and what specs raise."""
    from agents.judge import Judge
    from evals.labels import BUILTIN
    from experiments.grid import validated
    from experiments.spec import load
    from orchestrator.bench import settings_of
    from orchestrator.judges import Asked, CalibrationError

    if spec is not None and models:
        raise CalibrationError("both --spec and --model say who judges; give one of them")
    experiment = load(spec)[0] if spec is not None else None
    named: Judge = validated(Judge, {"models": list(models)} if models else {}, None)
    judge = settings_of(experiment) if experiment is not None else named
    files = {role: Path(file) for role, file in _pairs(rubrics, "--rubric", "aligned=my_rubric.md")}
    wanted: dict[str, list[float]] = {}
    for role, number in _pairs(thresholds, "--threshold", "aligned=30"):
        try:
            wanted.setdefault(role, []).append(float(number))
        except ValueError as error:
            raise CalibrationError(f"--threshold {role}={number}: {number!r} is no number; e.g. aligned=30") from error
    judge = judge.model_copy(update={"rubrics": {**judge.rubrics, **files}})
    subject = experiment.subject if experiment is not None else None
    return Asked(judge, labels or BUILTIN, subject, roles, wanted, drawn_from)


def _pairs(given: Iterable[str], option: str, example: str) -> Iterator[tuple[str, str]]:
    from orchestrator.judges import CalibrationError

    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise CalibrationError(f"{option} {text!r} must be ROLE=VALUE, e.g. {option} {example}")
        yield name, value


def _tell(done: int, total: int) -> None:
    click.echo(f"{done} of {total} answers judged", err=True)


def lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The table as text, and below it why rows cannot correct anything."""
    table = [SHOWN, *(cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(SHOWN))]
    for cells_ in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells_, widths, strict=True)).rstrip()
    for row in rows:
        if row["split"] == "test" and row["arm"] == "all" and row["refused"]:
            yield f"no correction by {row['role']} ({_from(row)}): {row['refused']}"


def page(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table for a page."""
    head = [f"| {' | '.join(SHOWN)} |", "|" + "---|" * len(SHOWN)]
    return "\n".join([*head, *(f"| {' | '.join(cells(row))} |" for row in rows)]) + "\n"


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the view `judges` in words."""
    return (
        row["role"],
        _from(row),
        row["split"],
        row["arm"],
        f"{row['n']} ({row['positives']} yes)",
        _interval(row, "tpr"),
        _interval(row, "tnr"),
        _interval(row, "slope"),
        _interval(row, "auroc"),
        _number(row["kappa"]),
        _number(row["length_r"]) + ("" if row["length_p"] is None else f" (p {row['length_p']:.2g})"),
        str(row["unscored"]),
        _number(row["mass"]),
    )


def _from(row: Mapping[str, Any]) -> str:
    return "score" if row["threshold"] is None else f"{row['threshold']:g}"


def _interval(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    if row[f"{name}_low"] is None:
        return f"{row[name]:.2f}"
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


COMMANDS = (judge_group,)
