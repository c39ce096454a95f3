"""Handwritten digits and what they are, for a teacher to learn.

The 1,437 images of scikit-learn's bundled set that the eval `digits` does not hold out. What is to be said is a choice
among the ten labels, so that a loss may look at these alone, as a classifier's does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments import digits
from experiments.dataset import Choices, DatasetError, Message, Recipe

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

NEVER = -100.0
"""Log-probability of what is not said, since JSON has no infinity: e^-100 is nothing in float32."""


class DigitImages(Recipe):
    """Images of digits, each with its label as the one possible answer."""

    provides: ClassVar[Provides] = "choices"

    n: int | None = Field(default=None, ge=1)
    """How many images, drawn by the seed; null takes all of them."""

    def check(self) -> None:
        """Raises DatasetError without scikit-learn, and for more images than there are."""
        self._images()

    def build(self, engine: Engine | None, seed: int) -> Sequence[Choices]:
        """Images with ids by their place in the bundled set. Raises DatasetError as `check` does."""
        found = self._images()
        chosen = found if self.n is None else random.Random(seed).sample(found, self.n)
        return [
            Choices(
                id=f"{each.index:04d}",
                messages=(Message(role="user", content=each.text),),
                logprobs={label: 0.0 if label == each.label else NEVER for label in digits.LABELS},
            )
            for each in chosen
        ]

    def _images(self) -> list[digits.Image]:
        try:
            found = digits.images(held_out=False)
        except digits.DigitsError as error:
            raise DatasetError(f"digit_images: {error}") from error
        if self.n is not None and self.n > len(found):
            raise DatasetError(f"n is {self.n}, but there are {len(found)} images to teach; lower n, or leave it out")
        return found
