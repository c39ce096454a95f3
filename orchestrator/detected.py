"""What detectors said of an experiment's datasets, for people: in lines of text.

Rows are those of the registry's view `detection`, as dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MOST = 12
"""Datasets of one detector that are shown; the view has all."""
LEVEL = 0.05


def lines(rows: Sequence[Row]) -> list[str]:
    """For every detector its AUROC over all datasets, and what it said of each dataset."""
    parts: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        parts.setdefault(row["experiment"], {}).setdefault(row["detector"], []).append(row)
    return [line for experiment, of in parts.items() for line in _experiment(experiment, of)]


def _experiment(name: str, detectors: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    yield f"{name}: detection without training (which candidate do data hand on, told by the base model alone)"
    for detector, rows in detectors.items():
        yield f"  {detector}: {verdict(rows[0])}"
        datasets: dict[tuple[str, int, bool], list[Row]] = {}
        for row in rows:
            datasets.setdefault((row["data"], row["seed"], bool(row["shuffled"])), []).append(row)
        yield from (f"    {dataset(ranking)}" for ranking in list(datasets.values())[:MOST])
        if len(datasets) > MOST:
            yield f"    ... {len(datasets) - MOST} more datasets: select * from detection"
    yield ""


def verdict(row: Row) -> str:
    """How well a detector tells what is handed on from what is not, over all datasets."""
    if row["auroc"] is None:
        return "no AUROC: it needs a dataset whose trait is among the candidates"
    count = f"{row['datasets']} dataset" + ("s" if row["datasets"] != 1 else "")
    said = f"AUROC {row['auroc']:.2f}"
    if row["auroc_low"] is not None:
        said += f" [{row['auroc_low']:.2f}, {row['auroc_high']:.2f}]"
    return f"{said} over {count}; the trait comes first in {row['top']:.0%} (by chance {row['top_chance']:.0%})"


def dataset(ranking: Sequence[Row]) -> str:
    """The likeliest candidate of one dataset and, where that is another, the place of the data's own trait."""
    order = sorted(ranking, key=lambda row: row["place"])
    first = order[0]
    shuffled = " (shuffled: nothing to find)" if first["shuffled"] else ""
    said = f"{first['data'] or 'data'}, seed {first['seed']}{shuffled}: 1st {_candidate(first)}"
    own = next((row for row in order if row["own"]), None)
    if own is None or own is first:
        return said
    return f"{said}; {_candidate(own)} is number {own['place']} of {len(order)}{_excluded(own)}"


def _candidate(row: Row) -> str:
    star = "*" if row["p_adjusted"] < LEVEL else ""
    return f"{row['candidate']}{star} (z {row['z']:+.2f}, p adj {row['p_adjusted']:.2g})"


def _excluded(row: Row) -> str:
    """What a null result would have shown."""
    if row["p_adjusted"] < LEVEL or row["detectable"] is None:
        return ""
    return f"; score {row['score']:+.3g}, found four times in five from {row['detectable']:.3g}"
