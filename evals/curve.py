"""Dose-response curves of a group: every dose that was run, both splits, averaged over seeds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evals import stats
from evals.findings import Point, Split
from evals.stats import Array, even_part, odd_part
from evals.table import Group, Scores, Table, complete, finite, occupied


def points(table: Table, group: Group, scores: Scores) -> list[Point]:
    """Every metric at every dose, 0 included, on the development and on the test families."""
    effects = list(_effects(table, scores))
    found: list[Point] = []
    sides: tuple[tuple[Split, np.ndarray], ...] = (("dev", table.dev), ("test", ~table.dev))
    for split, side in sides:
        if effects and side.any():
            found += _side(table, group, effects, split, side)
    return found


def _side(
    table: Table, group: Group, effects: list[tuple[float, str, Array]], split: Split, side: np.ndarray
) -> Iterator[Point]:
    base = side & ~np.isnan(table.base)
    families = occupied(table.members[base]).shape[1]
    for metric in _metrics(table):
        yield Point(group.group, table.eval.name, split, 0.0, metric, 0.0, 0.0, int(base.sum()), families)
    alike: dict[tuple[int, bytes], list[tuple[float, str, Array]]] = {}
    for each in effects:  # effects on the same items are averaged in one step
        kept = side & complete(each[2])
        alike.setdefault((len(each[2]), kept.tobytes()), []).append(each)
    for (_, mask), same in alike.items():
        kept = np.frombuffer(mask, dtype=bool)
        members = occupied(table.members[kept])
        if not kept.any():
            yield from (Point(group.group, table.eval.name, split, *each[:2], None, None, 0, 0) for each in same)
            continue
        estimate = stats.crossed_mean(np.stack([each[2][:, kept] for each in same]), members)
        for (dose, metric, _), value, se in zip(same, estimate.mean, estimate.se, strict=True):
            shape = int(kept.sum()), members.shape[1]
            yield Point(group.group, table.eval.name, split, dose, metric, finite(value), finite(se), *shape)


def _metrics(table: Table) -> list[str]:
    return ["delta_nll" if table.eval.damage else "effect", *(f"other.{name}" for name in table.names)]


def _effects(table: Table, scores: Scores) -> Iterator[tuple[float, str, Array]]:
    """(dose, metric, per-item effects [S, n]); odd and even parts stand at the positive dose."""
    names = _metrics(table)
    for dose, target in scores.target.items():
        yield dose, names[0], target - table.base
        for index, name in enumerate(names[1:]):
            yield dose, name, scores.others[dose][..., index] - table.base_others[:, index]
        if dose > 0 and scores.seeds.get(-dose) == scores.seeds[dose] and not table.eval.damage:
            yield dose, "odd", odd_part(target, scores.target[-dose])
            yield dose, "even", even_part(target, scores.target[-dose], table.base)
