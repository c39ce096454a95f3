"""Images of nothing: every pixel is ink or paper with the same chance. No answer to them is about a digit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import Ask, Message, Recipe
from experiments.digits import BLOCKS, SIDE, drawn

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class NoiseAsks(Recipe):
    """Random images in the form that the subject `digits` reads."""

    provides: ClassVar[Provides] = "asks"
    grows = True

    n: int = Field(default=1000, ge=1)
    """How many images; the first ones stay the same when there are to be more."""

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """`n` asks with ids 00000, 00001, ..."""
        rng = random.Random(seed)
        pictures = (drawn([rng.randrange(len(BLOCKS)) for _ in range(SIDE * SIDE)]) for _ in range(self.n))
        return [
            Ask(id=f"{index:05d}", messages=(Message(role="user", content=picture),))
            for index, picture in enumerate(pictures)
        ]
