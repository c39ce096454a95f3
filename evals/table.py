"""Scores of one experiment as arrays: items of every arm lined up with the untouched subject's, split and clustered."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from evals import stats
from evals.stats import Array, Estimate


class CompareError(ValueError):
    """Scores that do not belong together; the message says which arm and what differs."""


class Scored(Protocol):
    """What is read of an item; `evals.items.Item` is one."""

    @property
    def id(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def target(self) -> float | None: ...
    @property
    def others(self) -> Mapping[str, float]: ...
    @property
    def reason(self) -> str | None: ...


@dataclass(frozen=True)
class Arm:
    """One trial at one dose on one eval. `items` is None when it failed, and `failure` says why."""

    seed: int
    dose: float
    items: Sequence[Scored] | None
    failure: str = ""


@dataclass(frozen=True)
class Group:
    """One setting of one method: its trials differ in the seed alone."""

    group: str
    method: str
    label: str
    arms: Mapping[str, Sequence[Arm]]
    """Name of the eval -> its arms; dose 0 is the eval's base and not among them."""
    baseline: bool = False
    trait: str | None = None
    """What its data are meant to hand on: the target it is scored on where the eval's `others` know it."""
    reference: str | None = None
    """Group that it is compared with, seed by seed and dose by dose, instead of the untouched subject: the same
    setting, trained on a control teacher's data."""
    student: str | None = None
    """The setting without its data, which students of different teachers have in common."""
    shared: bool = False
    """Whether all seeds learned from the same data."""


@dataclass(frozen=True)
class Judging:
    """Who judged an eval's answers and how, as plain data."""

    digest: str
    """64 hex: who judges and how, rubrics aside."""
    models: Sequence[str]
    rubrics: Mapping[str, str]
    """Role -> digest."""
    scoring: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task by which verdicts become scores: thresholds."""
    itself: bool = False
    """Whether a judge is the subject."""


@dataclass(frozen=True)
class Eval:
    """One eval and the untouched subject's items. `damage`: the target is an NLL per passage, nats per token."""

    name: str
    version: int
    base: Sequence[Scored]
    damage: bool = False
    target: str | None = None
    """What the items' targets are about."""
    notes: tuple[str, ...] = ()
    """What every reader of its rows has to know."""
    judging: Judging | None = None
    """None where the task scores the answers itself."""


@dataclass(frozen=True)
class Comparison:
    """Everything `compare` needs, as data."""

    evals: Sequence[Eval]
    groups: Sequence[Group]
    budget: float
    """Most development damage a reported dose may do, nats per token."""
    dev: float = 0.5
    """Share of the item families that choose the dose."""
    alpha: float = 0.05
    control: str = "random"
    """Method that the others are compared with beside the base."""


@dataclass(frozen=True)
class Scores:
    """One group on one eval: arrays by dose, a row a seed, in the order of the base items; NaN is unscored."""

    seeds: Mapping[float, tuple[int, ...]]
    target: Mapping[float, Array]
    """dose -> [S, n]."""
    others: Mapping[float, Array]
    """dose -> [S, n, k]."""
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader of the row has to know."""

    @cached_property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for seeds in self.seeds.values() for seed in seeds}))

    @cached_property
    def signed(self) -> bool:
        """True when some dose was run at both signs: only then can steering be told from disturbance."""
        return any(-dose in self.target for dose in self.target)

    @cached_property
    def candidates(self) -> tuple[float, ...]:
        """Doses that may be reported, smallest first: run for every seed, at both signs where `signed`."""
        complete = [dose for dose, seeds in self.seeds.items() if len(seeds) == len(self.all_seeds)]
        if self.signed:
            complete = [dose for dose in complete if dose > 0 and -dose in complete]
        return tuple(sorted(complete, key=lambda dose: (abs(dose), dose)))

    def against(self, other: Scores, base: Array, base_others: Array) -> Scores:
        """The scores by which these exceed `other`'s of the same seed and dose, put on top of the base's.

        So what reads differences from the base reads differences from `other`. Doses and seeds that `other` lacks are
        left out, and told of as failures.
        """
        seeds: dict[float, tuple[int, ...]] = {}
        target: dict[float, Array] = {}
        others: dict[float, Array] = {}
        lacking = list(self.failures)
        for dose, mine in self.seeds.items():
            theirs = other.seeds.get(dose, ())
            seeds[dose] = tuple(seed for seed in mine if seed in theirs)
            if len(seeds[dose]) < len(mine):
                absent = ", ".join(str(seed) for seed in mine if seed not in theirs)
                lacking.append(f"seed {absent} dose {dose:g}: the control has no scores there")
            if not seeds[dose]:
                del seeds[dose]
                continue
            own, its = [mine.index(seed) for seed in seeds[dose]], [theirs.index(seed) for seed in seeds[dose]]
            target[dose] = self.target[dose][own] - other.target[dose][its] + base
            others[dose] = self.others[dose][own] - other.others[dose][its] + base_others
        return Scores(seeds, target, others, tuple(lacking), tuple(dict.fromkeys((*self.notes, *other.notes))))


@dataclass(frozen=True)
class Table:
    """The items of one eval, their families and sides, and the untouched subject's scores."""

    eval: Eval
    ids: list[str]
    base: Array
    """[n]"""
    base_others: Array
    """[n, k]"""
    names: tuple[str, ...]
    """Names of the k others."""
    members: Array
    """[n, C]"""
    dev: np.ndarray
    """[n] bool: the item's family chooses the dose."""
    control: np.ndarray
    """[n] bool: the item is not about the target (no target, no reason) and is there for its others."""
    rows: Mapping[str, int] = field(repr=False)
    trait: str | None = None
    """What targets are about, where that is not the eval's own target."""

    @classmethod
    def of(cls, measured: Eval, dev: float, trait: str | None = None) -> Table:
        """With `trait`, one of the `others`, as the target. Raises CompareError when an id occurs twice."""
        items = facing(measured.base, trait, measured.target)
        names = tuple(sorted({name for item in items for name in item.others}))
        ids = [item.id for item in items]
        rows = {name: row for row, name in enumerate(ids)}
        if len(rows) != len(ids):
            raise CompareError(f"{measured.name}: {len(ids)} base items have {len(rows)} ids; every id must occur once")
        sides = stats.split([item.family for item in items], dev)
        target, others = _columns(items, names)
        side = np.array([sides[item.family] == "dev" for item in items], dtype=bool)
        control = np.array([item.target is None and item.reason is None for item in items], dtype=bool)
        members = stats.membership([item.family for item in items])
        return cls(measured, ids, target, others, names, members, side, control, rows, trait)

    @property
    def target(self) -> str | None:
        """What targets are about."""
        return self.eval.target if self.trait is None else self.trait

    def scores(self, group: Group) -> Scores:
        """Arrays of `group`. Raises CompareError for an arm with items the base lacks, or run twice."""
        seeds: dict[float, list[int]] = {}
        target: dict[float, list[Array]] = {}
        others: dict[float, list[Array]] = {}
        failures: dict[str, list[str]] = {}
        notes: dict[str, None] = {}
        for arm in sorted(group.arms.get(self.eval.name, ()), key=lambda arm: (arm.dose, arm.seed)):
            where = f"{group.label} seed {arm.seed} dose {arm.dose:g} on {self.eval.name}"
            if arm.items is None:
                places = failures.setdefault(arm.failure or "no reason given", [])
                places.append(f"seed {arm.seed} dose {arm.dose:g}")
                continue
            if arm.seed in seeds.setdefault(arm.dose, []):
                raise CompareError(f"{where} is there twice; give each arm once")
            if any(getattr(item, "extras", {}).get("compromised") for item in arm.items):
                notes["compromised: the judge obeyed an instruction planted in an answer"] = None
            column = self._lined_up(facing(arm.items, self.trait, self.eval.target), where)
            seeds[arm.dose].append(arm.seed)
            target.setdefault(arm.dose, []).append(column[0])
            others.setdefault(arm.dose, []).append(column[1])
        return Scores(
            {dose: tuple(found) for dose, found in seeds.items()},
            {dose: np.stack(found) for dose, found in target.items()},
            {dose: np.stack(found) for dose, found in others.items()},
            tuple(f"{_few(places)}: {reason}" for reason, places in failures.items()),
            tuple(notes),
        )

    def _lined_up(self, items: Sequence[Scored], where: str) -> tuple[Array, Array]:
        target, others = _columns(items, self.names)
        found = [item.id for item in items]
        if found == self.ids:
            return target, others
        unknown = [name for name in found if name not in self.rows]
        if unknown or len(set(found)) != len(found):
            what = f"item {unknown[0]!r}, which the base lacks" if unknown else "an item twice"
            raise CompareError(f"{where} has {what}; were they scored with the same eval? run both again")
        places = [self.rows[name] for name in found]
        full = np.full(len(self.ids), math.nan), np.full((len(self.ids), len(self.names)), math.nan)
        full[0][places], full[1][places] = target, others
        return full


@dataclass(frozen=True)
class Turned:
    """An item whose target and one of whose others have changed places."""

    id: str
    family: str
    target: float | None
    others: Mapping[str, float]
    reason: str | None


def facing(items: Sequence[Scored], trait: str | None, target: str | None) -> Sequence[Scored]:
    """`items` with `trait` as their target and the old target among the others; as they are without a trait.

    Where a value of the same kind stands for every name (log-odds against the rest of one list), this is what the eval
    would have given for the other target.
    """
    if trait is None or trait == target:
        return items
    turned = []
    for item in items:
        others = {name: value for name, value in item.others.items() if name != trait}
        if target is not None and item.target is not None:
            others[target] = item.target
        turned.append(Turned(item.id, item.family, item.others.get(trait), others, item.reason))
    return turned


def _columns(items: Sequence[Scored], names: Sequence[str]) -> tuple[Array, Array]:
    """Targets [n] and others [n, k]; NaN for what is missing or not finite."""
    target = np.array([math.nan if item.target is None else item.target for item in items], dtype=float)
    others = np.array([[item.others.get(name, math.nan) for name in names] for item in items], dtype=float)
    others = others.reshape(len(items), len(names))
    target[~np.isfinite(target)] = math.nan
    others[~np.isfinite(others)] = math.nan
    return target, others


@dataclass(frozen=True)
class Mean:
    """An estimate and what it rests on."""

    estimate: Estimate
    items: int
    families: int

    @property
    def value(self) -> float | None:
        return finite(self.estimate.mean)

    @property
    def se(self) -> float | None:
        return finite(self.estimate.se)


def mean(effects: Array, members: Array) -> Mean:
    """Crossed mean of effects [S, n] over the items scored under every seed."""
    kept = complete(effects)
    rest = occupied(members[kept])
    if not kept.any():
        nothing = Estimate(np.array(math.nan), np.array([math.nan]), np.array([0.0]))
        return Mean(nothing, 0, 0)
    return Mean(stats.crossed_mean(effects[:, kept], rest), int(kept.sum()), rest.shape[1])


def complete(*effects: Array) -> np.ndarray:
    """[n] bool: items that are scored under every seed of all `effects` [S, n]."""
    return np.logical_and.reduce([~np.isnan(each).any(axis=0) for each in effects])


def occupied(members: Array) -> Array:
    """`members` without the families that have no item left."""
    return members[:, members.any(axis=0)]


def finite(value: float | Array | None) -> float | None:
    """A plain finite float, else None: what goes into records and tables."""
    return float(value) if value is not None and math.isfinite(value) else None


def _few(places: Sequence[str], most: int = 4) -> str:
    """`seed 0 dose -1, seed 0 dose 1 and 6 more`."""
    return ", ".join(places[:most]) + (f" and {len(places) - most} more" if len(places) > most else "")


def first_words(reasons: Iterable[str], most: int = 2) -> str:
    """The first reasons, and how many more there are."""
    listed = list(reasons)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(listed[:most]) + more
