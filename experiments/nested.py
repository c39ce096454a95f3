"""An intervention inside another one's settings: what composition and wrappers are made of."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import SerializeAsAny, model_validator

from experiments.contrast import FitError
from experiments.dataset import kind_of
from experiments.intervention import Intervention, Needs, State, method, refuse_masks
from experiments.plugin import Frozen

if TYPE_CHECKING:
    from experiments.engine import Engine


def taken(parts: Iterable[Part], offered: Collection[str]) -> tuple[Needs, ...]:
    """The kinds of data that the parts read, of those on offer. Raises NeedsError where one of them has none."""
    return tuple(dict.fromkeys(kind for part in parts for kind in part.settings.takes(offered)))


class Part(Frozen):
    """One of the interventions."""

    method: str
    """Its method."""
    version: int = 1
    """The method's version, which enters the key."""
    dose: float | None = None
    """A dose of its own, whatever the trial's; null takes the trial's."""
    settings: SerializeAsAny[Intervention]
    """Its settings; written beside `method` and `dose`."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """Settings beside the method's name, or what a Part was written as, become the method's own class."""
        if not isinstance(data, dict) or isinstance(data.get("settings"), Intervention):
            return data
        made = method(str(data.get("method")))
        own = data.get("settings")
        if own is None:
            own = {name: value for name, value in data.items() if name not in ("method", "dose", "version")}
        return {
            "method": data.get("method"),
            "version": made.version,
            "dose": data.get("dose"),
            "settings": made.model_validate(own),
        }

    def fitted(self, engine: Engine, data: Sequence[Any], seed: int, place: str) -> State:
        """What its fit learns of the kinds of data that it takes.

        Raises FitError, in which the part is named, for whatever its own settings raise.
        """
        try:
            wanted = self.settings.takes({kind_of(each) for each in data})
            own = [each for each in data if kind_of(each) in wanted]
            refuse_masks(self.settings, own)
            return self.settings.fit(engine, own, seed)
        except ValueError as error:
            raise FitError(f"{place}, {self.settings.label()}: {error}") from error

    def at(self, dose: float) -> float:
        """The part's dose where the trial's is `dose`."""
        return dose if self.dose is None else self.dose
