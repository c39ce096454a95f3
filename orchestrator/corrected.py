"""Judged estimates for people: as the judge saw them, and without the judge's errors, or why not.

Rows are those of the registry's view `judged`, as dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.registry import Registry

Row = Mapping[str, Any]


def judged(index: Registry, experiment: str | None = None) -> list[dict[str, Any]]:
    """Rows of the latest experiment of each name or of one name, every judge's."""
    where = "where current" + (" and experiment = ?" if experiment is not None else "")
    return index.query(f"select * from judged {where}", () if experiment is None else (experiment,))


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """For every judged eval a title, and each trial's estimates; one line where none of them is corrected."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault(tuple(str(row[name]) for name in ("experiment", "eval", "judged_by", "judge")), []).append(row)
    for (experiment, name, by, digest), of_eval in parts.items():
        yield f"{experiment}: {name}, without the errors of the judge {by} ({digest[:8]})"
        shown = [row for row in of_eval if row["corrected"] is not None or row["powered"] is not None]
        yield from (f"  {line(row)}" for row in shown)
        for reason in dict.fromkeys(row["uncorrected"] for row in of_eval if row["uncorrected"]):
            yield f"  raw estimates are all there is: {reason}"


def line(row: Row) -> str:
    """One trial's estimates."""
    found = [f"{row['trial']}: judged {interval(row, 'transfer')}"]
    if row["corrected"] is not None:
        found.append(f"corrected {interval(row, 'corrected')}")
    if row["powered"] is not None:
        found.append(f"prediction-powered {interval(row, 'powered')} by {row['powered_by']} labelled answers")
    return ", ".join(found)


def interval(row: Row, name: str) -> str:
    """`+0.12 [-0.03, +0.27]`; an end that the judge's errors leave open is none."""
    if row[name] is None:
        return "–"
    low, high = (row[f"{name}_{end}"] for end in ("low", "high"))
    shown = ("-∞" if low is None else f"{low:+.3g}", "∞" if high is None else f"{high:+.3g}")
    return f"{row[name]:+.3g} [{shown[0]}, {shown[1]}]"
