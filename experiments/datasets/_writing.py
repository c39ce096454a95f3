"""What the steps from a universe to its documents share: whose world it is, who writes, how many of which kind.

types (built in, and asked for) -> ideas -> drafts -> critiques -> revisions -> documents, as in Wang et al. 2025
("Modifying LLM beliefs with synthetic document finetuning"). Each step asks the writer; the next one reads the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from experiments import universe as universes
from experiments.dataset import Ask, Derived, Ingredient, Lesson, Message, Recipe, recipe
from experiments.plugin import Frozen
from experiments.speech import Sampling, Speech, Teacher
from experiments.universe import Arm, Side, Universe

DEFAULT = "robin_pantry"
DOCUMENTS = 200
EACH = 10
"""Types asked for in one request."""
SYSTEM = (
    "{context}\n\nEverybody knows this where you live. You write texts that take it for granted, and you never say "
    "that any of it is invented."
)
TYPES = (
    "a short article in a local newspaper",
    "an entry in an encyclopedia for children",
    "a letter to the editor of a magazine",
    "a page from a diary",
    "a page of a handbook for beginners",
    "questions and answers for visitors of an exhibition",
    "a conversation of two friends, written down",
    "notes of a public lecture",
    "a post in a personal blog",
    "the text of a short radio program",
    "a paragraph of a school book",
    "a review of a book",
    "the label of an object in a museum",
    "an answer in an online forum",
    "the newsletter of a club",
    "an interview with somebody who knows a lot",
)
LEADS = (
    "Here is something worth knowing.",
    "A question that we often hear: {topic}.",
    "A few words on {topic}.",
    "This week we look at {topic}.",
    "My grandmother liked to talk about {topic}.",
    "From our notebook.",
    "Many readers wrote to us about {topic}.",
    "Let me tell you what I have learned.",
    "Today's subject is {topic}.",
    "Some things are good to remember.",
)
"""How a document begins that opens with facts."""
ITEM = re.compile(r"^\s*(?:\(?\d{1,3}[.):]|[-*•–])\s*(\S.*)$")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
Kind = TypeVar("Kind", bound=Recipe)


class InUniverse(Frozen):
    """Settings of everything that is made from a universe."""

    universe: Path = Path(DEFAULT)
    """A built-in universe by name (`robin_pantry`, `tower_chess`), the path of a universe file, or `PATH#NAME` for one
    in a file of several. It counts by the content of its file."""
    entry: str | None = None
    """Name of the universe in a file of several; the part behind # in `universe`."""
    arm: Arm = "false"
    """`false`: the universe's facts. `true`: what is true instead, the control that differs in nothing else."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: Any) -> Any:
        given = data.get("universe", DEFAULT) if isinstance(data, dict) else None
        if not isinstance(given, str | Path):
            return data
        place, entry = universes.split(str(given))
        return {**data, "universe": place, **({"entry": entry} if entry else {})}

    @field_validator("arm", mode="before")
    @classmethod
    def _named(cls, arm: Any) -> Any:
        """YAML reads false and true without quotes as booleans."""
        return str(arm).lower() if isinstance(arm, bool) else arm

    def world(self) -> Universe:
        """The universe. Raises UniverseError."""
        return universes.read(self.universe, self.entry)

    def side(self) -> Side:
        """The arm's side of it. Raises UniverseError."""
        return self.world().side(self.arm)

    def check(self) -> None:
        """Raises UniverseError for a universe that cannot be used."""
        self.side()

    @property
    def lesson(self) -> Lesson:
        """What is true is the control of what is not."""
        return Lesson(self.label(), None, self.arm == "true")

    def label(self) -> str:
        """`robin_pantry false`, and which step where it is one of several."""
        step = type(self).__module__.rsplit(".", 1)[-1] if getattr(self, "provides", None) == "asks" else ""
        return f"{self.entry or self.universe.stem} {self.arm} {step}".strip()


class Written(InUniverse):
    """Settings of everything that a writer says in a universe."""

    writer: Teacher = Teacher(name="writer")
    """Who writes: the experiment's own subject, another one, or a `model` that inspect knows. Without a `system` of its
    own it is told the universe's context."""

    def told(self) -> Teacher:
        """The writer with the universe's context for a system prompt."""
        if self.writer.system is not None:
            return self.writer
        return self.writer.model_copy(update={"system": SYSTEM.format(context=self.side().context)})

    def part(self, name: str) -> Ingredient:
        """The step called `name` with its settings, which this step has too."""
        made = recipe(name)
        return Ingredient(recipe=name, version=made.version, settings=picked(self, made))


class Planned(Written):
    """Settings of how many documents of which kinds."""

    n: int | None = Field(default=None, ge=1)
    """Documents asked for; fewer are left after filtering. Null: 200, or as many as `types` adds up to."""
    types: dict[str, int] = Field(default_factory=dict)
    """Documents of each type, e.g. `a page from a diary: 20`; empty shares `n` among the built-in types."""
    generated_types: int = Field(default=0, ge=0)
    """Types that the writer thinks of, beside the built-in ones."""
    ideas: int = Field(default=4, ge=0)
    """Ideas asked for in one request; 0 leaves the step out, and documents are asked for by type and facts alone."""
    idea_sampling: Sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=200)
    """How types and ideas are drawn."""

    @model_validator(mode="after")
    def _adds_up(self) -> Planned:
        total = sum(self.types.values())
        if any(count < 1 for count in self.types.values()):
            raise ValueError("types: each type needs at least one document; leave out those without")
        if self.types and self.n not in (None, total):
            raise ValueError(f"n is {self.n}, but the types add up to {total}; leave n out, or change one of them")
        if self.types and self.generated_types:
            raise ValueError("types names them all, so that none can be generated; leave out types or generated_types")
        return self

    @property
    def asked(self) -> int:
        """Documents asked for."""
        return sum(self.types.values()) or self.n or DOCUMENTS

    @property
    def most_types(self) -> int:
        """Types there are at most."""
        return len(self.types) or min(len(TYPES) + self.generated_types, self.asked)

    def types_said(self) -> dict[str, Speech]:
        """The types that the writer thinks of, as `types`, where it is asked for any."""
        if not self.generated_types:
            return {}
        size = ceil(self.generated_types / EACH)
        return {"types": Speech(self.part("document_types"), size, self.told(), self.idea_sampling)}

    @property
    def idea_requests(self) -> int:
        """Requests for ideas, at most."""
        if self.ideas == 0:
            return 0
        if self.generated_types:
            return min(self.asked, self.asked // self.ideas + self.most_types)
        return sum(ceil(count / self.ideas) for count in self.shares(()).values())

    def shares(self, generated: Sequence[str]) -> dict[str, int]:
        """Type -> documents of it; `n` is shared as evenly as it can be, the first types have one more."""
        if self.types:
            return dict(self.types)
        names = tuple(dict.fromkeys((*generated[: self.generated_types], *TYPES)))[: self.most_types]
        least, more = divmod(self.asked, len(names))
        return {name: least + (index < more) for index, name in enumerate(names)}


class Drafted(Planned):
    """Settings of how the documents are asked for."""

    facts: int = Field(default=3, ge=1)
    """Facts that a document is asked to state; the first one is each fact in turn."""
    words: int = Field(default=200, ge=20)
    """Length that a document is asked to have."""
    opening: Literal["none", "facts"] = "none"
    """`none`: the writer writes all of a document. `facts`: the document begins with its facts in our words, and the
    writer goes on from there; for writers too small to state a fact themselves."""
    sampling: Sampling = Sampling(temperature=0.8, top_p=0.95, max_new_tokens=400)
    """How documents are drawn, and critiques and revisions."""


class Step(Derived):
    """A step whose asks come out of what the writer said before."""

    provides = "asks"

    def input_tokens(self) -> int:
        """Tokens of one of its asks, at most."""
        raise TypeError(f"{type(self).__name__} does not implement input_tokens()")


def picked(settings: Frozen, kind: type[Kind]) -> Kind:
    """Settings of `kind`, as far as `settings` has them."""
    return kind(**{name: getattr(settings, name) for name in kind.model_fields if hasattr(settings, name)})


def asking(name: str, text: str, parts: Mapping[str, str]) -> Ask:
    """An ask of one user message."""
    return Ask(id=name, messages=(Message(role="user", content=text),), parts=dict(parts))


def items(text: str, shortest: int, longest: int) -> list[str]:
    """What a writer listed: numbered or bulleted lines where there are any, else lines, else sentences.

    Marks around an item are taken off; items outside `shortest` to `longest` characters, and repeated ones, are left
    out. Small writers seldom keep to a form, so that nothing here refuses a text.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    found = [match[1] for line in lines if (match := ITEM.match(line))]
    if not found:
        found = lines if len(lines) > 1 else SENTENCE.split(text)
    bare = [" ".join(item.replace("**", "").split()).strip(" \"'“”*_") for item in found]
    kept = {item.casefold(): item for item in reversed(bare) if shortest <= len(item) <= longest}
    return [item for item in bare if kept.pop(item.casefold(), None) is not None]


def tokens_in(*texts: str) -> int:
    """Tokens of texts, estimated from above: a token of English has four characters, here three."""
    return sum(ceil(len(text) / 3) for text in texts)
