"""Nodes of data and of what is learned from them: recipes, what these are made from, fits, and teachers that speak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.canonical import canonical, identity_of, plain_of
from experiments.dataset import Derived, Ingredient, Recipe
from experiments.intervention import Intervention
from experiments.speech import SHARD, Speech, Teacher
from experiments.training import Trained
from experiments.verdicts import JudgeFilter
from orchestrator.filters import Sitting, key
from orchestrator.identity import Shared

Add = Callable[[str, Mapping[str, Any], Mapping[str, str], str, Mapping[str, Any]], str]
"""(stage, params, inputs, label, runtime) -> key of the node, added where it is new."""


@dataclass(frozen=True)
class Who:
    """A subject: what identifies it, and how to load it."""

    identity: Shared
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """An intervention as nodes hold it."""

    name: str
    intervention: Intervention
    identity: Mapping[str, Any]
    """method, version, settings."""
    settings: Mapping[str, Any]
    label: str

    @classmethod
    def of(cls, name: str, version: int, intervention: Intervention) -> Method:
        """With everything made from the intervention itself."""
        identity = {"method": name, "version": version, "settings": identity_of(intervention)}
        return cls(name, intervention, identity, plain_of(intervention), intervention.label())


class Supplies:
    """Adds nodes through `add`. `others` are the subjects that teachers name, by their settings as text; `sittings` the
    judges of what teachers say, by `filters.key`; `students` is how many may learn in one batch."""

    def __init__(self, add: Add, others: Mapping[str, Who], sittings: Mapping[str, Sitting], students: int = 1) -> None:
        self.add = add
        self.others = others
        self.sittings = sittings
        self.students = students
        self._places: dict[str, int] = {}

    def dataset(self, name: str, recipe: Recipe, identity: Mapping[str, Any], seed: int, who: Who) -> str:
        """Key of a dataset, whose sources come first."""
        params = {**identity, "seed": seed}
        if recipe.needs_subject:
            params["subject"] = who.identity
        inputs = self._sources(recipe, seed, who) if isinstance(recipe, Derived) else {}
        spec = who.spec if recipe.needs_subject else None
        runtime = {"subject": spec, "recipe": name, "settings": plain_of(recipe)}
        return self.add("dataset", params, inputs, recipe.label(), runtime)

    def ingredient(self, part: Ingredient, seed: int, who: Who) -> str:
        """Key of the dataset that a recipe names inside another one's settings."""
        identity = {"recipe": part.recipe, "version": part.version, "settings": identity_of(part.settings)}
        return self.dataset(part.recipe, part.settings, identity, seed, who)

    def _sources(self, recipe: Derived, seed: int, who: Who) -> dict[str, str]:
        """Role -> key: `from/NAME` of a dataset, `said/NAME/003` of a shard of what a teacher said, `judged/NAME/003`
        of the verdicts on it."""
        inputs = {}
        for name, source in recipe.sources().items():
            if isinstance(source, Speech):
                for number, shard in enumerate(self.speech(source, seed, who)):
                    inputs[f"said/{name}/{number:03d}"] = shard
                    if source.judge is not None:
                        inputs[f"judged/{name}/{number:03d}"] = self.verdicts(source.judge, source.teacher, shard, who)
            else:
                inputs[f"from/{name}"] = self.ingredient(source, seed, who)
        return inputs

    def speech(self, source: Speech, seed: int, who: Who) -> list[str]:
        """Keys of the shards in which a teacher answers."""
        teacher = source.teacher
        speaker = self._speaker(teacher, who)
        params: dict[str, Any] = {"system": teacher.system, "sampling": identity_of(source.sampling), "seed": seed}
        params["subject"] = speaker.identity if teacher.model is None else {"model": teacher.model}
        if teacher.by != "engine":
            params["by"] = teacher.by
        inputs: dict[str, str] = {}
        runtime: dict[str, Any] = {"subject": speaker.spec, "model": teacher.model, "method": None, "settings": None}
        runtime["size"] = source.size
        if teacher.intervention is not None:
            params["dose"] = teacher.dose
            inputs["state"], runtime["method"], runtime["settings"] = self._teaching(teacher, seed, speaker)
        keys = []
        for first in range(0, source.size, SHARD):
            count = min(SHARD, source.size - first)
            inputs["asks"] = self.ingredient(asks_of(source, first + count), seed, who)
            keys.append(
                self.add("generate", {**params, "first": first, "count": count}, {**inputs}, teacher.name, runtime)
            )
        return keys

    def verdicts(self, judge: JudgeFilter, teacher: Teacher, said: str, who: Who) -> str:
        """Key of what judges say of a shard."""
        sitting = self.sittings[key(judge)]
        runtime = {**sitting.runtime, "subject": teacher.model or self._speaker(teacher, who).spec["model"]}
        return self.add("judge", sitting.params, {"said": said}, f"{judge.role} {teacher.name}", runtime)

    def _speaker(self, teacher: Teacher, who: Who) -> Who:
        """The subject that answers: the experiment's, unless the teacher has one of its own."""
        return who if teacher.subject is None else self.others[teacher.subject.model_dump_json()]

    def _teaching(self, teacher: Teacher, seed: int, who: Who) -> tuple[str, str, Mapping[str, Any]]:
        """Key of what the teacher learned, its method and settings."""
        part = teacher.intervention
        if part is None:
            raise TypeError(f"teacher {teacher.name} learned nothing")
        keys = {each.settings.provides: self.ingredient(each, seed, who) for each in teacher.data}
        roles = part.settings.takes(keys)
        method = replace(Method.of(part.method, part.version, part.settings), label=f"{teacher.name}, a teacher")
        return self.fit(method, roles_of({role: keys[role] for role in roles}), seed, who), method.name, method.settings

    def fit(self, method: Method, data: Mapping[str, str], seed: int, who: Who) -> str:
        """Key of a fit; where the method has settings that are only applied, it takes over a shared one."""
        params = {"subject": who.identity, **method.identity, "seed": seed}
        inputs = dict(data)
        runtime: dict[str, Any] = {"subject": who.spec, "method": method.name, "settings": method.settings}
        if method.intervention.reads:
            runtime["reads"] = method.intervention.reads
        if self.students > 1 and isinstance(method.intervention, Trained) and method.intervention.joins:
            place = self._places.setdefault(canonical([params, inputs]), len(self._places))
            runtime["class"] = place // self.students
        applied = method.intervention.applied
        if applied:
            own = {name: value for name, value in method.identity["settings"].items() if name not in applied}
            found = {name: value for name, value in method.settings.items() if name not in applied}
            label = f"{method.label} (shared)"  # the first trial's: where the fit fails, it names one
            shared = self.add("fit", {**params, "settings": own}, inputs, label, {**runtime, "settings": found})
            inputs = {**inputs, "fit": shared}
        return self.add("fit", params, inputs, method.label, runtime)


def asks_of(source: Speech, last: int) -> Ingredient:
    """The asks from which the shard that ends at `last` takes its own: those of every size that reaches so far.

    Recipes whose first asks stay the same when there are to be more are asked for 256, 512, 1,024, ... of them, so that
    a larger draw leaves what was said before as it is.
    """
    settings = source.asks.settings
    if not settings.grows:
        return source.asks
    n = SHARD
    while n < last:
        n *= 2
    return source.asks.model_copy(update={"settings": settings.model_copy(update={"n": n})})


def roles_of(keys: Mapping[str, str]) -> dict[str, str]:
    """Kind -> key of a fit's data, as its inputs: `data`, or `data/KIND` where it takes several kinds."""
    if len(keys) == 1:
        return {"data": next(iter(keys.values()))}
    return {f"data/{kind}": key for kind, key in keys.items()}
