"""Preventative steering: train with a vector added, evaluate without it.

During training h <- h + strength * v at the direction's own sites. What the vector already does need not be learned,
so that what is trained changes less along it (Chen et al. 2025, https://arxiv.org/abs/2507.21509, strength 5 at layer
20 of Qwen2.5-7B for a vector of response means). The opposite of `caft`, which takes the direction out.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from experiments.contrast import FitError
from experiments.edit import Add, Edit
from experiments.wrapping import Wrapped


class Preventative(Wrapped):
    """A trained intervention whose training has a vector added, as it is not afterwards."""

    strength: float = Field(default=1.0)
    """The direction's dose during training; negative steers against it."""

    def under(self, edits: Sequence[Edit]) -> list[Edit]:
        """The vectors. Raises FitError for a direction that adds none, and for strength 0."""
        other = next((edit for edit in edits if not isinstance(edit, Add)), None)
        if other is not None or not edits:
            what = f"acts by {type(other).__name__}" if other is not None else "does nothing at dose 1"
            raise FitError(f"{self.direction.method} {what}; preventative steering adds a vector: use e.g. mean_diff")
        if self.strength == 0:
            raise FitError("strength 0 steers nothing during training; use the wrapped intervention itself")
        return [Add(edit.site, self.strength * edit.vector, edit.positions) for edit in edits if isinstance(edit, Add)]
