"""What detectors said of an experiment's datasets, as rows, and how well each detector detects over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.detection import auroc
from experiments.detector import Ranking


@dataclass(frozen=True)
class Detection:
    """One candidate in one detector's ranking of one dataset."""

    detector: str
    data: str
    trait: str | None
    """What the data were to hand on."""
    shuffled: bool
    """Whether the trait was destroyed on purpose, so that no candidate is the true one."""
    seed: int
    candidate: str
    place: int
    """From 1, the likeliest."""
    score: float
    z: float
    margin: float
    p: float
    p_adjusted: float
    """Corrected for the number of candidates."""
    detectable: float


@dataclass(frozen=True)
class Detected:
    """One detector over all datasets."""

    detector: str
    auroc: float
    """Probability that a true candidate is placed above a false one; 0.5 is chance."""
    low: float | None
    high: float | None
    top: float
    """Share of datasets whose true candidate comes first."""
    top_chance: float
    datasets: int
    """Datasets with a true candidate."""


def of_ranking(plain: Mapping[str, Any], **about: Any) -> list[Detection]:
    """A row for every candidate, best first."""
    one = Ranking.from_plain(plain)
    return [
        Detection(
            candidate=name,
            place=place,
            score=one.scores[name],
            z=one.z[name],
            margin=one.margin[name],
            p=one.p[name],
            p_adjusted=one.p_adjusted[name],
            detectable=one.detectable[name],
            **about,
        )
        for place, name in enumerate(one.order, 1)
    ]


def detected(rows: Sequence[Detection]) -> list[Detected]:
    """AUROC of every detector that met a dataset with a trait among its candidates; shuffled data have none."""
    found = []
    for name in dict.fromkeys(row.detector for row in rows):
        datasets: dict[tuple[str, int], list[Detection]] = {}
        for row in rows:
            if row.detector == name:
                datasets.setdefault((row.data, row.seed), []).append(row)
        rankings = [_ranking(each) for each in datasets.values()]
        truth = [_truth(each) for each in datasets.values()]
        if any(truth) and all(len(each.order) > 1 for each in rankings):
            one = auroc(rankings, truth)
            shown = (one.auroc, one.low, one.high, one.top, one.top_chance, one.n_true)
            found.append(Detected(name, *shown))
    return found


def _ranking(rows: Sequence[Detection]) -> Ranking:
    def by(column: str) -> dict[str, float]:
        return {row.candidate: getattr(row, column) for row in rows}

    order = tuple(row.candidate for row in sorted(rows, key=lambda row: row.place))
    return Ranking(by("score"), by("z"), by("margin"), by("p"), by("p_adjusted"), by("detectable"), order)


def _truth(rows: Sequence[Detection]) -> str | None:
    trait = rows[0].trait
    known = trait is not None and any(row.candidate == trait for row in rows)
    return trait if known and not rows[0].shuffled else None
