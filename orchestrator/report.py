"""The leaderboard for people: a table for the terminal, plain text for a pipe, Markdown for a page.

Rows are those of the registry's view `leaderboard`, as dictionaries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

COLUMNS = ("#", "intervention", "transfer [95 % CI]", "p (Holm)", "ΔNLL", "side", "spec", "dose", "n/seeds", "status")
RIGHT = {"#", "p (Holm)", "ΔNLL", "side", "spec", "dose", "n/seeds"}
WIDEST_LABEL = 34

LEGEND = (
    "transfer: effect on held-out items, the odd part (s(+c) − s(−c))/2 at ±c, else s(c) − s(0); * p (Holm) < 0.05. "
    "side: even part. ΔNLL: nats per token at the worse sign. spec: specificity. n: items, families in brackets."
)


def leaderboard_table(rows: Sequence[Row], title: str = "") -> Table:
    """A rich table of the rows of one eval."""
    table = Table(title=title or None, box=None, pad_edge=False, title_justify="left", title_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), style=None if row["rankable"] else "dim")
    return table


def plain(rows: Sequence[Row], width: int = 120) -> str:
    """Every experiment and eval one under the other, with footnotes, for a terminal or a pipe of `width` columns."""
    if not rows:
        return "no results yet"
    console = Console(width=width, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as capture:
        for title, of_eval in _tables(rows):
            console.print(leaderboard_table(of_eval, title))
            for note in footnotes(of_eval):
                console.print(f"  {note}", soft_wrap=False)
            console.print()
        console.print(LEGEND)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def markdown(rows: Sequence[Row]) -> str:
    """Every experiment and eval as a heading, a table and a list of footnotes."""
    lines: list[str] = []
    for title, of_eval in _tables(rows):
        lines += [f"### {_escaped(title)}", "", f"| {' | '.join(COLUMNS)} |"]
        lines.append("|" + "|".join("---:" if name in RIGHT else "---" for name in COLUMNS) + "|")
        lines += [f"| {' | '.join(_escaped(cell) for cell in _cells(row))} |" for row in of_eval]
        lines += ["", *(f"- {_escaped(note)}" for note in footnotes(of_eval)), ""]
    return "\n".join([*lines, LEGEND] if lines else ["no results yet"]) + "\n"


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the numbers of one eval rest on, and the notes of its rows, equal ones together."""
    found = [by] if (by := judging(rows[0])) else []
    detectable = sorted(row["mde"] for row in rows if row["mde"] is not None)
    if detectable:
        low, high = (f"{value:.3g}" for value in (detectable[0], detectable[-1]))
        span = low if low == high else f"{low} to {high}"
        found.append(f"smallest effect found with 80 % power among {rows[0]['tests']} settings: {span}")
    found += [f"{row['trial']}: {row['dropped']} items unscored in some arm" for row in rows if row["dropped"]]
    found += [
        f"{row['trial']}: sign flipped by its calibration (a dose of 1 is {-row['unit']:.3g} of the fit's own)"
        if row["seeds"] == 1
        else f"{row['trial']}: sign flipped by its calibration in {row['flipped']} of {row['seeds']} seeds"
        for row in rows
        if row.get("flipped")
    ]
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row["notes"]:
            notes.setdefault(row["notes"], []).append(row["trial"])
    return found + [f"{_named(labels, len(rows))}: {note}" for note, labels in notes.items()]


def judging(row: Row) -> str:
    """By which rubrics and thresholds an eval's answers were judged; empty where nobody judged them."""
    if row["judge"] is None:
        return ""
    rubrics = ", ".join(f"{role} {digest[:8]}" for role, digest in json.loads(row["rubrics"]).items())
    scoring = ", ".join(f"{name} {value}" for name, value in json.loads(row["scoring"]).items())
    return f"judge {row['judge'][:8]}, rubrics {rubrics}" + (f"; scored with {scoring}" if scoring else "")


def _named(labels: Sequence[str], total: int) -> str:
    """Which rows a note is about, in few words."""
    if len(labels) == total > 1:
        return "all rows"
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of every experiment, eval and judge, ranked rows first."""
    parts: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row["experiment"], row["eval"], row["experiment_key"]), []).append(row)
    for (experiment, name, _), of_eval in parts.items():
        first = of_eval[0]
        by = f", judged by {first['judged_by']}" if first["judged_by"] else ""
        title = f"{experiment}: {name} (version {first['eval_version']}){by}"
        yield title, sorted(of_eval, key=lambda row: (row["rank"] is None, row["rank"]))


def _cells(row: Row) -> tuple[str, ...]:
    label = row["trial"] if len(row["trial"]) <= WIDEST_LABEL else row["trial"][: WIDEST_LABEL - 1] + "…"
    sign = "±" if row["contrast"] == "odd" else ""
    return (
        "–" if row["rank"] is None else str(row["rank"]),
        label + (" (baseline)" if row["baseline"] else ""),
        _effect(row),
        _p(row["p_holm"]),
        _number(row["delta_nll"], "+.3f"),
        _number(row["even"], "+.2f"),
        _number(row["specificity"], ".2f"),
        "–" if row["dose"] is None else f"{sign}{row['dose']:g}",
        f"{row['n']} ({row['families']})/{row['seeds']}",
        row["status"],
    )


def _effect(row: Row) -> str:
    if row["transfer"] is None:
        return "–"
    star = "*" if row["significant"] else " "
    if row["transfer_low"] is None:
        return f"{row['transfer']:+.3f}{star}"
    return f"{row['transfer']:+.3f}{star} [{row['transfer_low']:+.2f}, {row['transfer_high']:+.2f}]"


def _p(value: float | None) -> str:
    return "–" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
