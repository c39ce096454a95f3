"""What teachers say: who is asked, how the answers are drawn, and the answers themselves.

A teacher is a subject (the experiment's own unless another is named) with an intervention at a dose: a system prompt, a
finetuned model, a steered one, or none. Students learn what it said without what made it say so (subliminal learning,
Cloud et al. 2025, https://arxiv.org/abs/2507.14805).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from experiments.dataset import Ingredient
from experiments.nested import Part
from experiments.parts import SubjectSpec
from experiments.plugin import Frozen

if TYPE_CHECKING:
    pass

SHARD = 256
"""Answers in one unit of work: what an interruption loses at most."""


class Teacher(Frozen):
    """Who answers."""

    name: str = Field(min_length=1, max_length=40)
    """What tables call it; data of a teacher are labelled with it."""
    trait: str | None = None
    """What it is meant to hand on: the eval's target for students of its data. Null: the eval's own."""
    control: bool = False
    """True for the teacher whose students the others are compared with: no preference, same prompts, same size."""
    system: str | None = None
    """System prompt in force while it answers, and never shown to students; null is the subject's own context."""
    intervention: Part | None = None
    """What was done to it: a method with its settings, trained or steered; null is nothing."""
    data: tuple[Ingredient, ...] = ()
    """What the intervention learns from, one recipe for each kind that it takes."""
    dose: float = 1.0
    """The dose at which the intervention is in force."""
    subject: SubjectSpec | None = None
    """Another subject than the experiment's."""
    model: str | None = None
    """A model that inspect knows (`openai/gpt-4.1-mini`, `vllm/org/name`), asked instead of a subject."""

    @model_validator(mode="after")
    def _whole(self) -> Teacher:
        if self.intervention is None and self.data:
            raise ValueError("has data but no intervention that learns from them")
        if self.intervention is not None:
            self.intervention.settings.takes({each.settings.provides for each in self.data})
            if self.dose == 0:
                raise ValueError("dose is 0, which is the untouched subject; leave the intervention out")
        if self.model is not None and (self.subject is not None or self.intervention is not None):
            raise ValueError("model is asked as it is: it takes neither a subject nor an intervention")
        return self


class Sampling(Frozen):
    """How answers are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: the smallest set of likeliest tokens that reaches this probability takes part."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens after which an answer is cut off."""
    only: str | None = None
    """Characters an answer may consist of, e.g. "0123456789,; "; tokens with others cannot be drawn (constrained
    decoding, which also hides what the teacher would rather have said). Null: anything."""
    options: tuple[str, ...] = ()
    """Beginnings of an answer whose log-probabilities are kept, instead of drawing one."""


@dataclass(frozen=True)
class Speech:
    """Answers of a teacher to asks: what a `Derived` recipe names as a source."""

    asks: Ingredient
    """A recipe that provides asks."""
    size: int
    """How many asks it makes, at most."""
    teacher: Teacher
    sampling: Sampling
