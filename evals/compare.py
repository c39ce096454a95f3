"""Scores of one experiment -> one row per setting and eval: effect, interval, damage, specificity, what it rests on.

The dose is chosen on the development families under the damage budget and everything else is computed on the test
families. docs/metrics.md has the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from evals import stats
from evals.breadth import breadth
from evals.confusion import Confusion, confusion
from evals.curve import points
from evals.findings import Findings, Point, Row, Status
from evals.specificity import specificity
from evals.stats import Array, Estimate, even_part, odd_part
from evals.table import (
    Arm,
    CompareError,
    Comparison,
    Eval,
    Group,
    Judging,
    Mean,
    Scores,
    Table,
    complete,
    finite,
    first_words,
    mean,
    occupied,
)

__all__ = ["Arm", "CompareError", "Comparison", "Eval", "Findings", "Group", "Judging", "Row", "compare"]

MOST_DROPPED = 0.5
"""A row that lost a greater share of its test items is unscored: what is left was selected by the intervention."""


def compare(question: Comparison) -> Findings:
    """Rows for every group and eval that measures no damage, and dose-response points for all of them.

    Raises CompareError: arms whose items differ from the base's, an arm twice, or two evals of damage.
    """
    tables = [Tables(measured, question.dev) for measured in question.evals]
    damages = [each.facing(None) for each in tables if each.eval.damage]
    if len(damages) > 1:
        names = ", ".join(table.eval.name for table in damages)
        raise CompareError(f"{len(damages)} evals measure damage ({names}); the budget needs exactly one")
    harm = damages[0] if damages else None
    harms = [harm.scores(group) if harm else None for group in question.groups]
    groups = {group.group: group for group in question.groups}
    rows: list[Row] = []
    found: list[Point] = []
    matrices: list[Confusion] = []
    for each in tables:
        drafts = []
        for group, harmed in zip(question.groups, harms, strict=True):
            table = each.facing(group.trait)
            if each.eval.damage:
                found += points(table, group, harmed or table.scores(group))
                continue
            scores = table.scores(group)
            reference = groups[group.reference] if group.reference is not None else None
            if reference is not None:
                scores = scores.against(table.scores(reference), table.base, table.base_others)
            found += points(table, group, scores)
            draft = _Draft.of(question, table, group, scores, harmed, harm)
            shown = replace(draft.row, target=table.target, reference=reference.label if reference else None)
            drafts.append(replace(draft, row=shown, table=table, scores=scores))
        if drafts:
            rows += [replace(row, **_judged(each.eval)) for row in _finish(question, drafts)]
            matrices += _matrices(question.groups, drafts)
    return Findings(rows, found, matrices)


def _judged(measured: Eval) -> dict[str, Any]:
    """Columns that say who judged the answers and how; none where nobody did."""
    by = measured.judging
    if by is None:
        return {}
    rubrics, scoring = (json.dumps(dict(each), sort_keys=True) for each in (by.rubrics, by.scoring))
    return {"judge": by.digest, "judged_by": " + ".join(by.models), "rubrics": rubrics, "scoring": scoring}


def _matrices(groups: Sequence[Group], drafts: Sequence[_Draft]) -> list[Confusion]:
    """A confusion matrix for every setting whose students had teachers with traits that the eval knows."""
    students: dict[str, dict[str, dict[str, Array]]] = {}
    shared: dict[str, bool] = {}
    for group, draft in zip(groups, drafts, strict=True):
        known = draft.table is not None and draft.table.target == group.trait
        if not known or group.trait is None or group.student is None or group.baseline or draft.row.dose is None:
            continue
        if (moved := _moved(draft)) is not None:
            students.setdefault(group.student, {}).setdefault(group.trait, moved)
            shared[group.student] = shared.get(group.student, False) or group.shared
    return [confusion(drafts[0].row.eval, student, rows, shared[student]) for student, rows in students.items()]


def _moved(draft: _Draft) -> dict[str, Array] | None:
    """Mean effect [S] on every name at the chosen dose, over the test items that are scored under every seed."""
    table, scores, dose = draft.table, draft.scores, draft.row.dose
    if table is None or scores is None or dose is None or table.target is None or dose not in scores.target:
        return None
    effects = {table.target: scores.target[dose] - table.base}
    others = scores.others[dose] - table.base_others
    effects |= {name: others[..., index] for index, name in enumerate(table.names)}
    kept = ~table.dev & complete(*effects.values())
    return {name: effect[:, kept].mean(1) for name, effect in effects.items()} if kept.any() else None


class Tables:
    """One eval's items as seen by those who aim at its own target, and by those whose trait is another."""

    def __init__(self, measured: Eval, dev: float) -> None:
        self.eval = measured
        self._dev = dev
        self._known = {name for item in measured.base for name in item.others}
        self._made: dict[str | None, Table] = {}

    def facing(self, trait: str | None) -> Table:
        """The table whose target is `trait`; the eval's own where it knows no such thing."""
        own = trait if trait in self._known else None
        if own not in self._made:
            self._made[own] = Table.of(self.eval, self._dev, own)
        return self._made[own]


@dataclass(frozen=True)
class _Draft:
    """A row before it is compared with the others."""

    row: Row
    estimate: Estimate | None = None
    effect: Array | None = None
    """[S, n] over all items, at the chosen dose."""
    p: float = np.nan
    table: Table | None = None
    """The items as its target sees them."""
    scores: Scores | None = None

    @classmethod
    def of(
        cls,
        question: Comparison,
        table: Table,
        group: Group,
        scores: Scores,
        harm_scores: Scores | None,
        harm: Table | None,
    ) -> _Draft:
        blank = Row(
            group=group.group,
            method=group.method,
            label=group.label,
            baseline=group.baseline,
            eval=table.eval.name,
            eval_version=table.eval.version,
            status="failed",
            rankable=False,
            n_seeds=len(scores.all_seeds),
        )
        notes = [
            *table.eval.notes,
            *scores.notes,
            *([f"failed: {first_words(scores.failures)}"] if scores.failures else []),
        ]
        if not table.ids:
            return cls(replace(blank, notes="; ".join(["the untouched subject has no scores", *notes])))
        if not scores.candidates:
            return cls(replace(blank, notes="; ".join(notes or ["no dose was run for every seed"])))
        choice = _choose(question, table, scores, harm_scores, harm)
        notes += choice.notes
        if choice.status == "unscored":
            return cls(replace(blank, status="unscored", notes="; ".join(notes)))
        return _measured(blank, table, scores, choice, notes, harm_scores, harm)


@dataclass(frozen=True)
class _Choice:
    """The dose that is reported, and why none could be."""

    dose: float
    status: Status
    notes: tuple[str, ...] = ()


def effect_at(table: Table, scores: Scores, dose: float) -> Array:
    """Per-item effect [S, n] of a candidate dose: the odd part, or the difference to the base."""
    if scores.signed:
        return odd_part(scores.target[dose], scores.target[-dose])
    return scores.target[dose] - table.base


def _choose(question: Comparison, table: Table, scores: Scores, harms: Scores | None, harm: Table | None) -> _Choice:
    """The dose by `stats.choose_dose` on the development families; over budget: the least damaging one."""
    doses = scores.candidates
    sizes = np.stack([_seed_means(effect_at(table, scores, dose)[:, table.dev]) for dose in doses])
    if np.isnan(sizes).all():
        return _Choice(doses[0], "unscored", ("no development item is scored in all its arms",))
    if harm is None or harms is None:
        best = int(stats.choose_dose(sizes, np.zeros(len(doses)), 0.0))
        return _Choice(doses[best], "ok", ("no eval of damage: the budget was not applied",))
    damages = np.array([_damage(harm, harms, dose, scores.signed, harm.dev)[0] for dose in doses], dtype=float)
    if np.isnan(damages).all():
        return _Choice(doses[0], "unscored", ("damage is unscored at every dose",))
    best = int(stats.choose_dose(sizes, damages, question.budget))
    if best >= 0:
        return _Choice(doses[best], "ok")
    usable = np.where(np.isnan(sizes).any(axis=1), np.nan, damages)
    if np.isnan(usable).all():
        return _Choice(doses[0], "unscored", ("no dose has both its effect and its damage scored",))
    least = int(np.nanargmin(usable))
    note = f"every dose is over the budget of {question.budget:g} nats; shown is the least damaging"
    return _Choice(doses[least], "over budget", (note,))


def _seed_means(effects: Array) -> Array:
    """[S] means over the items scored under every seed; NaN when there is none."""
    kept = complete(effects)
    return effects[:, kept].mean(axis=1) if kept.any() else np.full(len(effects), np.nan)


def _damage(harm: Table, harms: Scores, dose: float, signed: bool, side: np.ndarray) -> tuple[float, float]:
    """ΔNLL of the passages `side` at the worse sign of `dose`, and its standard error; NaN where unscored."""
    found = []
    for signed_dose in (dose, -dose) if signed else (dose,):
        if signed_dose not in harms.target:
            return np.nan, np.nan
        one = mean((harms.target[signed_dose] - harm.base)[:, side], harm.members[side])
        if one.value is None:
            return np.nan, np.nan
        found.append((one.value, float(one.estimate.se)))
    return max(found)


def _measured(
    blank: Row,
    table: Table,
    scores: Scores,
    choice: _Choice,
    notes: list[str],
    harms: Scores | None,
    harm: Table | None,
) -> _Draft:
    """The row of the chosen dose on the test families."""
    test, dose = ~table.dev, choice.dose
    effect = effect_at(table, scores, dose)
    found = mean(effect[:, test], table.members[test])
    total = int((test & ~table.control).sum())
    status = choice.status
    if found.items < MOST_DROPPED * total or found.items == 0:
        status = "unscored"
        notes = [*notes, f"{found.items} of {total} test items are scored in all arms"]
    if found.families == 1:
        notes = [*notes, "one family on the test side: no standard error"]
    if blank.n_seeds == 1:
        notes = [*notes, "seeds=1: about this one trained intervention, not about the method"]
    damage = (
        _damage(harm, harms, dose, scores.signed, ~harm.dev) if harm is not None and harms is not None else (None, None)
    )
    kept = test & complete(effect)
    row = replace(
        blank,
        status=status,
        contrast="odd" if scores.signed else "on",
        dose=dose,
        base=finite(table.base[kept & ~np.isnan(table.base)].mean()) if (kept & ~np.isnan(table.base)).any() else None,
        delta_nll=finite(damage[0]),
        delta_nll_se=finite(damage[1]),
        n_items=found.items,
        n_families=found.families,
        n_dropped=total - found.items,
        notes="; ".join(notes),
    )
    if status == "unscored":
        return _Draft(row)
    row = replace(
        row, **_effect_columns(found), **_side_effect(table, scores, dose), **_specificity(table, scores, dose)
    )
    p = float(stats.guarded_p_value(found.estimate, effect[:, kept], occupied(table.members[kept])))
    return _Draft(row, found.estimate, effect, p)


def _effect_columns(found: Mean) -> dict[str, Any]:
    low, high = found.estimate.interval()
    df = found.estimate.df if found.se is not None else None
    return {"transfer": found.value, "ci_low": finite(low), "ci_high": finite(high), "se": found.se, "df": df}


def _side_effect(table: Table, scores: Scores, dose: float) -> dict[str, Any]:
    if not scores.signed:
        return {}
    test = ~table.dev
    found = mean(even_part(scores.target[dose], scores.target[-dose], table.base)[:, test], table.members[test])
    return {"even": found.value, "even_se": found.se}


def _specificity(table: Table, scores: Scores, dose: float) -> dict[str, Any]:
    effect = effect_at(table, scores, dose)
    kept = ~table.dev & (complete(effect) | table.control)
    if scores.signed:
        others = odd_part(scores.others[dose], scores.others[-dose])
    else:
        others = scores.others[dose] - table.base_others
    members = occupied(table.members[kept])
    found = specificity(effect[:, kept], others[:, kept], members)
    moved = breadth(others[:, kept], members, table.names)
    return {
        "specificity": found["value"],
        "specificity_low": found["low"],
        "specificity_high": found["high"],
        "others": found["others"],
        "breadth": moved.count,
        "breadth_of": moved.of,
        "shifted": moved.told() if moved.tested else None,
    }


def _finish(question: Comparison, drafts: Sequence[_Draft]) -> list[Row]:
    """Tests, Holm over the eval's rankable rows, detectable effects, and the difference to the control."""
    p_values = np.array([one.p for one in drafts], dtype=float)
    plain = np.array([np.nan if one.estimate is None else float(one.estimate.p_value()) for one in drafts], dtype=float)
    ranked = np.array([one.row.status == "ok" for one in drafts], dtype=bool) & ~np.isnan(p_values)
    adjusted, unguarded = (stats.holm(np.where(ranked, each, np.nan)) for each in (p_values, plain))
    tests = int(ranked.sum())
    controls = [one for one in drafts if one.row.method == question.control and one.row.status == "ok"]
    control = next(iter(sorted(controls, key=lambda one: not one.row.baseline)), None)
    rows = []
    for one, p, p_holm, p_plain, rankable in zip(drafts, p_values, adjusted, unguarded, ranked, strict=True):
        row = replace(one.row, tests=tests)
        if rankable and one.estimate is not None:
            row = replace(
                row,
                rankable=True,
                p=float(p),
                p_holm=float(p_holm),
                significant=bool(p_holm < question.alpha),
                mde=finite(one.estimate.detectable(question.alpha / tests)),
            )
            if p_plain < question.alpha <= p_holm:
                note = f"skewed effects: a t test alone would say p (Holm) = {p_plain:.2g}"
                row = replace(row, notes="; ".join(filter(None, [row.notes, note])))
        rows.append(replace(row, **_versus(one, control)))
    return rows


def _versus(one: _Draft, control: _Draft | None) -> dict[str, Any]:
    """The difference to the control on the test items that both have, where both aim at the same."""
    table = one.table
    if control is None or control.effect is None or one.effect is None or one is control or table is not control.table:
        return {}
    if table is None:
        return {}
    kept = ~table.dev & complete(one.effect, control.effect)
    members = occupied(table.members[kept])
    if members.shape[1] < 2:
        return {}
    found = stats.contrast(one.effect[:, kept], control.effect[:, kept], members)
    low, high = found.interval()
    return {
        "versus_control": finite(found.mean),
        "versus_control_low": finite(low),
        "versus_control_high": finite(high),
        "versus_control_p": finite(found.p_value()),
    }
