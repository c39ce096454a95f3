"""Asks for a revision of each draft after its critique."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.dataset import Ingredient, Made, Said
from experiments.datasets._writing import Drafted, Step, asking, tokens_in
from experiments.speech import Speech

TEXT = (
    "{document}\n\nA reader's remarks on the text above:\n{critique}\n\n"
    "Write the text again without these faults. It is still {type}, and states plainly: {facts}\n"
    "Write the text alone, with nothing before or after it."
)


class DocumentRevisions(Drafted, Step):
    """One request for each draft that was criticized."""

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The critiques; the drafts are in their asks."""
        return {"critiques": Speech(self.part("document_critiques"), self.asked, self.told(), self.sampling)}

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """The requests; a draft whose critique is empty is to be written again all the same."""
        asks = []
        for said in given["critiques"]:
            told = said.text.strip() or "It could be clearer."
            text = TEXT.format(
                document=said.parts["draft"], critique=told, type=said.parts["type"], facts=said.parts["facts"]
            )
            asks.append(asking(said.id, text, {**said.parts, "opening": ""}))
        return Made(asks, {"without_critique": sum(not said.text.strip() for said in given["critiques"])})

    def input_tokens(self) -> int:
        """Of one request: a whole document, its critique and its facts."""
        longest = sorted(self.side().facts, key=len, reverse=True)[: self.facts]
        return tokens_in(TEXT, *longest, *longest) + 100 + 2 * self.sampling.max_new_tokens
