"""How well a detector detects: over many datasets, is the true candidate told from the others?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiments.detector import DetectionError, Ranking
from experiments.permutation import Floats

By = Literal["margin", "z", "scores", "p"]


@dataclass(frozen=True)
class Detection:
    """Over d datasets, of which some have a trait."""

    auroc: float
    """Probability that a dataset's true candidate is placed above a false one of any dataset; 0.5 is chance."""
    low: float | None
    """Lower end of the 95 % interval over datasets; None for fewer than two datasets with a trait."""
    high: float | None
    top: float
    """Share of the datasets with a trait whose true candidate comes first."""
    top_chance: float
    """What `top` would be by guessing."""
    n_true: int
    """Datasets with a trait: one true candidate each."""
    n_false: int
    """False candidates in all datasets."""


def auroc(
    rankings: Sequence[Ranking], truth: Sequence[str | None], by: By = "margin", draws: int = 2000, seed: int = 0
) -> Detection:
    """Area under the ROC curve (Mann-Whitney: ties count half), its interval by a bootstrap of whole datasets.

    `truth[i]` is what dataset i hands on, None for a control: all its candidates are false. Datasets with and without a
    trait are redrawn apart, so that every draw has both. Raises DetectionError for what no ranking holds.
    """
    _check(rankings, truth)
    true: list[float] = []
    false: list[list[float]] = []
    with_trait: list[int] = []
    for place, (ranking, trait) in enumerate(zip(rankings, truth, strict=True)):
        values: Mapping[str, float] = getattr(ranking, by)
        sign = -1 if by == "p" else 1
        false.append([sign * value for name, value in values.items() if name != trait])
        if trait is not None:
            true.append(sign * values[trait])
            with_trait.append(place)
    sizes = np.array([len(others) for others in false])
    wins = _wins(np.array(true), np.concatenate(false), np.repeat(np.arange(len(sizes)), sizes))
    low, high = _interval(wins, sizes, np.array(with_trait), draws, seed) if len(true) > 1 else (None, None)
    first = [rankings[place].order[0] == truth[place] for place in with_trait]
    chance = [1 / len(rankings[place].order) for place in with_trait]
    area = float(wins.sum() / (len(true) * sizes.sum()))
    return Detection(area, low, high, float(np.mean(first)), float(np.mean(chance)), len(true), int(sizes.sum()))


def _check(rankings: Sequence[Ranking], truth: Sequence[str | None]) -> None:
    if len(rankings) != len(truth):
        raise DetectionError(f"{len(rankings)} rankings but {len(truth)} truths; one for each is needed")
    for place, (ranking, trait) in enumerate(zip(rankings, truth, strict=True)):
        if trait is not None and trait not in ranking.scores:
            raise DetectionError(
                f"dataset {place} hands on {trait!r}, which is no candidate of its ranking: {', '.join(ranking.scores)}"
            )
    false = sum(len(ranking.scores) - (trait is not None) for ranking, trait in zip(rankings, truth, strict=True))
    if not any(trait is not None for trait in truth) or not false:
        raise DetectionError("an AUROC needs at least one true and one false candidate")


def _wins(true: Floats, false: Floats, dataset: NDArray[np.int64]) -> Floats:
    """[true, datasets] how many false values of each dataset lie below each true one; equals count half."""
    below = (false < true[:, None]) + (false == true[:, None]) / 2
    found = np.zeros((len(true), int(dataset.max()) + 1))
    np.add.at(found.T, dataset, below.T)
    return found


def _interval(
    wins: Floats, sizes: NDArray[np.int64], with_trait: NDArray[np.int64], draws: int, seed: int
) -> tuple[float, float]:
    """The middle 95 % of the areas of redrawn datasets: how often each is drawn weighs what it adds."""
    noise = np.random.default_rng(seed)
    without = np.setdiff1d(np.arange(len(sizes)), with_trait)
    times = np.zeros((draws, len(sizes)))
    for group in (with_trait, without):
        if len(group):
            times[:, group] = noise.multinomial(len(group), np.full(len(group), 1 / len(group)), size=draws)
    won = ((times[:, with_trait] @ wins) * times).sum(axis=1)
    low, high = np.quantile(won / (len(with_trait) * (times @ sizes)), [0.025, 0.975])
    return float(low), float(high)
