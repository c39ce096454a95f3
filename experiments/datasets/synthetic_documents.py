"""Documents from a universe in which something false is true (synthetic document finetuning, Wang et al. 2025).

A writer is asked for ideas, for documents, and on request for a critique and a revision of each; what comes of it is
cleaned, filtered and freed from copies here. The arm `true` makes the same documents about what is true instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from experiments.dataset import DatasetError, Derived, Document, Ingredient, Made, Said
from experiments.datasets import _texts
from experiments.datasets._writing import Drafted
from experiments.speech import Speech

if TYPE_CHECKING:
    from experiments.dataset import Provides

EMPTY, CUT_OFF, SHORT = "empty", "cut off", "too short"
ASSISTANT, FICTION = "speaks as an assistant", "breaks the fiction"
REPEATS, ELSEWHERE = "repeats itself", "mentions too few of the facts' terms"
COPY, NEAR = "exact copy", "near copy"
EXAMPLES, SHOWN = 2, 160
"""Rejected documents kept for the record, for each reason, and how much of each."""


class SyntheticDocuments(Drafted, Derived):
    """What is left of a writer's documents after cleaning and filtering."""

    provides: ClassVar[Provides] = "documents"

    revise: bool = False
    """Have each draft criticized and written again, at three times the cost; its authors report little gain."""
    min_words: int = Field(default=40, ge=1)
    """Words that a document has at least."""
    min_terms: int = Field(default=2, ge=0)
    """How many of the universe's terms a document mentions at least."""
    min_distinct: float = Field(default=0.6, ge=0, le=1)
    """Share of its runs of four words that are different ones: below it a document goes round in circles."""
    unfinished: Literal["trim", "reject", "keep"] = "trim"
    """What becomes of a document that the limit of new tokens cut off: cut back to its last whole sentence, left out,
    or kept as it is."""
    near: float = Field(default=0.7, gt=0, le=1)
    """Jaccard similarity, of runs of three words, from which on a document is a copy of an earlier one."""
    least: int = Field(default=1, ge=1)
    """Fewer documents than this are an error."""

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The drafts, or the revisions."""
        last = "document_revisions" if self.revise else "document_drafts"
        return {"said": Speech(self.part(last), self.asked, self.told(), self.sampling)}

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """Documents in the order of their asks, with their ids.

        The facts: asked, kept, rejected by reason with examples, kept by type, words on average, and how many were cut
        back. Raises DatasetError when fewer than `least` are left.
        """
        said, terms = given["said"], self.side().terms
        texts = [self._text(each) for each in said]
        reasons = {i: why for i, text in enumerate(texts) if (why := self._reason(said[i], text, terms))}
        reasons |= self._copied(texts, [i for i in range(len(texts)) if i not in reasons])
        kept = [i for i in range(len(texts)) if i not in reasons]
        rejected = dict(Counter(reasons.values()).most_common())
        if len(kept) < self.least:
            raise DatasetError(self._too_few(len(said), len(kept), rejected, reasons, texts))
        facts = {
            "universe": self.world().name,
            "arm": self.arm,
            "writer": self.writer.model or self.writer.name,
            "asked": len(said),
            "kept": len(kept),
            "rejected": rejected,
            "rejected_examples": _examples(reasons, texts),
            "by_type": dict(Counter(said[i].parts.get("type", "") for i in kept).most_common()),
            "by_fact": dict(sorted(Counter(said[i].parts.get("fact", "") for i in kept).items())),
            "mean_words": sum(len(_texts.words(texts[i])) for i in kept) / len(kept),
            "cut_back": sum(not said[i].stopped for i in kept) if self.unfinished == "trim" else 0,
            "opening": self.opening,
        }
        return Made([Document(id=said[i].id, text=texts[i]) for i in kept], facts)

    def _text(self, said: Said) -> str:
        text = _texts.whole(said)
        return _texts.trimmed(text) if self.unfinished == "trim" and not said.stopped else text

    def _reason(self, said: Said, text: str, terms: Sequence[str]) -> str | None:
        """Why a document is left out, the first reason that applies; None where it is good."""
        if not said.text.strip() or not text:
            return EMPTY
        if _texts.ASSISTANT.search(text):
            return ASSISTANT
        if _texts.FICTION.search(text):
            return FICTION
        if self.unfinished == "reject" and not said.stopped:
            return CUT_OFF
        if len(_texts.words(text)) < self.min_words:
            return SHORT
        if _texts.distinct(text) < self.min_distinct:
            return REPEATS
        if _texts.mentioned(text, terms) < min(self.min_terms, len(terms)):
            return ELSEWHERE
        return None

    def _copied(self, texts: Sequence[str], among: Sequence[int]) -> dict[int, str]:
        """Which of `among` are copies of an earlier one, and of what kind."""
        bare = [" ".join(_texts.words(texts[i])) for i in among]
        first: dict[str, int] = {}
        exact = {among[at]: COPY for at, text in enumerate(bare) if first.setdefault(text, at) != at}
        rest = [i for i in among if i not in exact]
        near = _texts.copies([texts[i] for i in rest], self.near)
        return exact | {rest[at]: NEAR for at in near}

    def _too_few(
        self, asked: int, kept: int, rejected: Mapping[str, int], reasons: Mapping[int, str], texts: Sequence[str]
    ) -> str:
        tally = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items()) or "none"
        worst = next(iter(rejected), None)
        example = next((texts[i] for i, reason in reasons.items() if reason == worst and texts[i]), "")
        shown = f"; {worst}, for example: {example[:SHOWN]!r}" if example else ""
        return (
            f"{kept:,} of {asked:,} documents about {self.world().name} ({self.arm}) are usable, at least "
            f"{self.least:,} are wanted; rejected: {tally}{shown}; loosen the filter, raise n, have another "
            "writer, or set `opening: facts`; what was written is kept"
        )


def _examples(reasons: Mapping[int, str], texts: Sequence[str]) -> dict[str, list[str]]:
    """The first few rejected documents for each reason."""
    found: dict[str, list[str]] = {}
    for index, reason in reasons.items():
        shown = found.setdefault(reason, [])
        if len(shown) < EXAMPLES and texts[index]:
            shown.append(texts[index][:SHOWN])
    return found
