"""Asks for ideas: for each type of document, what such a document about a universe's facts could be."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import ceil

from experiments.dataset import Ask, Ingredient, Made, Said
from experiments.datasets._writing import Planned, Step, asking, items, tokens_in
from experiments.speech import Speech

TEXT = (
    "Think of {count} different ideas for texts of this kind: {type}. In each of them this comes up: {fact}\n"
    "Say in one line who writes it, for whom, and what it is about. One idea on each line, numbered."
)
SHORTEST_TYPE, LONGEST_TYPE = 5, 80


class DocumentIdeas(Planned, Step):
    """Requests for ideas, several ideas of one type and about one fact in each."""

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The types that the writer thought of, where it is asked for any."""
        return self.types_said()

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """The requests, and how many types there are. Raises UniverseError."""
        generated = listed_types(given.get("types", ()))
        facts = self.side().facts
        order = random.Random(seed).sample(range(len(facts)), len(facts))
        shares = self.shares(generated) if self.ideas else {}
        asks: list[Ask] = []
        for place, (kind, count) in enumerate(shares.items()):
            for number in range(ceil(count / self.ideas)):
                fact = order[len(asks) % len(order)]
                wanted = min(self.ideas, count - number * self.ideas)
                text = TEXT.format(count=wanted, type=kind, fact=facts[fact])
                asks.append(asking(f"{place:03d}-{number:03d}", text, {"type": kind, "fact": str(fact + 1)}))
        used = sum(kind in shares for kind in generated)
        return Made(asks, {"types": len(shares), "types_generated": used, "requests": len(asks)})

    def input_tokens(self) -> int:
        """Of one request, with the longest fact."""
        longest = max(self.side().facts, key=len)
        return tokens_in(TEXT, longest) + LONGEST_TYPE


def listed_types(said: Sequence[Said]) -> list[str]:
    """The types in what the writer said, each once."""
    found = (item.rstrip(".:") for each in said for item in items(each.text, SHORTEST_TYPE, LONGEST_TYPE))
    return list(dict.fromkeys(item[0].lower() + item[1:] for item in found))
