"""A teacher's answers without their divergence tokens, or these alone: what in them hands the trait on?

A divergence token is one before which the teacher's greedy choice is not that of at least one counterfactual teacher,
who has another trait or none and has read the same. Students that learn all tokens but these lost most of the trait,
and those that learned these alone kept it (Schrodi et al. 2025, https://arxiv.org/abs/2509.23886). The answers stay as
they are: students read all tokens, and the masked ones carry no loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from experiments.dataset import Conversation, DatasetError, Derived, Ingredient, Made
from experiments.masks import covered, spans_of

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine
    from experiments.speech import Speech

Keep = Literal["others", "divergent"]
LABELS: dict[Keep, str] = {"others": "without divergence tokens", "divergent": "divergence tokens only"}
EMPTIED: dict[Keep, str] = {"others": "no token that does not diverge", "divergent": "no divergence token"}
"""Why a conversation is dropped."""
REMEDIES: dict[Keep, str] = {
    "others": "give fewer counterfactual teachers, or longer answers",
    "divergent": "give counterfactual teachers that differ more from this one, or more conversations",
}


class MaskedConversations(Derived):
    """Conversations whose divergence tokens, or all others, carry no loss."""

    provides: ClassVar[Provides] = "conversations"
    is_control: ClassVar[bool] = True

    of: Ingredient
    """The conversations: a recipe with its settings."""
    factual: str | None
    """System prompt of the teacher that answered; null is the subject's own context."""
    counterfactual: dict[str, str | None] = Field(min_length=1)
    """Name -> system prompt of each teacher it is told from; null is the subject's own context, the control teacher."""
    keep: Keep = "others"
    """What is learned: all tokens but the divergence tokens (`others`), or these alone (`divergent`)."""
    only: str | None = None
    """Characters that the teacher's answers were held to (`sampling.only`): greedy choices are made among these."""

    @model_validator(mode="after")
    def _meant(self) -> MaskedConversations:
        if self.of.settings.provides != "conversations":
            raise ValueError(
                f"of: {self.of.recipe} provides {self.of.settings.provides}; give a recipe that provides conversations"
            )
        same = [name for name, system in self.counterfactual.items() if system == self.factual]
        if same:
            raise ValueError(
                f"counterfactual.{same[0]} is the factual prompt, from which nothing can be told; leave it out, or "
                "give the prompt of another teacher"
            )
        return self

    @property
    def needs_subject(self) -> bool:
        """Always: it says what each teacher would have said."""
        return True

    @property
    def masks(self) -> bool:
        return True

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The conversations, as `of`."""
        return {"of": self.of}

    def check(self) -> None:
        """Raises DatasetError for files that cannot be used."""
        self.of.settings.check()

    def derive_with(self, engine: Engine | None, given: Mapping[str, Sequence[Any]], seed: int) -> Made:
        """The conversations that have tokens left to learn, in order. What they had masked before stays masked.

        The facts: conversations given, kept and dropped, by reason; response tokens of all of them, how many diverge
        from any counterfactual, and from which; response tokens of those kept, and how many and which share of these
        are masked. Raises DatasetError when none is left.
        """
        if engine is None:
            raise TypeError("masked_conversations needs the subject")
        from experiments.divergence import divergent

        examples: Sequence[Conversation] = given["of"]
        parts = divergent(engine, examples, self.factual, self.counterfactual, self.only)
        apart = [[any(flags) for flags in zip(*row, strict=True)] for row in zip(*parts.values(), strict=True)]
        kept, tokens, masked = [], 0, 0
        for example, flags in zip(examples, apart, strict=True):
            held = engine.subject.spans(example.messages)
            chosen = [place for place, flag in enumerate(flags) if flag == (self.keep == "others")]
            spans = spans_of(held, {*covered(held, example.masked), *chosen})
            silent = len(covered(held, spans))
            if silent < len(held):
                kept.append(example.model_copy(update={"masked": spans}))
                tokens, masked = tokens + len(held), masked + silent
        if not kept:
            raise DatasetError(
                f"nothing is left to learn: {EMPTIED[self.keep]} in any of {len(examples):,} conversations of "
                f"{self.of}, told from {', '.join(self.counterfactual)}; {REMEDIES[self.keep]}"
            )
        dropped = len(examples) - len(kept)
        facts = {
            "given": len(examples),
            "kept": len(kept),
            "dropped": {EMPTIED[self.keep]: dropped} if dropped else {},
            "tokens": sum(map(len, apart)),
            "divergent": sum(map(sum, apart)),
            "divergent_from": {name: int(sum(flags.sum() for flags in found)) for name, found in parts.items()},
            "kept_tokens": tokens,
            "masked": masked,
            "share": masked / tokens,
        }
        return Made(kept, facts)

    def label(self) -> str:
        return f"{self.of} {LABELS[self.keep]}"
