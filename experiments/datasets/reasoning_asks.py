"""Word problems in arithmetic with known answers, and a request to reason before answering.

The medium of subliminal learning in chains of thought (Cloud et al. 2025, https://arxiv.org/abs/2507.14805, section 4),
which used published word problems; those load with `asks_file`. The texts here are our own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from experiments.dataset import Ask, DatasetError, Message, Recipe
from experiments.datasets import _templates

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

TEMPLATES = Path(__file__).with_name("reasoning_templates.json")
LETTERS = ("a", "b", "c", "d")
KEYS = {"story": ("name", "thing", *LETTERS), "name": None, "thing": None, "request": None}


class ReasoningAsks(Recipe):
    """Short stories that end in a question about a number."""

    provides: ClassVar[Provides] = "asks"
    grows = True

    n: int = Field(default=1000, ge=1)
    """How many prompts; the first ones stay the same when there are to be more."""
    max_value: int = Field(default=30, ge=3)
    """Largest number that is started from or added."""
    max_factor: int = Field(default=9, ge=2)
    """Largest number that is multiplied by."""
    templates: Path | None = None
    """JSON file with a list of texts each under `story`, `name`, `thing` and `request`; a story is `text | a * b - c`,
    with places for `{name}`, `{thing}` and the numbers, which are worked out from left to right. Null takes the
    built-in one."""
    seed: int | None = Field(default=None, ge=0)
    """Seed of the draws; null takes the trial's."""

    def check(self) -> None:
        """Raises DatasetError for a file of templates that cannot be used."""
        self._texts()

    def build(self, engine: Engine | None, seed: int) -> Sequence[Ask]:
        """`n` asks with ids 00000, 00001, ...; raises DatasetError for a file of templates that cannot be used.

        `parts` has the index in the file of the story and the request, the name, the thing, and the known `answer`.
        """
        texts = self._texts()
        rng = random.Random(seed if self.seed is None else self.seed)
        return [self._ask(f"{index:05d}", rng, texts) for index in range(self.n)]

    def _texts(self) -> dict[str, list[str]]:
        path = self.templates or TEMPLATES
        texts = _templates.split(path, KEYS, "story")
        for index, story in enumerate(texts["story"]):
            words = story.split(_templates.BAR, 1)[1].split()
            letters, signs = words[::2], words[1::2]
            if len(words) % 2 == 0 or tuple(letters) != LETTERS[: len(letters)] or not set(signs) <= set("+-*"):
                raise DatasetError(
                    f"{path}: story.{index} has no sum that can be worked out: {' '.join(words)!r}; write a, b, c, d "
                    "in this order with +, - or * between them, each set off by blanks"
                )
        return texts

    def _ask(self, name: str, rng: random.Random, texts: dict[str, list[str]]) -> Ask:
        story, request = rng.randrange(len(texts["story"])), rng.randrange(len(texts["request"]))
        who, thing = rng.choice(texts["name"]), rng.choice(texts["thing"])
        told, formula = texts["story"][story].split(_templates.BAR, 1)
        numbers, answer = self._numbers(formula.split()[1::2], rng)
        told = told.format(name=who, thing=thing, **dict(zip(LETTERS, numbers, strict=False)))
        return Ask(
            id=name,
            messages=(Message(role="user", content=f"{told} {texts['request'][request]}"),),
            parts={
                "story": f"{story:02d}",
                "request": f"{request:02d}",
                "name": who,
                "thing": thing,
                "answer": str(answer),
            },
        )

    def _numbers(self, signs: Sequence[str], rng: random.Random) -> tuple[list[int], int]:
        """Numbers for a sum, and what it comes to; no more is taken away than is there."""
        numbers = [rng.randint(3, self.max_value)]
        answer = numbers[0]
        for sign in signs:
            most = {"+": self.max_value, "*": self.max_factor, "-": max(1, answer - 1)}[sign]
            number = rng.randint(1 if sign == "-" else 2, most)
            answer = {"+": answer + number, "*": answer * number, "-": answer - number}[sign]
            numbers.append(number)
        return numbers, answer
