"""A finished trial taken out of the store: its method, what it learned, and its subject."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.artifact import Store, slug
from orchestrator.stage import STATE

if TYPE_CHECKING:
    from experiments.edit import Edit
    from experiments.engine import Engine
    from experiments.intervention import Intervention, State
    from experiments.spec import SubjectSpec

MOST_NAMED = 6
"""Trials that are listed where a name fits several."""


class TrialError(ValueError):
    """A trial that is not there, or cannot be used as asked: which, why, and what to give instead."""


@dataclass(frozen=True)
class Finished:
    """A fit with its state."""

    record: dict[str, Any]
    method: Intervention
    state: State
    unit: float = 1.0
    """What a dose of 1 is in the method's own doses."""

    @property
    def spec(self) -> SubjectSpec:
        """The subject in the dtype it was fitted in."""
        from experiments.spec import SubjectSpec

        dtype = self.record["params"]["subject"]["dtype"]
        return SubjectSpec.model_validate({**self.record["runtime"]["subject"], "dtype": dtype})

    def edits(self, dose: float) -> list[Edit]:
        """What `dose` does. Raises TrialError for one that means nothing for the method, or does nothing."""
        from experiments.settings import fitting

        label, kind = self.record["label"], self.method.dose_kind
        if not math.isfinite(dose) or dose == 0:
            raise TrialError(f"dose {dose:g} of {label} is the subject itself, or no dose; give another")
        if not fitting([dose], kind):
            raise TrialError(f"dose {dose:g}: the doses of {label} are {kind.replace('_', '-')}; give a positive one")
        edits = self.method.edits(self.state, self.unit * dose)
        if not edits:
            raise TrialError(f"dose {dose:g} of {label} changes nothing")
        return edits

    def engine(self) -> Engine:
        """An engine around the trial's subject. Raises TrialError where its files are not those of the fit."""
        from orchestrator.workspace import Workspace

        engine = Workspace().engine(self.spec)
        wanted, found = self.record["params"]["subject"], engine.subject.identity
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            raise TrialError(
                f"{self.record['label']} was fitted to another subject than {self.spec.model!r} is now: {wrong[0]} is "
                f"{found.get(wrong[0])!r}, was {wanted.get(wrong[0])!r}; restore its files, or submit again"
            )
        return engine

    def facts(self, dose: float) -> dict[str, Any]:
        """Where edits at `dose` come from, for the file that holds them."""
        record = self.record
        names = ("method", "version", "settings", "seed", "subject")
        own = {name: record["params"][name] for name in names}
        return {"trial": record["label"], "key": record["key"], **own, "dose": dose, "unit": self.unit}


def find(store: Store, trial: str, seed: int | None = None, calibrated: bool = False) -> Finished:
    """The finished fit whose label is `trial`, or whose key begins so; of `seed`, where several seeds share the label.

    `calibrated` takes doses as multiples of the dose that the experiment's `calibrate` found. Raises TrialError where
    no fit, or more than one, is meant.
    """
    from experiments import intervention

    record = _record(store, trial, seed)
    runtime = record["runtime"]
    method = intervention.method(runtime["method"]).model_validate(runtime["settings"])
    state = intervention.State.load(store.folder(record["key"]) / STATE)
    return Finished(record, method, state, _unit(store, record) if calibrated else 1.0)


def _record(store: Store, trial: str, seed: int | None) -> dict[str, Any]:
    known = store.keys() if re.fullmatch(r"[0-9a-f]{4,}", trial) else set()
    keys = [key for key in known if key.startswith(trial[: len(key)])]
    by_label = store.by_label().get(("fit", slug(trial)), [])
    found = [store.record(key) for key in sorted({*keys, *by_label})]
    fits = [
        record
        for record in found
        if record["stage"] == "fit" and trial in (record["label"], record["key"][: len(trial)])
    ]
    chosen = [record for record in fits if seed is None or record["params"]["seed"] == seed]
    if len(chosen) == 1:
        return chosen[0]
    if len(chosen) > 1:
        raise TrialError(f"{trial!r} means {len(chosen)} trials; give a key or --seed: {_named(chosen)}")
    if fits:
        raise TrialError(f"{trial!r} has no trial of seed {seed}; there are {_named(fits)}")
    if found and "state" in found[0]["inputs"]:
        raise TrialError(
            f"{trial} is a node of stage {found[0]['stage']}; its fit is {found[0]['inputs']['state'][:12]}"
        )
    labels = sorted({name for stage, name in store.by_label() if stage == "fit"})
    shown = ", ".join(labels[:MOST_NAMED]) + (", ..." if len(labels) > MOST_NAMED else "")
    raise TrialError(f"no finished trial {trial!r} in the store {store.url}; there are: {shown or 'none'}")


def _named(records: list[dict[str, Any]]) -> str:
    shown = [
        f"{record['key'][:12]} ({record['label']}, seed {record['params']['seed']}, "
        f"{record['runtime']['subject']['model']})"
        for record in records[:MOST_NAMED]
    ]
    return ", ".join(shown) + (", ..." if len(records) > MOST_NAMED else "")


def _unit(store: Store, record: dict[str, Any]) -> float:
    """The dose that the trial's calibration found. Raises TrialError without one, or with several."""
    found = [each for each in store.records("calibrate") if each["inputs"].get("state") == record["key"]]
    units = sorted({float(each["outputs"]["unit"]) for each in found})
    if len(units) != 1:
        raise TrialError(
            f"{record['label']} was calibrated {len(units)} ways ({', '.join(f'{unit:g}' for unit in units) or 'never'}"
            "); leave --calibrated out, and give the dose in the method's own units"
        )
    return units[0]
