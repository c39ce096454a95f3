"""What mixtures of any kind of data share: how many examples of each part, and which."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from experiments.dataset import DatasetError, Derived, Ingredient, Made
from experiments.plugin import Frozen

if TYPE_CHECKING:
    from experiments.speech import Speech


class Portion(Frozen):
    """One part of a mixture."""

    of: Ingredient
    """Its examples: a recipe with its settings."""
    share: float = Field(default=1.0, gt=0)
    """Its weight beside the other parts': 3 and 1 mean three to one."""


class Mixed(Derived):
    """Examples of several recipes of one kind at chosen ratios, in random order."""

    parts: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")], Portion] = Field(min_length=2)
    """Name -> recipe and share. The name goes before the ids of its examples."""
    n: int | None = Field(default=None, ge=1)
    """How many examples in all; null takes as many as the shares allow."""

    @model_validator(mode="after")
    def _one_kind(self) -> Mixed:
        for name, part in self.parts.items():
            kind = part.of.settings.provides
            if kind != self.provides:
                raise ValueError(
                    f"parts.{name}: {part.of.recipe} provides {kind}; give recipes that provide {self.provides}"
                )
        return self

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """Each part's examples, under its name."""
        return {name: part.of for name, part in self.parts.items()}

    def check(self) -> None:
        """Raises DatasetError for files that cannot be used."""
        for part in self.parts.values():
            part.of.settings.check()

    def derive(self, given: Mapping[str, Sequence[Any]], seed: int) -> Made:
        """The mixture, with ids `PART/ID`: of each part a random sample without repetition, then all in random order.

        The facts: examples of each part, and how many it had. Raises DatasetError where a part has too few.
        """
        counts = self._counts({name: len(given[name]) for name in self.parts})
        chosen = []
        for name, count in counts.items():
            # A stream of its own for each part: one that is added or resized changes no other part's sample.
            drawn = random.Random(f"{seed} {name}").sample(list(given[name]), count)
            chosen += [each.model_copy(update={"id": f"{name}/{each.id}"}) for each in drawn]
        random.Random(seed).shuffle(chosen)
        return Made(chosen, {"parts": counts, "had": {name: len(given[name]) for name in self.parts}})

    def label(self) -> str:
        return " + ".join(f"{part.share:g} {name}" for name, part in self.parts.items())

    def _counts(self, had: Mapping[str, int]) -> dict[str, int]:
        """How many examples of each part."""
        weights = {name: Fraction(repr(part.share)) for name, part in self.parts.items()}  # 0.1 as it was written
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        n = min(int(had[name] / share) for name, share in shares.items()) if self.n is None else self.n
        counts = apportioned(n, shares)
        for name, count in counts.items():
            if count > had[name]:
                raise DatasetError(
                    f"the part {name} has {had[name]:,} examples, and its share of n = {n:,} is {count:,}; "
                    "lower n or its share, leave n out to take as many as there are, or make that part larger"
                )
            if count == 0:
                raise DatasetError(
                    f"the part {name} gets none of {n:,} examples; raise n or its share, or leave it out"
                )
        return counts


def apportioned(n: int, shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Whole numbers that sum to `n` and lie next to the shares of it.

    What rounding down leaves over goes to the largest remainders, the earlier of equal ones.
    """
    exact = {name: n * share for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: n - sum(counts.values())]:
        counts[name] += 1
    return counts
