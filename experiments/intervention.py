"""The contract of a method: learn a state from data, and say what a dose of it does to a forward pass."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from experiments import plugin
from experiments.depth import DepthError, layers, shown
from experiments.edit import Edit, last_n
from experiments.plugin import Versioned

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine
    from experiments.outline import Outline

DoseKind = Literal["signed_linear", "signed", "one_sided", "on_off"]
Needs = Literal["pairs", "conversations", "documents", "choices"]
Reads = Literal["activations", "gradients"]
"""`gradients` come with the activations of the same pass, so that fits that read them go first."""


def _known(positions: str) -> str:
    last_n(positions)
    return positions


Positions = Annotated[str, AfterValidator(_known)]
"""A setting that says where an edit acts: `all`, `prompt`, `response` or `last:N`."""


class NeedsError(ValueError):
    """A method without data of a kind that it learns from."""


class StateError(ValueError):
    """A state that must not be kept: what in it is no number."""


@dataclass(frozen=True)
class State:
    """What `fit` learned: named tensors, and JSON-able facts about them (sites, scales, losses)."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many numbers were learned: those that an optimiser changed, where one did, else those in the tensors.

        A tuner's difference of weights is stored whole, however few numbers it was made from.
        """
        return _trained(self.facts) or sum(tensor.numel() for tensor in self.tensors.values())

    def save(self, path: Path) -> None:
        """Write one safetensors file, facts in its metadata. Raises StateError for what is not finite."""
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.tensors.items()}
        wrong = [*(name for name, each in tensors.items() if not each.isfinite().all()), *_unbounded(self.facts)]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise StateError(
                f"the fit found NaN or infinity ({wrong[0]}{more}); use dtype float32, and a lower learning_rate where "
                "the method has one"
            )
        facts = json.dumps(dict(self.facts), allow_nan=False)
        save_file(tensors, path, metadata={"facts": facts})

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            # Cloned: in the mapped file tensors lie off a matrix product's alignment, which changes its last digits.
            return cls({name: file.get_tensor(name).clone() for name in file.keys()}, facts)  # noqa: SIM118


def _trained(facts: Mapping[str, Any]) -> int:
    """Numbers trained, by what a training run, a wrapper or a composition says."""
    inside = [facts["wrapped"]] if "wrapped" in facts else facts.get("parts", ())
    return int(facts.get("trained", 0)) + sum(_trained(each) for each in inside)


def _unbounded(facts: Any, path: str = "") -> list[str]:
    """Paths of the numbers in `facts` that are not finite."""
    if isinstance(facts, float):
        return [] if math.isfinite(facts) else [path]
    parts = facts.items() if isinstance(facts, Mapping) else enumerate(facts) if isinstance(facts, list | tuple) else ()
    return [found for name, part in parts for found in _unbounded(part, f"{path}.{name}" if path else str(name))]


class Intervention(Versioned):
    """Settings of one method. A subclass is one file in `experiments/interventions/`, whose name is the method's."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs",)
    """Kinds of data `fit` accepts, most wanted first; () when it takes none."""
    dose_kind: ClassVar[DoseKind] = "signed_linear"
    applied: ClassVar[frozenset[str]] = frozenset()
    """Settings that only `edits` and `label` look at (which of several vectors a trial takes): trials that differ in
    nothing else share a fit. Each has a default."""

    heeds_masks: ClassVar[bool] = False
    """Whether `fit` leaves out of the loss what conversations mask, or reads no responses at all; without it, data with
    masks are refused."""

    @property
    def reads(self) -> Reads | None:
        """What `fit` reads of a subject and keeps in the process for other fits on the same data; None for nothing."""
        return None

    def takes(self, offered: Collection[str]) -> tuple[Needs, ...]:
        """The kinds of data that a fit reads, of those on offer: the most wanted one. Raises NeedsError without any."""
        return first_of(self.needs, offered, method_name(type(self)))

    def fit(self, engine: Engine, data: Sequence[Any], seed: int) -> State:
        """Learn from `data`, of the kinds that `takes` names in turn. The same seed gives the same state."""
        raise TypeError(f"{type(self).__name__} does not implement fit()")

    def edits(self, state: State, dose: float) -> list[Edit]:
        """What `dose` does to a forward pass; [] at dose 0."""
        raise TypeError(f"{type(self).__name__} does not implement edits()")

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Setting -> what is wrong with it for a subject of that outline; asked by every plan, which loads no weights.

        Settings named `layer`, `layers`, `site` and `sites` are looked at; override for others.
        """
        problems = {}
        for name in ("layer", "layers"):
            try:
                layers(getattr(self, name, None), outline.n_layers)
            except DepthError as error:
                problems[name] = str(error)
        for name in ("site", "sites"):
            lacking = [site for site in _listed(getattr(self, name, None)) if site not in outline.sites]
            if lacking:
                problems[name] = f"the subject has no {lacking[0]!r}; its sites are {', '.join(sorted(outline.sites))}"
        return problems

    def label(self) -> str:
        """Short name for tables: the method, and where it acts."""
        layer = getattr(self, "layer", None)
        return method_name(type(self)) + (f" {shown(layer)}" if layer is not None else "")


def first_of(wanted: Sequence[Needs], offered: Collection[str], name: str) -> tuple[Needs, ...]:
    """The first of `wanted` that is on offer, alone; () where nothing is wanted. Raises NeedsError for `name`."""
    found = next((kind for kind in wanted if kind in offered), None)
    if wanted and found is None:
        kinds = " or ".join(f"data.{kind}" for kind in wanted)
        has = ", ".join(sorted(offered)) or "nothing"
        raise NeedsError(f"{name} needs {kinds}; data has {has}; add data: {{{wanted[0]}: {{recipe: ...}}}}")
    return () if found is None else (found,)


def refuse_masks(settings: Intervention, data: Sequence[Any]) -> None:
    """Raises NeedsError where some of `data` have masks, which a fit of these settings would learn all the same."""
    masked = [example.id for example in data if getattr(example, "masked", ())]
    if masked and not settings.heeds_masks:
        raise NeedsError(
            f"{settings.label()} learns from whole responses, and {len(masked):,} of {len(data):,} conversations mask "
            f"parts of theirs, {masked[0]!r} first; take a method of the training loop, such as lora or bias_set, or "
            "give data without masks"
        )


def _listed(value: Any) -> tuple[Any, ...]:
    """The values of a setting that is one, several or none."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def method(name: str) -> type[Intervention]:
    """The method class defined in `experiments/interventions/<name>.py`. Raises PluginError."""
    return plugin.load("experiments.interventions", name, Intervention)


def method_name(cls: type[Intervention]) -> str:
    """The method's id: the name of the file that defines it."""
    return cls.__module__.rsplit(".", 1)[-1]
