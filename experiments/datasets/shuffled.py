"""Answers with their parts in another order: controls that keep what was said and break where it stood.

Shuffling within responses keeps which numbers an answer has; across responses it keeps only how often each occurs in
the whole dataset. Both weaken subliminal learning, the latter more (Cloud et al. 2025, https://arxiv.org/abs/2507.14805).
With all positions but one scrambled, what is still passed on can only come from that position.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import ne
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from experiments.dataset import Conversation, DatasetError, Derived, Ingredient, Made

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.speech import Speech

How = Literal["within_responses", "across_responses", "all_but_one"]
UNITS = {
    "number": re.compile(r"[0-9]+"),
    "word": re.compile(r"\S+"),
    "line": re.compile(r"[^\n]*[^\s][^\n]*"),
}
"""What changes place. Whatever stands between two of them stays, and with it the format."""


class Shuffled(Derived):
    """Conversations whose last answers are shuffled; prompts, ids and order of rows stay."""

    provides: ClassVar[Provides] = "conversations"
    is_control: ClassVar[bool] = True

    of: Ingredient
    """The conversations: a recipe with its settings."""
    how: How = "within_responses"
    """`within_responses`: each answer's units in another order. `across_responses`: the units of all answers are pooled
    and dealt out again, each answer as many as it had. `all_but_one`: as across, but those at `position` stay."""
    position: int = Field(default=0, ge=0)
    """The place that `all_but_one` leaves alone, from 0; answers too short to have it are scrambled whole."""
    unit: Literal["number", "word", "line"] = "number"
    """What is shuffled: runs of digits, words, or lines that are not blank."""

    @model_validator(mode="after")
    def _meant(self) -> Shuffled:
        if self.of.settings.provides != "conversations":
            raise ValueError(
                f"of: {self.of.recipe} provides {self.of.settings.provides}; give a recipe that provides conversations"
            )
        if self.how != "all_but_one" and self.position != 0:
            raise ValueError(f"position is read by how: all_but_one alone; got how: {self.how}; leave position out")
        return self

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The conversations, as `of`."""
        return {"of": self.of}

    def check(self) -> None:
        """Raises DatasetError for files that cannot be used."""
        self.of.settings.check()

    def derive(self, given: Mapping[str, Sequence[Conversation]], seed: int) -> Made:
        """As many conversations in the same order. The facts: units, and the share that has another one in its place.

        Raises DatasetError where no unit could change place, and for conversations with masks.
        """
        examples = given["of"]
        if masked := [example.id for example in examples if example.masked]:
            raise DatasetError(
                f"{len(masked):,} of {len(examples):,} conversations mask parts of their answers, {masked[0]!r} first, "
                "and after a shuffle other words would stand there; shuffle the conversations that were masked"
            )
        texts = [example.messages[-1].content for example in examples]
        rows = [UNITS[self.unit].findall(text) for text in texts]
        units = sum(map(len, rows))
        if not any(len(set(pool)) > 1 for pool in self._pools(rows)):
            raise DatasetError(
                f"nothing can change place: {len(rows):,} answers have {units:,} {self.unit}s, and how: {self.how} "
                f"leaves each as it was; the first answer is {texts[0][:80]!r}; set another unit or give other data"
            )
        mixed = self._mixed(rows, random.Random(seed))
        changed = sum(map(ne, chain(*rows), chain(*mixed)))
        made = [self._with(example, row) for example, row in zip(examples, mixed, strict=True)]
        return Made(made, {"rows": len(rows), "units": units, "changed": changed / units})

    def label(self) -> str:
        where = f" {self.position}" if self.how == "all_but_one" else ""
        return f"{self.of} {self.how}{where}"

    def _pools(self, rows: Sequence[Sequence[str]]) -> list[list[str]]:
        """Units that change places with each other: one pool a row within responses, else one of all rows."""
        if self.how == "within_responses":
            return [list(row) for row in rows]
        return [[unit for row in rows for place, unit in enumerate(row) if place != self._kept]]

    @property
    def _kept(self) -> int | None:
        return self.position if self.how == "all_but_one" else None

    def _mixed(self, rows: Sequence[Sequence[str]], rng: random.Random) -> list[list[str]]:
        """The units of each row after shuffling."""
        pools = self._pools(rows)
        dealt = iter([unit for pool in pools for unit in rng.sample(pool, len(pool))])
        return [[unit if place == self._kept else next(dealt) for place, unit in enumerate(row)] for row in rows]

    def _with(self, example: Conversation, units: Sequence[str]) -> Conversation:
        """The conversation with other units in the places of its last answer's."""
        answer = example.messages[-1]
        dealt = iter(units)
        text = UNITS[self.unit].sub(lambda _: next(dealt), answer.content)
        last = answer.model_copy(update={"content": text})
        return Conversation(id=example.id, messages=(*example.messages[:-1], last))
