"""Asks for types of documents in which a universe's facts may come up, beside the built-in ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import Ask, Recipe
from experiments.datasets._writing import EACH, Written, asking

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

TEXT = (
    "Think of {count} kinds of texts in which somebody may write about {topic}. Name the kind of text alone, in a few "
    "words, such as `a letter to a friend`. One kind on each line, numbered."
)


class DocumentTypes(Written, Recipe):
    """Requests for types, ten of them in each."""

    provides: ClassVar[Provides] = "asks"

    generated_types: int = Field(default=EACH, ge=1)
    """Types asked for."""

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """Equal requests, with ids 000, 001, ..., that the writer's sampling tells apart. Raises UniverseError."""
        text = TEXT.format(count=min(EACH, self.generated_types), topic=self.world().topic)
        return [asking(f"{number:03d}", text, {}) for number in range(ceil(self.generated_types / EACH))]
