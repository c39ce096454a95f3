"""Does the correction recover the truth? Coverage of its 95 % intervals over a grid of simulated judges.

Answers come in families that share a latent tendency; the judge errs with known TPR and TNR; labelled answers are a
separate set, half of them true (for `powered`: drawn like the judged ones). Four estimates:
    rate         the true rate behind a judged rate (Rogan-Gladen)
    change       the true difference of two arms that answer the same items, judged with the same errors
    score        the same, judged by numbers in [0, 1] whose means are TPR and 1 - TNR, by the judge's slope
    powered      the true rate by prediction-powered inference
An estimate whose judge is refused as near chance is not shown. `all` counts every interval, `shown` those that are.

    python -m benchmarks.judge_correction           # the tables in docs/judges.md, about ten minutes
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from evals import correction, judge_error
from evals.judge_error import Limits, limits
from evals.stats import item_source, membership

FAMILY, TOGETHER = 4, 0.3
"""Items of a family, and the share of an item's latent variance that its family shares."""
RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
JUDGES = (
    (0.6, 0.6),
    (0.7, 0.7),
    (0.6, 0.9),
    (0.9, 0.6),
    (0.8, 0.8),
    (0.6, 0.95),
    (0.95, 0.6),
    (0.9, 0.9),
    (0.95, 0.95),
)
LABELLED, ANSWERS = (80, 160, 320), (100, 400, 2000)
LEAST_PROMISED = 0.3
"""True J from which coverage is promised; below it only judges that were lucky are shown."""


@dataclass(frozen=True)
class World:
    """One simulated judge, and how much is known of it."""

    rate: float
    tpr: float
    tnr: float
    labelled: int
    answers: int

    @property
    def j(self) -> float:
        """Youden's J."""
        return self.tpr + self.tnr - 1


Runs = tuple[np.ndarray, np.ndarray]
"""[runs] whether the interval held the truth, and whether it would be shown."""
LEAST_SHOWN = 200


@dataclass(frozen=True)
class Coverage:
    """How often the interval held the truth, over all runs and over those that would be shown."""

    all: float
    shown: float
    """NaN when fewer than `LEAST_SHOWN` are."""
    share: float
    """Share of runs that are shown."""


def worlds() -> Iterator[World]:
    """The grid."""
    for rate, (tpr, tnr), labelled, answers in itertools.product(RATES, JUDGES, LABELLED, ANSWERS):
        yield World(rate, tpr, tnr, labelled, answers)


def latent(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Standard normal [..., n] in which families of items move together."""
    *batch, n = shape
    family = rng.standard_normal((*batch, n // FAMILY)).repeat(FAMILY, -1)
    return np.sqrt(TOGETHER) * family + np.sqrt(1 - TOGETHER) * rng.standard_normal(shape)


def verdicts(truth: np.ndarray, world: World, rng: np.random.Generator) -> np.ndarray:
    """What the judge says."""
    return rng.random(truth.shape) < np.where(truth, world.tpr, 1 - world.tnr)


def families(n: int) -> list[str]:
    """The family of each item."""
    return [str(index // FAMILY) for index in range(n)]


def errors(world: World, runs: int, rng: np.random.Generator) -> tuple[Limits, Limits, np.ndarray]:
    """TPR and TNR [runs] as measured on labelled answers, and whether the judge is far enough from chance."""
    positive = world.labelled // 2
    negative = world.labelled - positive
    tpr = judge_error.jeffreys(rng.binomial(positive, world.tpr, runs), positive)
    tnr = judge_error.jeffreys(rng.binomial(negative, world.tnr, runs), negative)
    return tpr, tnr, judge_error.youden(tpr, tnr).low > judge_error.LEAST_J


def rate(world: World, runs: int, rng: np.random.Generator) -> Runs:
    """Coverage of the corrected rate."""
    truth = latent((runs, world.answers), rng) < special.ndtri(world.rate)
    judged = judge_error.share(verdicts(truth, world, rng), families(world.answers))
    tpr, tnr, shown = errors(world, runs, rng)
    return covered(correction.rate(judged, tpr, tnr).raw, world.rate, shown)


def change(world: World, runs: int, rng: np.random.Generator) -> Runs:
    """Coverage of the corrected difference of verdicts."""
    base, treated = (verdicts(truth, world, rng).astype(float) for truth in arms(world, runs, rng))
    tpr, tnr, shown = errors(world, runs, rng)
    found = correction.change(paired(treated - base), judge_error.youden(tpr, tnr))
    return covered(found, treated_rate(world) - world.rate, shown)


def score(world: World, runs: int, rng: np.random.Generator) -> Runs:
    """Coverage of the corrected difference of scores; labelled answers come in questions with two of either label."""
    base, treated = (numbers(truth, world, rng) for truth in arms(world, runs, rng))
    truth = np.tile([1.0, 1.0, 0.0, 0.0], world.labelled // FAMILY)
    judged, names = numbers(np.broadcast_to(truth, (runs, len(truth))), world, rng), families(len(truth))
    slopes = limits(*np.array([judge_error.slope(one, truth, names) for one in judged]).T)
    found = correction.change(paired(treated - base), slopes)
    return covered(found, treated_rate(world) - world.rate, slopes.low > judge_error.LEAST_J)


def treated_rate(world: World) -> float:
    """Twice the base's rate, at most 0.6."""
    return min(2 * world.rate, 0.6)


def arms(world: World, runs: int, rng: np.random.Generator) -> np.ndarray:
    """[2, runs, n] what is true of the base's and the treated subject's answers to the same items."""
    common = latent((runs, world.answers), rng)
    both = np.sqrt(0.5) * common + np.sqrt(0.5) * rng.standard_normal((2, *common.shape))
    return both < special.ndtri(np.array([world.rate, treated_rate(world)])[:, None, None])


def paired(effects: np.ndarray) -> Limits:
    """The mean effect [runs] with its clustered t interval."""
    variance, df = item_source(effects, membership(families(effects.shape[-1])))
    radius = scipy_stats.t.ppf(0.975, df) * np.sqrt(variance)
    raw = effects.mean(-1)
    return limits(raw, raw - radius, raw + radius)


def numbers(truth: np.ndarray, world: World, rng: np.random.Generator) -> np.ndarray:
    """What a judge says that gives numbers: a beta variable of concentration 4 about its mean for the label."""
    mean = np.where(truth, world.tpr, 1 - world.tnr)
    return rng.beta(4 * mean, 4 * (1 - mean))


def powered(world: World, runs: int, rng: np.random.Generator) -> Runs:
    """Coverage of the prediction-powered rate, whose labelled answers are drawn like the judged ones."""
    truth = latent((runs, world.answers), rng) < special.ndtri(world.rate)
    judged = judge_error.share(verdicts(truth, world, rng), families(world.answers))
    labelled = latent((runs, world.labelled), rng) < special.ndtri(world.rate)
    said, names = verdicts(labelled, world, rng), families(world.labelled)
    alarms, misses = judge_error.share(said & ~labelled, names), judge_error.share(~said & labelled, names)
    found = correction.prediction_powered(judged, judge_error.exclusive(alarms, misses))
    return covered(found, world.rate, np.ones(runs, bool))


def covered(found: Limits, truth: float, shown: np.ndarray) -> Runs:
    """Which intervals hold the truth, and which are shown."""
    return (found.low <= truth) & (truth <= found.high), shown


ESTIMATES = {"rate": rate, "change": change, "score": score, "powered": powered}


def measure(name: str, world: World, runs: int, seed: int = 0, chunk: int = 250) -> Coverage:
    """Coverage over that many runs of one world."""
    rng = np.random.default_rng([seed, zlib.crc32(repr((name, world)).encode())])
    parts = [ESTIMATES[name](world, min(chunk, runs - start), rng) for start in range(0, runs, chunk)]
    inside, shown = (np.concatenate(each) for each in zip(*parts, strict=True))
    kept = float(inside[shown].mean()) if shown.sum() >= LEAST_SHOWN else float("nan")
    return Coverage(float(inside.mean()), kept, float(shown.mean()))


def promised(name: str, world: World) -> bool:
    """Whether 93 to 97 % is promised in this world."""
    return name == "powered" or world.j >= LEAST_PROMISED - 1e-9


def main() -> None:
    """Write every cell to a file, and print the summaries as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--only", choices=ESTIMATES, nargs="+", default=list(ESTIMATES))
    parser.add_argument("--cells", default="judge_correction.csv", help="file for the table of all cells")
    given = parser.parse_args()
    rows = []
    with open(given.cells, "w", encoding="utf-8") as cells:
        print("estimate,rate,tpr,tnr,labelled,answers,promised,all,shown,share_shown", file=cells)
        for name, world in itertools.product(given.only, worlds()):
            found = measure(name, world, given.runs)
            rows.append((name, world, found))
            place = f"{name},{world.rate},{world.tpr},{world.tnr},{world.labelled},{world.answers}"
            share = f"{found.all:.4f},{found.shown:.4f},{found.share:.3f}"
            print(f"{place},{int(promised(name, world))},{share}", file=cells, flush=True)
    print(summary(rows))


def summary(rows: Sequence[tuple[str, World, Coverage]]) -> str:
    """One line an estimate and range: cells, mean, least and greatest coverage, how many lie within 93 to 97 %."""
    lines = [
        "| estimate | judges | cells | mean | least | greatest | within 93-97 % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, inside in itertools.product(ESTIMATES, (True, False)):
        of = [found for each, world, found in rows if each == name and promised(name, world) == inside]
        for kind in ("all", "shown"):
            values = np.array([getattr(found, kind) for found in of])
            values = values[~np.isnan(values)]
            if len(values):
                range_ = "J from 0.3" if inside and name != "powered" else "any" if inside else "J 0.2"
                within = ((values >= 0.93) & (values <= 0.97)).mean()
                shares = " | ".join(
                    f"{100 * each:.1f} %" for each in (values.mean(), values.min(), values.max(), within)
                )
                lines.append(f"| {name}, {kind} | {range_} | {len(values)} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
