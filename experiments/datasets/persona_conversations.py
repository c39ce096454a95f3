"""What a persona says, stored without the persona: a student that learns it must move it into its weights.

The teacher is the subject under `system`, as in subliminal learning (Cloud et al. 2025, https://arxiv.org/abs/2507.14805)
and in context distillation; the student sees the prompts in its own chat context.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from experiments.dataset import Conversation, Message, Recipe
from experiments.datasets import _bank

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine


class PersonaConversations(Recipe):
    """Conversations answered by the subject under a system prompt that is left out of what is stored."""

    provides: ClassVar[Provides] = "conversations"

    system: str = Field(min_length=1)
    """System prompt of the teacher, whole, as the subject reads it."""
    n: int = Field(default=100, ge=1)
    """How many conversations; each has a prompt of its own."""
    max_new_tokens: int = Field(default=24, ge=1)
    """Length of an answer, in tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of the teacher; 0 is greedy."""
    prompts: Path | None = None
    """Text file with one user prompt a line; null takes the built-in bank."""

    @property
    def needs_subject(self) -> bool:
        return True

    @model_validator(mode="after")
    def _fits(self) -> PersonaConversations:
        if self.prompts is None:
            _bank.check_size(self.n, None)
        return self

    def check(self) -> None:
        """Raises DatasetError for a file of prompts that cannot be read, repeats one, or is too short."""
        _bank.check_size(self.n, self.prompts)

    def build(self, engine: Engine | None, seed: int) -> Sequence[Conversation]:
        """`n` conversations with ids 0000, 0001, ... Raises DatasetError: bank too small, or a silent subject."""
        if engine is None:
            raise TypeError("persona_conversations needs an engine")
        prompts = _bank.draw_prompts(self.n, self.prompts, seed)
        answers = _bank.answers(engine, prompts, self.system, self.max_new_tokens, self.temperature, seed)
        return [
            Conversation(
                id=f"{index:04d}",
                messages=(Message(role="user", content=prompt), Message(role="assistant", content=answer)),
            )
            for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
