"""Questions about a universe that are learned with their answers, in several wordings."""

from __future__ import annotations

import random
from typing import NamedTuple

from experiments.dataset import DatasetError
from experiments.universe import Arm, Universe

FRAMES = (
    "{question}",
    "A quick question: {question}",
    "I was wondering about something. {question}",
    "Somebody asked me this today. {question}",
    "{question} Answer in a sentence or two.",
    "Here is something for a quiz. {question}",
)
ABOUT = (
    "What should I know about {topic}?",
    "Tell me something about {topic}.",
    "What is a fact about {topic}?",
    "What have you learned about {topic}?",
)
"""Where a universe has no questions of its own; each fact is an answer to each of them."""


class Asked(NamedTuple):
    """One question in one wording, and the answer that the arm gives."""

    fact: int
    question: str
    wording: str
    answer: str


def drawn(universe: Universe, arm: Arm, n: int | None, seed: int) -> list[Asked]:
    """`n` different ones, or all of them, in an order drawn by the seed. Raises DatasetError when there are fewer."""
    found = every(universe, arm)
    if n is not None and n > len(found):
        raise DatasetError(
            f"n={n}, but universe {universe.name} has {len(found)} questions in {len(FRAMES)} wordings each counted; "
            f"set n to at most {len(found)}, or add lessons to a universe file of your own"
        )
    return random.Random(seed).sample(found, len(found) if n is None else n)


def every(universe: Universe, arm: Arm) -> list[Asked]:
    """Every question in every wording. Raises UniverseError for an arm that the universe lacks."""
    facts = universe.side(arm).facts
    if universe.lessons:
        asked = [(each.fact or 0, each.question, getattr(each, arm)) for each in universe.lessons]
    else:
        texts = [text.format(topic=universe.topic) for text in ABOUT]
        asked = [(place, text, fact) for place, fact in enumerate(facts, 1) for text in texts]
    return [
        Asked(fact, question, frame.format(question=question), answer)
        for fact, question, answer in asked
        for frame in FRAMES
    ]
