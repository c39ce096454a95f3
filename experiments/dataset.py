"""Training and contrast data: the contract for recipes, and JSON-lines storage."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from experiments import plugin
from experiments.plugin import Frozen, Versioned
from experiments.problem import problems_of

if TYPE_CHECKING:
    from experiments.engine import Engine
    from experiments.speech import Speech

Provides = Literal["pairs", "conversations", "documents", "choices", "asks"]
"""Kinds of examples. A spec's `data` takes all but `asks`, which are what other recipes have answered."""
Span = tuple[int, int]
"""A part of a text: its first character, and the one behind its last."""


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
    masked: tuple[Span, ...] = Field(default=(), exclude_if=operator.not_)  # stored forms without it stay as they were
    """Parts of the last message that carry no loss: characters (first, behind the last), in order. A token that holds
    one of them is read and not learned."""

    @field_validator("messages")
    @classmethod
    def _answers(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if len(messages) < 2 or messages[-1].role != "assistant" or not messages[-1].content.strip():
            raise ValueError("must end with a non-empty assistant message, which is learned, after another message")
        return messages

    @model_validator(mode="after")
    def _masks_what_there_is(self) -> Conversation:
        size, end = len(self.messages[-1].content), 0
        for first, stop in self.masked:
            if not end <= first < stop <= size:
                raise ValueError(
                    f"masked has the part [{first}, {stop}]; parts of the last message, which has {size:,} characters, "
                    "are [first character, character behind the last], in order and without overlap"
                )
            end = stop
        return self


class Document(Frozen):
    """Plain text to learn from, outside any chat."""

    id: str
    text: str

    @field_validator("text")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty: a document needs words to learn")
        return text


class Choices(Frozen):
    """A prompt, and how likely each of some first words of its answer is to be: what distillation learns."""

    id: str
    messages: tuple[Message, ...]
    """Ends with a user message."""
    logprobs: dict[str, float] = Field(min_length=2)
    """Natural log-probability of each option, a text that the answer may begin with."""


class Ask(Frozen):
    """A prompt that a teacher is to answer."""

    id: str
    messages: tuple[Message, ...]
    """Without a system message, which is the teacher's; ends with a user message."""
    parts: dict[str, str] = Field(default_factory=dict)
    """What it was built from: component -> the value that was drawn. Compliance is reported for each."""

    @field_validator("messages")
    @classmethod
    def _asks(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if not messages or messages[-1].role != "user":
            raise ValueError("must end with a user message, which is answered")
        return messages


class Said(Frozen):
    """What a teacher answered to an `Ask`."""

    id: str
    messages: tuple[Message, ...]
    parts: dict[str, str] = Field(default_factory=dict)
    text: str
    """As decoded, special tokens left out; may be empty."""
    stopped: bool
    """False where the limit of new tokens cut it off."""
    tokens: int
    options: dict[str, float] = Field(default_factory=dict)
    """Log-probability of each option, where these were asked for instead of text."""


Example = Pair | Conversation | Document | Choices | Ask
KINDS: Mapping[str, type[Frozen]] = {
    "pairs": Pair,
    "conversations": Conversation,
    "documents": Document,
    "choices": Choices,
    "asks": Ask,
}


@dataclass(frozen=True)
class Lesson:
    """What data are for."""

    name: str
    """What tables call it: the teacher, or what is taught."""
    trait: str | None = None
    """What is to be handed on: the eval's target for whoever learns it. None: the eval's own."""
    control: bool = False
    """True for data like the others' in all but what is to be handed on; who learned the others is compared with who
    learned these, seed by seed."""


class DatasetError(ValueError):
    """Data that cannot be used: one sentence with the file, the line and what is wrong."""


class Recipe(Versioned):
    """How to make a dataset. A subclass is one file in `experiments/datasets/`; its fields are its settings."""

    provides: ClassVar[Provides]
    is_control: ClassVar[bool] = False
    """True for data in which what is to be handed on was destroyed or cut up on purpose, such as shuffled answers."""
    grows: ClassVar[bool] = False
    """True where a larger `n` gives the same examples first, and any `n` can be had."""

    @property
    def lesson(self) -> Lesson | None:
        """What the data are for: what their teacher is, where they have one. None for data without a purpose of their
        own, whose students are compared with the untouched subject."""
        teacher = getattr(self, "teacher", None)
        return None if teacher is None else Lesson(teacher.name, teacher.trait, teacher.control)

    @property
    def needs_subject(self) -> bool:
        """True when building asks the subject for text, so that the subject enters the key; may depend on settings."""
        return False

    @property
    def masks(self) -> bool:
        """True where parts of responses carry no loss: detectors, which read all of them, have nothing to add."""
        return False

    def check(self) -> None:
        """Read the files that the settings name, so that bad data is told before anything runs. Raises DatasetError."""

    def contexts(self) -> frozenset[str | None]:
        """System prompts in which what is learned was said, as students see them; None is the subject's own context.

        () for data without a chat. Asked by plans, after `check`. Raises DatasetError.
        """
        return frozenset({None} if self.provides != "documents" else ())

    def build(self, engine: Engine | None, seed: int) -> Sequence[Example]:
        """Make the examples, the same ones for the same seed. `engine` is given when `needs_subject`."""
        raise TypeError(f"{type(self).__name__} does not implement build()")

    def label(self) -> str:
        """Short name for tables; the recipe's id where nothing better is known."""
        return type(self).__module__.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Made:
    """What a recipe made of other data, and what it has to tell about it."""

    examples: Sequence[Example]
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Plain data for the record: how many were rejected and why, compliance by component, ..."""


class Derived(Recipe):
    """A recipe that makes its examples from other data: other recipes' examples, or what teachers said.

    A setting that names another recipe has the type `Ingredient`.
    """

    def sources(self) -> Mapping[str, Ingredient | Speech]:
        """Name -> what it is made from; each becomes work of its own, done once whoever else reads it."""
        raise TypeError(f"{type(self).__name__} does not implement sources()")

    def derive(self, given: Mapping[str, Sequence[Any]], seed: int) -> Made:
        """Make the examples. `given[name]` are the examples of an Ingredient, or `Said`s in the order of their asks;
        `given["judged/NAME"]` the `Ruling`s on what was said, for a Speech with a judge.

        Raises DatasetError where nothing usable is left.
        """
        raise TypeError(f"{type(self).__name__} does not implement derive()")

    def derive_with(self, engine: Engine | None, given: Mapping[str, Sequence[Any]], seed: int) -> Made:
        """What is called in a run: `derive`, unless a recipe that `needs_subject` overrides this one, and gets it."""
        return self.derive(given, seed)

    @property
    def masks(self) -> bool:
        """As what it is made from, for recipes that pass it on."""
        return any(each.settings.masks for each in self.sources().values() if isinstance(each, Ingredient))

    @property
    def lesson(self) -> Lesson | None:
        """Its own, else that of the first data it is made from that have one."""
        own = super().lesson
        parts = (each.settings.lesson for each in self.sources().values() if isinstance(each, Ingredient))
        return own or next((each for each in parts if each is not None), None)

    def contexts(self) -> frozenset[str | None]:
        """Those of all data it is made from, for recipes that pass them on."""
        parts = [each.settings.contexts() for each in self.sources().values() if isinstance(each, Ingredient)]
        return frozenset().union(*parts) if parts else super().contexts()

    def build(self, engine: Engine | None, seed: int) -> Sequence[Example]:
        raise TypeError(f"{type(self).__name__} is made from other data: use derive()")


class Ingredient(Frozen):
    """A recipe inside another one's settings; its settings are written beside its name."""

    recipe: str
    """Its name."""
    version: int = 1
    """The recipe's version, which enters the key."""
    settings: SerializeAsAny[Recipe]
    """Its settings."""

    def __str__(self) -> str:
        return self.settings.label()

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """Settings beside the recipe's name, or what an Ingredient was written as, become the recipe's own class."""
        if not isinstance(data, dict) or isinstance(data.get("settings"), Recipe):
            return data
        made = recipe(str(data.get("recipe")))
        own = data.get("settings")
        if own is None:
            own = {name: value for name, value in data.items() if name not in ("recipe", "version")}
        return {"recipe": data.get("recipe"), "version": made.version, "settings": made.model_validate(own)}


def recipe(name: str) -> type[Recipe]:
    """The recipe class defined in `experiments/datasets/<name>.py`. Raises PluginError."""
    return plugin.load("experiments.datasets", name, Recipe)


def save(examples: Sequence[Example | Said], path: Path) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(example.model_dump_json() + "\n" for example in examples), encoding="utf-8")


def kind_of(example: Example) -> Provides:
    """What a recipe that makes such examples provides."""
    found: Any = next(name for name, kind in KINDS.items() if isinstance(example, kind))
    return found


def load(path: Path, provides: Provides) -> list[Any]:
    """Examples of a kind, as `read` reads them."""
    return read(path, KINDS[provides])


def read(path: Path, kind: type[Frozen]) -> list[Any]:
    """Read what `save` wrote, or a file written by hand in the same form: objects of class `kind`, one a line.

    Raises DatasetError naming file and line: not UTF-8, not JSON (a line cut off), a missing side, a duplicated id.
    """
    examples: list[Any] = []
    seen: set[Any] = set()
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
        name = getattr(example, "id", None)
        if name is not None and name in seen:
            raise DatasetError(f"{path}:{number}: duplicated id {name!r}; ids must be unique")
        seen.add(name)
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
