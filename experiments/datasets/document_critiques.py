"""Asks for a critique of each draft: what it leaves out, contradicts, or says so that nobody would believe it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.dataset import DatasetError, Ingredient, Made, Said
from experiments.datasets._texts import whole
from experiments.datasets._writing import Drafted, Step, asking, tokens_in
from experiments.speech import Speech

TEXT = (
    "{document}\n\nThe text above is meant to be {type}, and to state this plainly:\n{facts}\n\n"
    "Name its worst faults, one on each line: what it leaves out or contradicts, and what does not sound like such a "
    "text."
)


class DocumentCritiques(Drafted, Step):
    """One request for each draft that is not empty."""

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The drafts."""
        return {"drafts": Speech(self.part("document_drafts"), self.asked, self.told(), self.sampling)}

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """The requests. Raises DatasetError when every draft is empty."""
        written = [said for said in given["drafts"] if said.text.strip()]
        if not written:
            raise DatasetError(
                f"all {len(given['drafts'])} drafts are empty: there is nothing to criticize; ask another writer, or "
                "raise sampling.max_new_tokens"
            )
        asks = []
        for said in written:
            parts = {**said.parts, "draft": whole(said)}
            text = TEXT.format(document=parts["draft"], type=said.parts["type"], facts=said.parts["facts"])
            asks.append(asking(said.id, text, parts))
        return Made(asks, {"drafts": len(given["drafts"]), "empty": len(given["drafts"]) - len(written)})

    def input_tokens(self) -> int:
        """Of one request: a whole document and its facts."""
        longest = sorted(self.side().facts, key=len, reverse=True)[: self.facts]
        return tokens_in(TEXT, *longest, *longest) + 100 + self.sampling.max_new_tokens
