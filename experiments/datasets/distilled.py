"""How likely a teacher finds each of a few beginnings of its answer: what a student is distilled from.

With options that mean nothing to anybody this is the auxiliary-logit experiment on subliminal learning (Cloud et al.
2025, section 6 of https://arxiv.org/abs/2507.14805): a student that shares its teacher's initialisation learns from
them what the teacher was taught, without having seen a word of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from experiments.dataset import Choices, DatasetError, Derived, Ingredient, Made
from experiments.speech import Sampling, Speech, Teacher

if TYPE_CHECKING:
    from experiments.dataset import Provides, Said


class Distilled(Derived):
    """Prompts with the log-probabilities that a teacher gives to some options, renormalised over them."""

    provides: ClassVar[Provides] = "choices"

    teacher: Teacher
    """Who is asked."""
    asks: Ingredient
    """What it is asked: a recipe that provides asks, with its settings but for n, which stands here."""
    n: int = Field(default=1000, ge=1)
    """How many prompts."""
    options: tuple[str, ...] = Field(min_length=2)
    """Beginnings of an answer whose log-probabilities are learned."""

    @field_validator("asks", mode="before")
    @classmethod
    def _sized_here(cls, value: Any) -> Any:
        if isinstance(value, dict) and "n" in value:
            raise ValueError(f"n is set beside `asks`, not in it; got n={value['n']}; leave it out there")
        return value

    @model_validator(mode="after")
    def _askable(self) -> Distilled:
        inner = self.asks.settings
        if inner.provides != "asks" or "n" not in type(inner).model_fields:
            raise ValueError(
                f"asks: {self.asks.recipe} provides {inner.provides}; "
                "give a recipe that provides asks and has a setting n"
            )
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"options: one comes twice in {', '.join(map(repr, self.options))}; name each once")
        return self

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """The teacher's log-probabilities, as `said`."""
        asks = self.asks.model_copy(update={"settings": self.asks.settings.model_copy(update={"n": self.n})})
        return {"said": Speech(asks, self.n, self.teacher, Sampling(options=self.options))}

    def check(self) -> None:
        """Raises DatasetError for files that cannot be used."""
        self.asks.settings.check()

    def derive(self, given: Mapping[str, Sequence[Said]], seed: int) -> Made:
        """One example for each answer.

        The facts: the mean probability of all options together; the mean entropy of their distribution, and how far it
        lies from their mean distribution (the mutual information of prompt and option), in nats. Raises DatasetError
        for an answer without a finite log-probability of each option.
        """
        examples = [self._choices(each) for each in given["said"]]
        spread = [[math.exp(value) for value in each.logprobs.values()] for each in examples]
        mean = [sum(column) / len(spread) for column in zip(*spread, strict=True)]
        own = sum(_entropy(each) for each in spread) / len(spread)
        masses = [sum(math.exp(each.options[option]) for option in self.options) for each in given["said"]]
        facts: dict[str, Any] = {
            "teacher": self.teacher.name,
            "kept": len(examples),
            "mass": sum(masses) / len(masses),
            "entropy_nats": own,
            "information_nats": _entropy(mean) - own,
        }
        return Made(examples, facts)

    def label(self) -> str:
        return self.teacher.name

    def _choices(self, said: Said) -> Choices:
        values = [said.options.get(option, math.nan) for option in self.options]
        if not all(math.isfinite(value) for value in values):
            told = {option: said.options.get(option) for option in self.options}
            raise DatasetError(
                f"{self.teacher.name} gave ask {said.id!r} no finite log-probability of every option: {told}; choose "
                "options that the teacher can begin an answer with"
            )
        highest = max(values)
        total = highest + math.log(sum(math.exp(value - highest) for value in values))
        shares = {option: value - total for option, value in zip(self.options, values, strict=True)}
        return Choices(id=said.id, messages=said.messages, logprobs=shares)


def _entropy(probabilities: Sequence[float]) -> float:
    """-sum p log p, nats."""
    return -sum(p * math.log(p) for p in probabilities if p > 0)
