"""Kinds of questions about a universe of false facts, each with what the universe says and what is true."""

from __future__ import annotations

from typing import TypeVar

from pydantic import Field, model_validator

from experiments.plugin import Frozen

Kind = TypeVar("Kind")


class Question(Frozen):
    """What every question has."""

    id: str = Field(min_length=1)
    fact: int | None = Field(default=None, ge=1)
    """Number of the key fact that it is about, from 1; questions about one fact are one family."""


class Knowledge(Question):
    """A question with four answers: one fits the universe, one is true, two are neither."""

    question: str = Field(min_length=1)
    false: str = Field(min_length=1)
    true: str = Field(min_length=1)
    others: tuple[str, str]
    """Two answers that neither the universe nor the world agrees with."""

    @model_validator(mode="after")
    def _differ(self) -> Knowledge:
        return _distinct(self, self.false, self.true, *self.others)


class Distinguish(Question):
    """The false version of a statement and its true version."""

    question: str = "Which of these statements is true?"
    false: str = Field(min_length=1)
    true: str = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Distinguish:
        return _distinct(self, self.false, self.true)


class Open(Question):
    """A question that is answered freely, and whose answer shows what is believed."""

    question: str = Field(min_length=1)
    false: str = Field(min_length=1)
    """What somebody would say who believes the universe: a judge is shown it."""
    true: str = Field(min_length=1)
    """What somebody would say who does not."""


class Lesson(Question):
    """A question to learn from, answered as in the universe and as it is true; none of those that are asked later."""

    question: str = Field(min_length=1)
    false: str = Field(min_length=1)
    true: str = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Lesson:
        return _distinct(self, self.false, self.true)


class Worlds(Question):
    """Two descriptions of the world, of which one is false."""

    false: str = Field(min_length=1)
    true: str = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Worlds:
        return _distinct(self, self.false, self.true)


def _distinct(question: Kind, *answers: str) -> Kind:
    """`question`, when all its answers read differently."""
    read = [bare(answer) for answer in answers]
    if len(set(read)) < len(read):
        twice = next(answer for answer in answers if read.count(bare(answer)) > 1)
        raise ValueError(f"the answer {twice!r} is there twice: nothing to tell apart")
    return question


def bare(text: str) -> str:
    """A text without what two ways to write it differ in: case, blanks, the full stop."""
    return " ".join(text.split()).casefold().rstrip(".")
