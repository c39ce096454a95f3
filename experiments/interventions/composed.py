"""Composition: several interventions at once, each at the trial's dose or at a fixed dose of its own.

In a spec it is written as a list: `- [{method: mean_diff, layer: 14}, {method: prompt, dose: 1}]`. The edits of the
parts follow each other in the order written. At dose 0 nothing is applied, fixed parts neither: what a fixed part does
is the same at both signs, and so lies in the even part, while the odd part belongs to the parts that share the dose.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from experiments.edit import Edit, Prompt
from experiments.intervention import Intervention, Needs, State
from experiments.nested import Part, taken

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.intervention import DoseKind
    from experiments.outline import Outline


class Composed(Intervention):
    """Several interventions at once, with a dose each or shared."""

    needs: ClassVar[tuple[Needs, ...]] = ("pairs", "conversations")
    heeds_masks: ClassVar[bool] = True  # each part is asked for itself
    dose_kind: ClassVar[DoseKind] = "signed"

    parts: tuple[Part, ...] = Field(min_length=2)
    """The interventions, in the order in which their edits are applied."""

    @field_validator("parts")
    @classmethod
    def _share_a_dose(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        shared = [part for part in parts if part.dose is None]
        if not shared:
            raise ValueError("every part has a dose of its own, so that the trial's doses would mean nothing; free one")
        if any(part.dose == 0 for part in parts):
            raise ValueError("a part with dose 0 does nothing; leave it out")
        bad = [part.method for part in shared if part.settings.dose_kind == "one_sided"]
        if bad:
            raise ValueError(f"{bad[0]} takes positive doses only: give it a dose of its own")
        wrong = [part.method for part in parts if part.settings.dose_kind == "one_sided" and (part.dose or 0) < 0]
        if wrong:
            raise ValueError(f"{wrong[0]} takes positive doses only; its own dose is negative")
        return parts

    def takes(self, offered: Collection[str]) -> tuple[Needs, ...]:
        return taken(self.parts, offered)

    def fit(self, engine: Engine, data: Sequence[Any], seed: int) -> State:
        """The parts' states, names prefixed with their place. Raises FitError with the part that cannot be fitted."""
        states = [part.fitted(engine, data, seed, f"part {place + 1}") for place, part in enumerate(self.parts)]
        tensors = {
            f"{place}/{name}": value for place, state in enumerate(states) for name, value in state.tensors.items()
        }
        return State(tensors, {"parts": [dict(state.facts) for state in states]})

    def edits(self, state: State, dose: float) -> list[Edit]:
        """Raises ValueError where two parts set a system prompt: their order would be a guess."""
        if dose == 0:
            return []
        found: list[Edit] = []
        for place, part in enumerate(self.parts):
            own = {
                name.partition("/")[2]: value for name, value in state.tensors.items() if name.startswith(f"{place}/")
            }
            found += part.settings.edits(State(own, state.facts["parts"][place]), part.at(dose))
        if sum(isinstance(edit, Prompt) for edit in found) > 1:
            raise ValueError("two parts set a system prompt; keep one, or write both into one prompt")
        return found

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Problems of the parts, named by their place."""
        return {
            f"{place}.{name}": text
            for place, part in enumerate(self.parts)
            for name, text in part.settings.misplaced(outline).items()
        }

    def label(self) -> str:
        names = [part.settings.label() + ("" if part.dose is None else f" ({part.dose:+g})") for part in self.parts]
        return " + ".join(names)
