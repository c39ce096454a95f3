"""Training on top of something that is taken away afterwards: what caft and preventative share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import field_validator

from experiments.intervention import Intervention, Needs, State, method_name
from experiments.nested import Part, taken
from experiments.training import Trained

if TYPE_CHECKING:
    from experiments.edit import Edit
    from experiments.engine import Engine
    from experiments.intervention import DoseKind
    from experiments.outline import Outline


class Wrapped(Intervention):
    """A trained intervention, and what is in force while it is trained. A subclass says how that acts."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")
    heeds_masks: ClassVar[bool] = True  # each part is asked for itself
    dose_kind: ClassVar[DoseKind] = "signed"

    wraps: Part
    """The trained intervention, e.g. {method: lora, rank: 8}."""
    direction: Part
    """What gives the direction, e.g. {method: mean_diff, layer: 14}, fitted on the spec's pairs (or from a file)."""

    @field_validator("wraps")
    @classmethod
    def _is_trained(cls, wraps: Part) -> Part:
        if not isinstance(wraps.settings, Trained):
            raise ValueError(f"{wraps.method} is not trained, so nothing can be in force meanwhile; wrap e.g. lora")
        return wraps

    @field_validator("wraps", "direction")
    @classmethod
    def _has_no_dose(cls, part: Part) -> Part:
        if part.dose is not None:
            raise ValueError(f"{part.method} takes no dose here: the trial's doses are those of what is trained")
        return part

    def takes(self, offered: Collection[str]) -> tuple[Needs, ...]:
        """What is trained on, and what the direction is found with."""
        return taken((self.wraps, self.direction), offered)

    def under(self, edits: Sequence[Edit]) -> list[Edit]:
        """What is in force during training, given the direction's edits at dose 1."""
        raise TypeError(f"{type(self).__name__} does not implement under()")

    def fit(self, engine: Engine, data: Sequence[Any], seed: int) -> State:
        """The wrapped intervention's state; fact `direction` is what was found of the direction.

        Raises FitError for a direction that these data cannot give or that is none, and what both parts raise.
        """
        from experiments.underlay import Underlaid

        found = self.direction.fitted(engine, data, seed, "direction")
        under = self.under(self.direction.settings.edits(found, 1.0))
        state = self.wraps.fitted(Underlaid(engine, under), data, seed, "wraps")
        return State(state.tensors, {"wrapped": dict(state.facts), "direction": dict(found.facts)})

    def edits(self, state: State, dose: float) -> list[Edit]:
        return self.wraps.settings.edits(State(state.tensors, state.facts["wrapped"]), dose)

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Problems of both parts, named by their setting."""
        return {
            f"{name}.{field}": text
            for name, part in (("wraps", self.wraps), ("direction", self.direction))
            for field, text in part.settings.misplaced(outline).items()
        }

    def label(self) -> str:
        return f"{method_name(type(self))} {self.wraps.settings.label()}, {self.direction.settings.label()}"
