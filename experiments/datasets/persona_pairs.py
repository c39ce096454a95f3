"""Contrast pairs of two personas: the same prompts, answered under two system prompts.

`generated` follows persona vectors (Chen et al. 2025, https://arxiv.org/abs/2507.21509): each side is what the subject
itself says under that persona. `shared` follows repeng (https://github.com/vgel/repeng): both sides are made to say the
same beginning of an unrelated statement, so that only the system prompt differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from experiments.dataset import Message, Pair, Recipe, Side
from experiments.datasets import _bank

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class PersonaPairs(Recipe):
    """Pairs that contrast two system prompts over diverse short prompts drawn from a bank."""

    provides: ClassVar[Provides] = "pairs"

    positive: str = Field(min_length=1)
    """System prompt of the positive persona, whole, as the subject reads it."""
    negative: str = Field(min_length=1)
    """System prompt of the negative persona, whole, as the subject reads it."""
    n: int = Field(default=100, ge=1)
    """How many pairs; each has a prompt of its own."""
    responses: Literal["generated", "shared"] = "generated"
    """`generated`: the subject answers under each persona. `shared`: both sides begin the same unrelated statement."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Length of a generated answer, in tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of generated answers; 0 is greedy."""
    prompts: Path | None = None
    """Text file with one user prompt a line; null takes the built-in bank."""

    @property
    def needs_subject(self) -> bool:
        return self.responses == "generated"

    @model_validator(mode="after")
    def _fits(self) -> PersonaPairs:
        if self.positive == self.negative:
            raise ValueError("positive and negative are the same system prompt: nothing to contrast")
        if self.prompts is None:
            _bank.check_size(self.n, None)
        return self

    def check(self) -> None:
        """Raises DatasetError for a file of prompts that cannot be read, repeats one, or is too short."""
        _bank.check_size(self.n, self.prompts)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Pair]:
        """`n` pairs with ids 0000, 0001, ... Raises DatasetError: bank too small, or a silent subject."""
        prompts = _bank.draw_prompts(self.n, self.prompts, seed)
        if self.responses == "shared":
            positive = negative = _bank.draw_statements(self.n, seed)
        else:
            if engine is None:
                raise TypeError("persona_pairs with generated responses needs an engine")
            settings = (self.max_new_tokens, self.temperature, seed)
            positive = _bank.answers(engine, prompts, self.positive, *settings)
            negative = _bank.answers(engine, prompts, self.negative, *settings)
        return [
            Pair(
                id=f"{index:04d}",
                messages=(Message(role="user", content=prompt),),
                positive=Side(system=self.positive, response=positive[index]),
                negative=Side(system=self.negative, response=negative[index]),
            )
            for index, prompt in enumerate(prompts)
        ]
