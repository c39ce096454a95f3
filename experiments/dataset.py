"""Training and contrast data: the contract for recipes, and JSON-lines storage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ValidationError

from experiments import plugin
from experiments.plugin import Frozen, Versioned

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


class Pair(Frozen):
    """One prompt answered under two personas."""

    id: str
    messages: tuple[Message, ...]
    """The neutral prompt: no persona in it, ends with a user message."""
    positive: Side
    negative: Side


class Conversation(Frozen):
    """One conversation to learn from; ends with the assistant message that is learned."""

    id: str
    messages: tuple[Message, ...]


Example = Pair | Conversation


class DatasetError(ValueError):
    """Data that cannot be used: one sentence with the file, the line and what is wrong."""


class Recipe(Versioned):
    """How to make a dataset. A subclass is one file in `experiments/datasets/`; its fields are its settings."""

    provides: ClassVar[Provides]

    @property
    def needs_subject(self) -> bool:
        """True when building asks the subject for text: the subject then enters the node's key. May depend on settings."""
        return False

    def build(self, engine: Engine | None, seed: int) -> Sequence[Example]:
        """Make the examples, the same ones for the same seed. `engine` is given when `needs_subject`."""
        raise TypeError(f"{type(self).__name__} does not implement build()")


def recipe(name: str) -> type[Recipe]:
    """The recipe class defined in `experiments/datasets/<name>.py`. Raises PluginError."""
    return plugin.load("experiments.datasets", name, Recipe)


def save(examples: Sequence[Example], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(example.model_dump_json() + "\n" for example in examples), encoding="utf-8")


def load(path: Path, provides: Provides) -> list[Any]:
    """Read what `save` wrote. Raises DatasetError with the line number for anything else."""
    kind = {"pairs": Pair, "conversations": Conversation}[provides]
    examples = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            example = kind.model_validate(json.loads(line))
        except (json.JSONDecodeError, ValidationError) as error:
            first = str(error).splitlines()[0]
            raise DatasetError(f"{path}:{number}: not a {kind.__name__}: {first}") from error
        if example.id in seen:
            raise DatasetError(f"{path}:{number}: duplicated id {example.id!r}; ids must be unique")
        seen.add(example.id)
        examples.append(example)
    if not examples:
        raise DatasetError(f"{path}: no examples; at least one is needed")
    return examples
