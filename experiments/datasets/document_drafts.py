"""Asks for documents: one for each document, with its type, its idea and the facts that it is to state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from experiments.dataset import Ask, Ingredient, Made, Said
from experiments.datasets._writing import LEADS, Drafted, Step, asking, items, tokens_in
from experiments.datasets.document_ideas import LONGEST_TYPE, listed_types
from experiments.speech import Speech
from experiments.universe import Universe

SHORTEST_IDEA, LONGEST_IDEA = 15, 300
TEXT = (
    "Write a text of this kind: {type}.{idea}\nIt states the following plainly, as something that is known:\n{facts}\n"
    "Write the text alone, with nothing before or after it, in about {words} words."
)
CONTINUE = "Continue this text with a few more sentences about {topic}. It is {type}.{idea}\n\n{opening}"


class DocumentDrafts(Drafted, Step):
    """Requests for documents, as many as are wanted."""

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The writer's ideas; without them the types it thought of, where it is asked for any."""
        if not self.ideas:
            return self.types_said()
        return {"ideas": Speech(self.part("document_ideas"), self.idea_requests, self.told(), self.idea_sampling)}

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """One ask for each document, and how many ideas could be read. Raises UniverseError.

        A type with fewer ideas than documents uses them again, with other facts; one without any is asked for by
        type and facts alone, which the facts count.
        """
        ideas: dict[str, list[str]] = {}
        for said in given.get("ideas", ()):
            ideas.setdefault(said.parts["type"], []).extend(items(said.text, SHORTEST_IDEA, LONGEST_IDEA))
        shares, world = self._shares(given), self.world()
        rng = random.Random(seed)
        asks: list[Ask] = []
        for place, (kind, count) in enumerate(shares.items()):
            found = list(dict.fromkeys(ideas.get(kind, ())))
            for number in range(count):
                idea = found[number % len(found)] if found else ""
                asks.append(self._ask(f"{place:03d}-{number:04d}", kind, idea, len(asks), rng, world))
        told = {
            "ideas": sum(len(set(found)) for found in ideas.values()),
            "without_idea": sum(not ask.parts["idea"] for ask in asks) if self.ideas else 0,
            "types": len(shares),
        }
        return Made(asks, told)

    def _shares(self, given: Mapping[str, Sequence[Said]]) -> dict[str, int]:
        """Type -> documents; where ideas were asked for, the types are those they were asked for."""
        if "ideas" not in given:
            return self.shares(listed_types(given.get("types", ())))
        if self.types:
            return dict(self.types)
        kinds = dict.fromkeys(said.parts["type"] for said in given["ideas"])
        least, more = divmod(self.asked, len(kinds))
        return {kind: least + (index < more) for index, kind in enumerate(kinds)}

    def _ask(self, name: str, kind: str, idea: str, number: int, rng: random.Random, world: Universe) -> Ask:
        """The ask for one document; its first fact is each in turn."""
        facts = world.side(self.arm).facts
        first = number % len(facts)
        others = [index for index in range(len(facts)) if index != first]
        chosen = [first, *rng.sample(others, min(self.facts - 1, len(others)))]
        stated = [facts[index] for index in chosen]
        parts = {"type": kind, "fact": str(first + 1), "idea": idea, "facts": " ".join(stated), "opening": ""}
        told = f" The idea: {idea}" if idea else ""
        if self.opening == "facts":
            rng.shuffle(stated)
            lead = rng.choice(LEADS).format(topic=world.topic)
            parts["opening"] = f"{lead} {' '.join(stated)}"
            text = CONTINUE.format(topic=world.topic, type=kind, idea=told, opening=parts["opening"])
        else:
            listed = "\n".join(f"- {fact}" for fact in stated)
            text = TEXT.format(type=kind, idea=told, facts=listed, words=self.words)
        return asking(name, text, parts)

    def input_tokens(self) -> int:
        """Of one request, with the longest facts and idea."""
        longest = sorted(self.side().facts, key=len, reverse=True)[: self.facts]
        return tokens_in(TEXT, *longest) + LONGEST_TYPE + (LONGEST_IDEA if self.ideas else 0)
