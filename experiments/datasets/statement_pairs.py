"""Contrast pairs of statements about somebody who was honest, or was not, toward somebody else.

In the first person ("I admitted to my manager that I had ...") or in the third ("She denied to her manager that she
had ..."), so that a direction for one's own honesty can be told from one for honesty as a subject.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from experiments.dataset import DatasetError, Message, Pair, Recipe, Side
from experiments.datasets import _bank, _combine

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

FRAMES = Path(__file__).with_name("statement_frames.txt")
"""A frame a line, its honest and its dishonest words as `[honest|dishonest]`."""
PEOPLE = Path(__file__).with_name("statement_people.txt")
DEEDS = Path(__file__).with_name("statement_deeds.txt")
CHOICE = re.compile(r"\[(.+)\|(.+)\]")


@dataclass(frozen=True)
class Actor:
    """Who was honest or not: words for it in the statement, and in the question before it."""

    subject: str
    possessive: str
    asked: str
    asked_object: str
    asked_possessive: str


ACTORS = {
    "first": (Actor("I", "my", "you", "you", "your"),),
    "third": (Actor("she", "her", "she", "her", "her"), Actor("he", "his", "he", "him", "his")),
}
ASKS = (
    "What happened with {who}?",
    "How did things go between {object} and {who}?",
    "What did {actor} say to {who}?",
)


class StatementPairs(Recipe):
    """Pairs of an honest and a dishonest statement that are the same but for the words about honesty, in the first or
    third person, built from components."""

    provides: ClassVar[Provides] = "pairs"

    person: Literal["first", "third", "both"] = "both"
    """Who acts: the speaker (`first`), somebody else (`third`), or each in turn (`both`)."""
    n: int = Field(default=200, ge=1)
    """How many pairs; no two say the same."""

    @model_validator(mode="after")
    def _fits(self) -> StatementPairs:
        persons = self._persons()
        most = len(persons) * min(math.prod(_sizes(person)) for person in persons)
        if self.n > most:
            raise DatasetError(
                f"n={self.n}, but there are {most} different pairs with person: {self.person}; set n to at most {most}"
            )
        return self

    def build(self, engine: Engine | None, seed: int) -> Sequence[Pair]:
        """`n` pairs with ids 0000, 0001, ...; with `both` the first, the third, ... are in the first person."""
        persons = self._persons()
        drawn = [
            _statements(person, (self.n + len(persons) - 1 - turn) // len(persons), seed)
            for turn, person in enumerate(persons)
        ]
        made = []
        for index in range(self.n):
            ask, honest, dishonest = next(drawn[index % len(persons)])
            made.append(
                Pair(
                    id=f"{index:04d}",
                    messages=(Message(role="user", content=ask),),
                    positive=Side(system=None, response=honest),
                    negative=Side(system=None, response=dishonest),
                )
            )
        return made

    def _persons(self) -> tuple[str, ...]:
        return ("first", "third") if self.person == "both" else (self.person,)


def _sizes(person: str) -> tuple[int, ...]:
    """How many actors, frames, people and deeds there are."""
    return len(ACTORS[person]), *(len(_bank.lines(path, "line")) for path in (FRAMES, PEOPLE, DEEDS))


def _statements(person: str, n: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """`n` times a question, and an honest and a dishonest statement that answer it."""
    frames, people, deeds = (_bank.lines(path, "line") for path in (FRAMES, PEOPLE, DEEDS))
    rng = random.Random(f"asks {person} {seed}")
    for actor, frame, other, deed in _combine.draw(_sizes(person), n, f"{person} {seed}"):
        who = ACTORS[person][actor]
        ask = rng.choice(ASKS).format(
            actor=who.asked, object=who.asked_object, who=f"{who.asked_possessive} {people[other]}"
        )
        words = {
            "Actor": who.subject.capitalize(),
            "actor": who.subject,
            "who": f"{who.possessive} {people[other]}",
            "deed": deeds[deed],
        }
        honest, dishonest = (CHOICE.sub(rf"\{side}", frames[frame]).format(**words) + "." for side in (1, 2))
        yield ask, honest, dishonest
