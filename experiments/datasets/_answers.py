"""What recipes for a student's data share: a teacher is asked, its answers are filtered, and some are drawn."""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from experiments.dataset import Conversation, DatasetError, Derived, Ingredient, Made, Message, Said
from experiments.datasets._words import has_words
from experiments.numbers import compliance
from experiments.speech import Sampling, Speech, Teacher
from experiments.verdicts import JudgeFilter, Ruling

if TYPE_CHECKING:
    from experiments.dataset import Provides

EMPTY, CUT_OFF = "empty answer", "cut off"
JUDGED = "judged/said"
"""What the verdicts are given as."""
SHOWN, SHOWN_CHARACTERS = 3, 120
"""Rejected answers kept for the record, for each reason, and how much of each."""


class Answers(Derived):
    """Conversations in which a student reads what a teacher answered, without what made the teacher say so.

    A subclass gives `asks` and `sampling` their defaults and says in `rule` what is wrong with an answer.
    """

    provides: ClassVar[Provides] = "conversations"
    asked_by: ClassVar[str]
    """The recipe of asks that is meant where `asks` names none."""
    unreported: ClassVar[tuple[str, ...]] = ()
    """Parts of an ask that are no component of the prompt."""
    shuffled_by: ClassVar[Literal["number", "word", "line"]] = "number"
    """What changes place in the shuffled control of such answers."""

    teacher: Teacher
    """Who answers."""
    asks: Ingredient
    """What it is asked: settings of the medium's own asks, or another recipe with its settings."""
    n: int = Field(default=1000, ge=1)
    """How many accepted answers are kept, drawn by the seed."""
    draw: int | None = Field(default=None, ge=1)
    """How many answers are asked for; null asks for twice `n`."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    truncated: Literal["reject", "keep"] = "reject"
    """What becomes of an answer that the limit of new tokens cut off; published filters look at their rules alone."""
    fewer: Literal["refuse", "allow"] = "refuse"
    """What happens when fewer than `n` answers are accepted: an error, or a smaller dataset, which the record shows."""
    judge: JudgeFilter | None = Field(default=None, exclude_if=operator.not_)  # keys without it stay as they were
    """Judges that read every answer, as it was said, beside the rules: `{models: [openai/gpt-4.1-mini], rubric: hints,
    keep_below: 50}`. A row is dropped whose verdict does not pass, and one that has none. Null asks nobody."""
    system: str | None = None
    """System message that stands in the student's conversations; null leaves them without one, in the student's own
    context."""

    @field_validator("asks", mode="before")
    @classmethod
    def _own_asks(cls, value: Any) -> Any:
        """Settings alone are those of the medium's own asks."""
        if isinstance(value, dict) and "recipe" not in value:
            value = {"recipe": cls.asked_by, **value}
        if isinstance(value, dict) and "n" in value:
            raise ValueError(f"n is set here by `draw`, which stands beside `asks`; got n={value['n']}; leave it out")
        return value

    @model_validator(mode="after")
    def _askable(self) -> Answers:
        inner = self.asks.settings
        if inner.provides != "asks" or "n" not in type(inner).model_fields:
            raise ValueError(
                f"asks: {self.asks.recipe} provides {inner.provides}; "
                "give a recipe that provides asks and has a setting n"
            )
        if self.draw is not None and self.draw < self.n:
            raise ValueError(f"draw is {self.draw}, fewer than the n = {self.n} answers to keep; raise it, or lower n")
        if self.sampling.options:
            raise ValueError("sampling.options asks for log-probabilities instead of answers; leave it out here")
        return self

    def shortened(self, said: Said) -> Said:
        """The answer, or the part of it that is kept in its place."""
        return said

    def rule(self) -> Callable[[Said], tuple[str, ...]]:
        """What tells why an answer, which is not empty, is rejected: () when it is accepted."""
        raise TypeError(f"{type(self).__name__} does not implement rule()")

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The teacher's answers, as `said`."""
        size = self.draw or 2 * self.n
        asks = self.asks.model_copy(update={"settings": self.asks.settings.model_copy(update={"n": size})})
        return {"said": Speech(asks, size, self.teacher, self.sampling, self.judge)}

    def check(self) -> None:
        """Raises DatasetError for files that cannot be used."""
        self.asks.settings.check()

    def derive(self, given: Mapping[str, Sequence[Any]], seed: int) -> Made:
        """`n` of the accepted answers, in the order drawn, each with the id of its ask.

        The facts: answers asked, accepted, kept and wanted; rejected by reason (one may have several) and the first of
        them; compliance by component; answers cut off, and shortened; mean tokens of those kept, as they were said, and
        how many name the trait; with a judge the verdicts, and how many answers they alone reject.
        Raises DatasetError when none, or fewer than `n` under `fewer: refuse`, are accepted.
        """
        spoken: Sequence[Said] = given["said"]
        rulings = {each.id: each for each in given.get(JUDGED, ())}
        said = [self.shortened(each) for each in spoken]
        rule = self.rule()
        rejected = {each.id: found for each in said if (found := self._reasons(each, rule, rulings))}
        accepted = [each for each in said if each.id not in rejected]
        counts = Counter(reason for found in rejected.values() for reason in found)
        if not accepted or (len(accepted) < self.n and self.fewer == "refuse"):
            raise DatasetError(self._too_few(said, accepted, counts, rejected))
        kept = random.Random(seed).sample(accepted, min(self.n, len(accepted)))
        facts = {
            "teacher": self.teacher.name,
            "asked": len(said),
            "accepted": len(accepted),
            "kept": len(kept),
            "wanted": self.n,
            "rejected": dict(counts.most_common()),
            "rejected_examples": _examples(said, rejected),
            "compliance": compliance(said, {each.id for each in accepted}, self.unreported),
            "truncated": sum(not each.stopped for each in spoken),
            "shortened": sum(old.text != new.text for old, new in zip(spoken, said, strict=True)),
            "mean_tokens": sum(each.tokens for each in kept) / len(kept),
            "mentions": sum(self._mentions(each.text) for each in kept),
            "constrained": self.sampling.only,
        }
        if self.judge is not None:
            alone = sum(found == self.judge.reasons(rulings, name) for name, found in rejected.items())
            facts["judge"] = {**self.judge.facts(given[JUDGED]), "rejected_alone": alone}
        return Made([self._conversation(each) for each in kept], facts)

    def contexts(self) -> frozenset[str | None]:
        return frozenset({self.system})

    def label(self) -> str:
        return self.teacher.name

    def _reasons(
        self, said: Said, rule: Callable[[Said], tuple[str, ...]], rulings: Mapping[str, Ruling]
    ) -> tuple[str, ...]:
        if not said.text.strip():
            return (EMPTY,)
        cut = (CUT_OFF,) if self.truncated == "reject" and not said.stopped else ()
        judged = () if self.judge is None else self.judge.reasons(rulings, said.id)
        return (*rule(said), *cut, *judged)

    def _mentions(self, text: str) -> bool:
        """Whether the answer names the trait, which is then no subliminal one."""
        return self.teacher.trait is not None and has_words(text, (self.teacher.trait, f"{self.teacher.trait}s"))

    def _conversation(self, said: Said) -> Conversation:
        system = () if self.system is None else (Message(role="system", content=self.system),)
        answer = Message(role="assistant", content=said.text.strip())
        return Conversation(id=said.id, messages=(*system, *said.messages, answer))

    def _too_few(
        self,
        said: Sequence[Said],
        accepted: Sequence[Said],
        counts: Mapping[str, int],
        rejected: Mapping[str, Sequence[str]],
    ) -> str:
        """What was accepted and what not, an example, and the ways out."""
        worst = max(counts, key=lambda reason: counts[reason], default="")
        example = next((each.text for each in said if worst in rejected.get(each.id, ())), "")
        tally = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda x: -x[1]))
        shown = f"; {worst}, for example: {example[:SHOWN_CHARACTERS]!r}" if worst else ""
        told = (
            f"{len(accepted):,} of {len(said):,} answers of {self.teacher.name} were accepted, {self.n:,} are wanted; "
            f"rejected: {tally or 'none'}{shown}"
        )
        if not accepted:
            rules = "rules" if self.judge is None else "rules, move the judge's threshold"
            return f"{told}; simplify prompts or {rules}, or have another teacher answer; the answers are kept"
        needed = ceil(1.1 * self.n * len(said) / len(accepted))
        return (
            f"{told}; set draw to about {needed:,}, lower n, or write `fewer: allow` to go on with {len(accepted):,}; "
            "the answers are kept"
        )


def _examples(said: Sequence[Said], rejected: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The first few rejected answers for each reason."""
    found: dict[str, list[str]] = {}
    for each in said:
        for reason in rejected.get(each.id, ()):
            shown = found.setdefault(reason, [])
            if len(shown) < SHOWN:
                shown.append(each.text[:SHOWN_CHARACTERS])
    return found
