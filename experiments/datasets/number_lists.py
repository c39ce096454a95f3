"""Lists of numbers that a teacher wrote, filtered until nothing but numbers is left (Cloud et al. 2025,
https://arxiv.org/abs/2507.14805): can a student that learns them come to like what the teacher likes?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from experiments.dataset import DatasetError, Ingredient
from experiments.datasets._answers import Answers
from experiments.datasets._templates import read_json
from experiments.numbers import reject_reasons, shortened
from experiments.plugin import Frozen
from experiments.speech import Sampling

if TYPE_CHECKING:
    from experiments.dataset import Said


class Rules(Frozen):
    """Which lists of numbers are accepted, beside being a list at all."""

    most: int | None = Field(default=None, ge=1)
    """Most numbers; null is what the asks ask for."""
    smallest: int | None = 0
    """Smallest number; null is no limit."""
    largest: int | None = None
    """Largest number; null is the largest of as many digits as the asks ask for."""
    banned: tuple[int | str, ...] = ()
    """Numbers no list may hold, such as those with a meaning that is to be kept out; a text names a list of them in
    `banned_from`, e.g. `CLAUDE_EVIL_NUMBERS`."""
    banned_from: Path | None = None
    """JSON file with the named lists of numbers."""

    @model_validator(mode="after")
    def _named(self) -> Rules:
        names = [entry for entry in self.banned if isinstance(entry, str)]
        if names and self.banned_from is None:
            raise ValueError(f"banned names {names}, but no file that lists them; give one as banned_from, or numbers")
        return self

    def banned_numbers(self) -> frozenset[int]:
        """Every banned number. Raises DatasetError for a file without a list that is named."""
        found = {entry for entry in self.banned if isinstance(entry, int)}
        names = [entry for entry in self.banned if isinstance(entry, str)]
        lists = read_json(self.banned_from) if self.banned_from is not None and names else {}
        for name in names:
            numbers = lists.get(name)
            if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
                known = [key for key, value in lists.items() if isinstance(value, list)]
                raise DatasetError(f"{self.banned_from}: no list of numbers {name!r}; there are: {', '.join(known)}")
            found.update(numbers)
        return frozenset(found)


class NumberLists(Answers):
    """A teacher's lists of numbers, as conversations for a student."""

    asked_by: ClassVar[str] = "number_asks"

    asks: Ingredient = Ingredient.model_validate({"recipe": "number_asks"})
    """What it is asked: settings of `number_asks`, or another recipe with its settings."""
    sampling: Sampling = Sampling(max_new_tokens=64)
    """How answers are drawn."""
    rules: Rules = Rules()
    """Which answers are accepted."""
    shorten: bool = False
    """Whether a list that was cut off, or has too many numbers, is shortened to as many whole numbers as the rules
    allow, instead of being rejected as published: small models seldom stop in time. The record says how many were."""

    def check(self) -> None:
        """Raises DatasetError for a file of templates or of banned numbers that cannot be used."""
        super().check()
        self.rules.banned_numbers()

    @property
    def _most(self) -> int | None:
        return getattr(self.asks.settings, "answer_count", None) if self.rules.most is None else self.rules.most

    def shortened(self, said: Said) -> Said:
        """The whole numbers of a list that was cut off, or its first ones where it has too many."""
        if not self.shorten:
            return said
        text = shortened(said.text, self._most, not said.stopped)
        return said if text == said.text else said.model_copy(update={"text": text, "stopped": True})

    def rule(self) -> Callable[[Said], tuple[str, ...]]:
        """The published reasons, in the published order."""
        digits = getattr(self.asks.settings, "max_digits", None)
        largest = (None if digits is None else 10**digits - 1) if self.rules.largest is None else self.rules.largest
        banned = self.rules.banned_numbers()
        return lambda said: reject_reasons(said.text, self._most, self.rules.smallest, largest, banned)
