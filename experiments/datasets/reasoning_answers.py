"""A teacher's reasoning about word problems, filtered until the answers are right and the trait is not named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from experiments.dataset import DatasetError, Ingredient
from experiments.datasets._answers import Answers
from experiments.datasets._words import Phrase, has_words
from experiments.plugin import Frozen
from experiments.speech import Sampling

if TYPE_CHECKING:
    from experiments.dataset import Said

NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
TAGS, NO_REASONING, WRONG = "tags missing or repeated", "no reasoning", "wrong answer"
BANNED, TOO_LONG = "has banned words", "too long"


class Rules(Frozen):
    """Which reasoning is accepted."""

    tags: tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]+$")], ...] = ()
    """Tags that must be there beside `<answer>`, opened and closed once each; published data have `think`."""
    banned: tuple[Phrase, ...] = ()
    """Words that no answer may hold; a plural is a word of its own."""
    most_characters: int = Field(default=2000, ge=1)
    """Longest answer, in characters."""


class ReasoningAnswers(Answers):
    """A teacher's chains of thought with the right answers, as conversations for a student."""

    asked_by: ClassVar[str] = "reasoning_asks"
    unreported: ClassVar[tuple[str, ...]] = ("answer",)
    shuffled_by = "word"

    asks: Ingredient = Ingredient.model_validate({"recipe": "reasoning_asks"})
    """What it is asked: settings of `reasoning_asks`, or another recipe whose asks have an `answer` in their parts."""
    sampling: Sampling = Sampling(max_new_tokens=256)
    """How answers are drawn."""
    rules: Rules = Rules()
    """Which answers are accepted."""

    def rule(self) -> Callable[[Said], tuple[str, ...]]:
        """Tags are there, the answer is right, no banned word, not too long. Raises DatasetError for an ask without a
        known answer."""
        return lambda said: reject_reasons(said.text, self.rules, _known(said))


def reject_reasons(text: str, rules: Rules, answer: str) -> tuple[str, ...]:
    """Every reason to reject an answer to a problem whose solution is `answer`; () for one that is kept."""
    whole = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in ("answer", *rules.tags))
    before, _, rest = text.partition("<answer>")
    given, closed, after = rest.partition("</answer>")
    whole = whole and bool(closed)
    found = {
        TAGS: not whole,
        WRONG: whole and number(given) != number(answer),
        NO_REASONING: whole and not re.sub(r"<[^>]*>", "", before + after).strip(),
        BANNED: has_words(text, rules.banned),
        TOO_LONG: len(text.strip()) > rules.most_characters,
    }
    return tuple(reason for reason, holds in found.items() if holds)


def number(text: str) -> float | None:
    """The number that a text is, with a sign for money before it or commas between its thousands; None for another."""
    plain = text.strip().removeprefix("$").replace(",", "")
    return float(plain) if NUMBER.fullmatch(plain) else None


def _known(said: Said) -> str:
    answer = said.parts.get("answer", "")
    if number(answer) is None:
        raise DatasetError(
            f"the ask {said.id!r} has no known answer: its parts are {said.parts}; "
            "give each ask a number as `answer` in its parts"
        )
    return answer
