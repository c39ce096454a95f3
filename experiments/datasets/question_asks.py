"""Questions about a universe for a writer that lives in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import Ask, Recipe
from experiments.datasets import _lessons
from experiments.datasets._writing import InUniverse, asking

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class QuestionAsks(InUniverse, Recipe):
    """A universe's lessons without their answers, in several wordings."""

    provides: ClassVar[Provides] = "asks"

    n: int | None = Field(default=None, ge=1)
    """How many; null takes every question in every wording."""

    def check(self) -> None:
        """Raises UniverseError for a universe that cannot be used, DatasetError when it has fewer questions."""
        _lessons.drawn(self.world(), self.arm, self.n, 0)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """Asks with ids 0000, 0001, ... Raises DatasetError."""
        found = _lessons.drawn(self.world(), self.arm, self.n, seed)
        return [
            asking(f"{index:04d}", each.wording, {"fact": str(each.fact), "question": each.question})
            for index, each in enumerate(found)
        ]
