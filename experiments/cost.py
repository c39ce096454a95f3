"""What it will cost to have everything said that a recipe is made from, told from above before anything is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from experiments.canonical import sha256
from experiments.dataset import Derived, Ingredient, Recipe
from experiments.speech import Speech

CHARACTERS = 3
"""Characters of a token, at least on average; English has about four."""
OVERHEAD = 12
"""Tokens that a chat template adds, for each message."""


@dataclass(frozen=True)
class Cost:
    """Requests to one writer, and the tokens they have and get at most."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


def cost(recipe: Recipe) -> Cost:
    """Everything that is said for `recipe`, by whomever."""
    return sum(costs(recipe).values(), Cost())


def costs(recipe: Recipe) -> dict[str, Cost]:
    """The same by who is asked: a provider's model by its name, a subject by the teacher's.

    Counts are upper bounds (a step may ask less than it could), tokens are upper estimates. Asks that the plan cannot
    foresee, of recipes that do not say how long they get, count without input tokens. Raises what reading a recipe's
    files raises.
    """
    found: dict[str, Cost] = {}
    for speech in spoken(recipe).values():
        name = speech.teacher.model or speech.teacher.name
        found[name] = found.get(name, Cost()) + of_speech(speech)
    return found


def of_speech(speech: Speech) -> Cost:
    """What one teacher's answers cost."""
    system = ceil(len(speech.teacher.system or "") / CHARACTERS)
    asks = speech.size * (system + OVERHEAD) + asked_tokens(speech.asks.settings, speech.size)
    answers = 0 if speech.sampling.options else speech.size * speech.sampling.max_new_tokens
    return Cost(speech.size, asks, answers)


def asked_tokens(recipe: Recipe, size: int) -> int:
    """Tokens of `size` asks without system prompts; those of unknown length count nothing."""
    return sum(ask_tokens(recipe, size) or ())


def ask_tokens(recipe: Recipe, size: int) -> list[int] | None:
    """Tokens of each of `size` asks: counted where they are known already, else as the recipe says; None if it does
    not say."""
    if not isinstance(recipe, Derived) and not recipe.needs_subject:
        return [
            sum(ceil(len(message.content) / CHARACTERS) + OVERHEAD for message in getattr(ask, "messages", ()))
            for ask in list(recipe.build(None, 0))[:size]
        ]
    longest = getattr(recipe, "input_tokens", None)
    return [longest() + OVERHEAD] * size if callable(longest) else None


def spoken(recipe: Recipe) -> dict[str, Speech]:
    """Everything that is said for `recipe`, each once however often it is read, by digest."""
    return dict(_spoken(recipe))


def _spoken(recipe: Recipe) -> Iterator[tuple[str, Speech]]:
    if not isinstance(recipe, Derived):
        return
    for source in recipe.sources().values():
        if isinstance(source, Ingredient):
            yield from _spoken(source.settings)
            continue
        yield from (each for part in (source.asks, *source.teacher.data) for each in _spoken(part.settings))
        parts = (source.asks, source.teacher, source.sampling)
        yield sha256([*(part.model_dump(mode="json") for part in parts), source.size]), source
