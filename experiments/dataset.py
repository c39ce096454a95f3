"""Training and contrast data: the contract for recipes, and JSON-lines storage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError, field_validator, model_validator

from experiments import plugin
from experiments.plugin import Frozen, Versioned
from experiments.problem import problems_of

if TYPE_CHECKING:
    from experiments.engine import Engine

Provides = Literal["pairs", "conversations"]


class Message(Frozen):
    """One chat turn."""

    role: Literal["system", "user", "assistant"]
    content: str


class Side(Frozen):
    """One side of a contrast pair: the persona that spoke, and what it said."""

    system: str | None
    """System prompt in force when `response` was produced; None means the subject's own context."""
    response: str
    """The assistant's words."""

    @field_validator("response")
    @classmethod
    def _says_something(cls, response: str) -> str:
        if not response.strip():
            raise ValueError("is empty: a side needs words to read activations from")
        return response


class Pair(Frozen):
    """One prompt answered under two personas."""

    id: str
    messages: tuple[Message, ...]
    """The neutral prompt: no persona in it, ends with a user message."""
    positive: Side
    negative: Side

    @field_validator("messages")
    @classmethod
    def _asks(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if not messages or messages[-1].role != "user":
            raise ValueError("must end with a user message: both sides answer it")
        if any(message.role == "system" for message in messages):
            raise ValueError("must not hold a system message: each side brings its own")
        return messages

    @model_validator(mode="after")
    def _contrasts(self) -> Pair:
        if self.positive == self.negative:
            raise ValueError("the positive and the negative side are the same: nothing to contrast")
        return self


class Conversation(Frozen):
    """One conversation to learn from; ends with the assistant message that is learned."""

    id: str
    messages: tuple[Message, ...]

    @field_validator("messages")
    @classmethod
    def _answers(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if len(messages) < 2 or messages[-1].role != "assistant" or not messages[-1].content.strip():
            raise ValueError("must end with a non-empty assistant message, which is learned, after another message")
        return messages


Example = Pair | Conversation


class DatasetError(ValueError):
    """Data that cannot be used: one sentence with the file, the line and what is wrong."""


class Recipe(Versioned):
    """How to make a dataset. A subclass is one file in `experiments/datasets/`; its fields are its settings."""

    provides: ClassVar[Provides]

    @property
    def needs_subject(self) -> bool:
        """True when building asks the subject for text, so that the subject enters the key; may depend on settings."""
        return False

    def check(self) -> None:
        """Read the files that the settings name, so that bad data is told before anything runs. Raises DatasetError."""

    def build(self, engine: Engine | None, seed: int) -> Sequence[Example]:
        """Make the examples, the same ones for the same seed. `engine` is given when `needs_subject`."""
        raise TypeError(f"{type(self).__name__} does not implement build()")


def recipe(name: str) -> type[Recipe]:
    """The recipe class defined in `experiments/datasets/<name>.py`. Raises PluginError."""
    return plugin.load("experiments.datasets", name, Recipe)


def save(examples: Sequence[Example], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(example.model_dump_json() + "\n" for example in examples), encoding="utf-8")


def kind_of(example: Pair | Conversation) -> Provides:
    """What a recipe that makes such examples provides."""
    return "pairs" if isinstance(example, Pair) else "conversations"


def load(path: Path, provides: Provides) -> list[Any]:
    """Read what `save` wrote, or a file written by hand in the same form.

    Raises DatasetError naming file and line: not UTF-8, not JSON (a line cut off), a missing side, a duplicated id.
    """
    kind: type[Pair] | type[Conversation] = Pair if provides == "pairs" else Conversation
    examples: list[Any] = []
    seen: set[str] = set()
    # Only the newline ends a line: str.splitlines would also cut at U+2028, which JSON strings may hold.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line.decode("utf-8"))
            example = kind.model_validate(data)
        except ValidationError as error:
            problem = problems_of(error, kind, data)[0]
            reason = f"{problem.field}: {problem.text}" if problem.path else problem.text
            raise DatasetError(f"{path}:{number}: not a {kind.__name__}: {reason}") from error
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{path}:{number}: not a {kind.__name__}: {_reason(error)}") from error
        if example.id in seen:
            raise DatasetError(f"{path}:{number}: duplicated id {example.id!r}; ids must be unique")
        seen.add(example.id)
        examples.append(example)
    if not examples:
        raise DatasetError(f"{path}: no examples; at least one is needed")
    return examples


def _reason(error: Exception) -> str:
    """Why a line could not be read, in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error} (is the line cut off?)"
    if isinstance(error, RecursionError):
        return "nested too deep; write plain data"
    return f"{error}; save the file as UTF-8"
