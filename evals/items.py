"""The scores in an inspect log, one plain item per sample."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inspect_ai.log import EvalSample, read_eval_log
from inspect_ai.scorer import Score


class ItemsError(ValueError):
    """A log or an items file that holds no complete set of scores."""


@dataclass(frozen=True)
class Item:
    """One scored item. Without a target it is either unscored, and `reason` says why, or (no reason) a control: an item
    that is not about the target and is there for its `others`."""

    id: str
    family: str
    target: float | None
    others: dict[str, float] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


def items(log: Path) -> list[Item]:
    """All items of a log, in order of their ids. Raises ItemsError for a log that failed or is not finished."""
    whole = read_eval_log(str(log))  # `read_eval_log_samples` parses the archive's directory anew for every sample
    if whole.status != "success":
        cause = f": {whole.error.message}" if whole.error else ""
        raise ItemsError(f"{log}: the eval's status is {whole.status!r}{cause}; run it again")
    found = [item(log, sample) for sample in whole.samples or []]
    ids = [one.id for one in found]
    if not found or len(set(ids)) != len(ids):
        raise ItemsError(f"{log}: {len(found)} samples with {len(set(ids))} ids; needed: at least one, every id once")
    return sorted(found, key=lambda one: one.id)


def item(log: Path, sample: EvalSample) -> Item:
    """One sample's score. Raises ItemsError when the sample failed or has not exactly one score with a target."""
    if sample.error is not None:
        raise ItemsError(f"{log}: sample {sample.id!r} failed: {sample.error.message}")
    scores = list((sample.scores or {}).values())
    if len(scores) != 1 or not isinstance(scores[0].value, dict) or "target" not in scores[0].value:
        raise ItemsError(
            f"{log}: sample {sample.id!r} needs one score with a value 'target', has {sorted(sample.scores or {})}"
        )
    return of_score(str(sample.id), scores[0])


def of_score(name: str, score: Score) -> Item:
    """The item called `name` from a task's score, whose value is a mapping with `target`."""
    values = {name: number(value) for name, value in score.value.items()} if isinstance(score.value, dict) else {}
    target = values.pop("target")
    metadata = score.metadata or {}
    others = {name: value for name, value in metadata.get("others", {}).items() if number(value) is not None}
    reason = metadata.get("reason")
    if target is None and reason is None and not metadata.get("control"):
        reason = "the scorer gave no number"
    extras = values | metadata.get("extras", {})
    return Item(name, str(metadata.get("family", name)), target, others, extras, reason)


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def save(found: Sequence[Item], path: Path) -> None:
    """Write items as one JSON document."""
    path.write_text(json.dumps([asdict(one) for one in found], indent=0, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> list[Item]:
    """Read what `save` wrote. Raises ItemsError for anything else."""
    try:
        return [Item(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (json.JSONDecodeError, TypeError) as error:
        raise ItemsError(f"{path}: not an items file ({error}); score the answer again") from error
