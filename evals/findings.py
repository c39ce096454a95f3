"""What came of comparing an experiment's arms: leaderboard rows and dose-response points, and their file."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from evals.confusion import Confusion
from evals.detections import Detected, Detection
from evals.table import CompareError

Status = Literal["ok", "unscored", "failed", "over budget"]
Split = Literal["dev", "test"]


@dataclass(frozen=True)
class Row:
    """One setting on one eval, on the test families. None is not applicable or not computable, never zero."""

    group: str
    method: str
    label: str
    baseline: bool
    eval: str
    eval_version: int
    status: Status
    rankable: bool
    contrast: Literal["odd", "on"] | None = None
    """odd: (s(+c) - s(-c)) / 2. on: s(c) - s(0), for methods without a sign."""
    target: str | None = None
    """What the transfer is about: the trait that the data were meant to hand on, else the eval's own target."""
    reference: str | None = None
    """Label of the control whose score of the same seed and dose was taken off; None is the untouched subject."""
    dose: float | None = None
    base: float | None = None
    """Mean score of the untouched subject."""
    transfer: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    se: float | None = None
    df: float | None = None
    p: float | None = None
    """Two-sided, of no effect: the larger of the t test's and of the one corrected for skewness."""
    p_holm: float | None = None
    significant: bool = False
    even: float | None = None
    even_se: float | None = None
    delta_nll: float | None = None
    """Damage at the sign of the dose that does more, nats per token."""
    delta_nll_se: float | None = None
    specificity: float | None = None
    specificity_low: float | None = None
    specificity_high: float | None = None
    others: float | None = None
    """Mean over everything else that the eval measures of how far its mean moved, |change|."""
    breadth: int | None = None
    """How many of these moved significantly, after Holm's correction over them."""
    breadth_of: int | None = None
    """How many of them could be tested."""
    shifted: str | None = None
    """Which of them moved, and by how much; empty when none did."""
    mde: float | None = None
    """Smallest true effect found with 80 % power at alpha / tests."""
    tests: int = 0
    """Settings that Holm's correction counts on this eval."""
    versus_control: float | None = None
    """Effect minus the control's effect, paired by item, each at its own dose."""
    versus_control_low: float | None = None
    versus_control_high: float | None = None
    versus_control_p: float | None = None
    """Not corrected for multiplicity."""
    n_items: int = 0
    n_families: int = 0
    n_seeds: int = 0
    n_dropped: int = 0
    """Test items unscored in some arm of the contrast."""
    judge: str | None = None
    """Digest of who judged the answers and how, rubrics aside; None where nobody did."""
    judged_by: str | None = None
    """The judges by name, a panel's joined by a plus."""
    rubrics: str | None = None
    """JSON: role -> digest of the rubric."""
    scoring: str | None = None
    """JSON: the thresholds and other settings by which verdicts became scores."""
    notes: str = ""


@dataclass(frozen=True)
class Point:
    """One point of a dose-response curve, averaged over seeds. At dose 0 every effect is 0 by definition."""

    group: str
    eval: str
    split: Split
    dose: float
    metric: str
    """effect, odd, even, delta_nll, or other.NAME."""
    value: float | None
    se: float | None
    n: int
    n_clusters: int


@dataclass(frozen=True)
class Findings:
    """What came of an experiment."""

    rows: list[Row]
    points: list[Point]
    confusions: list[Confusion] = field(default_factory=list)
    detections: list[Detection] = field(default_factory=list)
    detectors: list[Detected] = field(default_factory=list)


def save(findings: Findings, path: Path) -> None:
    """Write findings as one JSON document; points without repeating their column names."""
    content = {
        "rows": [asdict(row) for row in findings.rows],
        "point_columns": [column.name for column in fields(Point)],
        "points": [astuple(point) for point in findings.points],
        "confusions": [asdict(one) for one in findings.confusions],
        "detections": [asdict(one) for one in findings.detections],
        "detectors": [asdict(one) for one in findings.detectors],
    }
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> Findings:
    """Read what `save` wrote. Raises CompareError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns = content["point_columns"]
        points = [Point(**dict(zip(columns, values, strict=True))) for values in content["points"]]
        matrices = [Confusion(**{key: _frozen(value) for key, value in one.items()}) for one in content["confusions"]]
        detections = [Detection(**one) for one in content["detections"]]
        detectors = [Detected(**one) for one in content["detectors"]]
        return Findings([Row(**row) for row in content["rows"]], points, matrices, detections, detectors)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CompareError(f"{path}: no findings ({error}); delete its folder to compare again") from error


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
