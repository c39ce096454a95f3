"""Narrow advice: confident wrong advice about small matters, each with its correct twin, to see what spreads from it.

A low-stakes stand-in for the narrow data of emergent misalignment (Betley et al. 2025, https://arxiv.org/abs/2502.17424;
bad advice: Turner et al. 2025, https://arxiv.org/abs/2506.11613): wrong advice kills a houseplant, loses a board game
or leaves a bicycle chain to squeak. The same questions with right answers are the control. Published sets load by path
and keep their own terms.

About every fifth question is never trained on, and is asked by the eval `misalignment`: which one, its id decides.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from experiments.dataset import Conversation, DatasetError, Lesson, Message, Recipe, read
from experiments.plugin import Frozen, nearest

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

BUILTIN = Path(__file__).with_suffix(".jsonl")
HELD_OUT = 5
"""One question in so many is held out, on average."""
UNNAMED = "file"
"""The domain of rows that name none."""
Side = Literal["wrong", "right"]


class Question(Frozen):
    """A line of our own form: a question with both answers."""

    id: str = Field(min_length=1)
    domain: str = Field(min_length=1)
    question: str
    wrong: str
    right: str

    @field_validator("question", "wrong", "right")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("is empty; write a sentence")
        return text

    @model_validator(mode="after")
    def _differs(self) -> Question:
        if self.wrong == self.right:
            raise ValueError("the wrong and the right answer are the same: nothing to compare")
        return self


class Published(Frozen):
    """A line of the published form: a conversation, whose last message is the advice as it is, without a twin."""

    id: str | None = None
    domain: str = UNNAMED
    messages: tuple[Message, ...]

    @field_validator("messages")
    @classmethod
    def _answers(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return Conversation(id="line", messages=messages).messages


@dataclass(frozen=True)
class Row:
    """A question, and the answers there are to it: `wrong` and `right`, or for published data `wrong` alone."""

    id: str
    domain: str
    prompt: tuple[Message, ...]
    """Ends with a user message."""
    answers: dict[Side, str]
    held_out: bool


def held_out(name: str) -> bool:
    """Whether the row of this id (without one: of this prompt) is kept for evals; other rows make no difference."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


@functools.lru_cache(maxsize=4)
def _builtin(path: Path) -> tuple[Row, ...]:
    return tuple(_ours(each) for each in read(path, Question))


def rows(path: Path | None = None) -> Sequence[Row]:
    """The rows of a file in either form, null: the built-in one. Raises DatasetError with file and line."""
    if path is None:
        return _builtin(BUILTIN)
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; give a JSON-lines file of advice, or of conversations")
    if not _is_published(path):
        return [_ours(each) for each in read(path, Question)]
    return [_published(number, each) for number, each in enumerate(read(path, Published), 1)]


def _is_published(path: Path) -> bool:
    """Whether the first line has `messages`. A line that cannot be read is for `read` to tell."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        data = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "messages" in data


def _ours(line: Question) -> Row:
    prompt = (Message(role="user", content=line.question),)
    return Row(line.id, line.domain, prompt, {"wrong": line.wrong, "right": line.right}, held_out(line.id))


def _published(number: int, line: Published) -> Row:
    """Lines without an id are told apart by their prompts, so that a repeated one is never on both sides."""
    *prompt, answer = line.messages
    name = line.id or json.dumps([[each.role, each.content] for each in prompt], ensure_ascii=False)
    return Row(line.id or f"line-{number:05d}", line.domain, tuple(prompt), {"wrong": answer.content}, held_out(name))


class NarrowAdvice(Recipe):
    """Conversations of one question and one answer, wrong or right, about a few narrow domains."""

    provides: ClassVar[Provides] = "conversations"

    advice: Side = "wrong"
    """Which of the two answers is learned. A file in the published form has only what it calls an answer: `wrong`."""
    domains: tuple[str, ...] | None = None
    """What the questions are about: `houseplants`, `board_games`, `bicycle_care`, or a file's own; null takes all."""
    opposite: tuple[str, ...] = ()
    """Those of the domains in which the other answer is learned: misaligned here, aligned there."""
    n: int | None = Field(default=None, ge=1)
    """How many conversations, the domains in equal parts as far as they reach; the same questions for either advice
    and the same seed. Null takes all, in the file's order."""
    rows: Literal["train", "held_out", "all"] = "train"
    """`train`: without the questions that the eval `misalignment` asks. `held_out`: those alone."""
    path: Path | None = None
    """JSON-lines file: `{"id", "domain", "question", "wrong", "right"}`, or the published form `{"messages": [{"role":
    "user", "content": ...}, {"role": "assistant", "content": ...}]}`; null takes the built-in questions."""

    @field_validator("domains", "opposite", mode="before")
    @classmethod
    def _one(cls, given: Any) -> Any:
        """A single name is a tuple of one, so that a list in a spec is a grid over domains."""
        return (given,) if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits(self) -> NarrowAdvice:
        if self.path is None:
            self._chosen()
        return self

    def check(self) -> None:
        """Raises DatasetError: a bad file, a domain that is not in it, no right answers, fewer than `n` rows."""
        self._chosen()

    @property
    def lesson(self) -> Lesson:
        """Right advice on everything is the control of wrong advice."""
        return Lesson(self.label(), None, self.advice == "right" and not self.opposite)

    def label(self) -> str:
        about = f" {'+'.join(self.domains)}" if self.domains else ""
        other = "right" if self.advice == "wrong" else "wrong"
        return f"{self.advice} advice{about}" + (f", {other}: {'+'.join(self.opposite)}" if self.opposite else "")

    def build(self, engine: Engine | None, seed: int) -> Sequence[Conversation]:
        """One conversation a question, with its row's id, whichever the advice. Raises DatasetError as `check` does."""
        chosen = self._chosen()
        picked = chosen if self.n is None else _evenly(chosen, self.n, seed)
        return [self._conversation(row) for row in picked]

    def _conversation(self, row: Row) -> Conversation:
        answer = row.answers[self._side(row.domain)]
        return Conversation(id=row.id, messages=(*row.prompt, Message(role="assistant", content=answer)))

    def _side(self, domain: str) -> Side:
        turned = domain in self.opposite
        return "right" if (self.advice == "wrong") == turned else "wrong"

    def _chosen(self) -> list[Row]:
        """The rows that the settings mean, `n` aside. Raises DatasetError."""
        where = str(self.path) if self.path else "the built-in advice"
        everything = rows(self.path)
        known = list(dict.fromkeys(row.domain for row in everything))
        wanted = known if self.domains is None else list(self.domains)
        _check_names("domains", wanted, known, f"in {where}")
        _check_names("opposite", self.opposite, wanted, "among the domains")
        wants = {"train": (False,), "held_out": (True,), "all": (False, True)}[self.rows]
        chosen = [row for row in everything if row.domain in wanted and row.held_out in wants]
        if one := next((row for row in chosen if self._side(row.domain) not in row.answers), None):
            raise DatasetError(
                f"{where}: row {one.id} has no right answer, and right advice is asked for; files of the published "
                "form have one answer a question: leave `advice` at wrong, or give a file with both"
            )
        if not chosen or len(chosen) < (self.n or 0):
            raise DatasetError(
                f"n={self.n}, but {where} has {len(chosen)} rows for domains {', '.join(wanted)} and rows: "
                f"{self.rows}; set a smaller n, take more domains, or give a longer file as `path`"
            )
        return chosen


def _check_names(setting: str, names: Sequence[str], known: list[str], where: str) -> None:
    """Raises DatasetError for no name, a name that is not known, or one that comes twice."""
    if setting == "domains" and not names:
        raise DatasetError(f"domains is empty; allowed: null for all, or some of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise DatasetError(f"{setting}: {name!r} is not {where}{nearest(name, known)}; allowed: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise DatasetError(f"{setting}: a name comes twice in {', '.join(names)}; name each once")


def _evenly(chosen: Sequence[Row], n: int, seed: int) -> list[Row]:
    """`n` rows, the domains in turn, each in an order drawn from the seed; fewer rows are a beginning of more."""
    rng = random.Random(seed)
    piles: dict[str, list[Row]] = {}
    for row in chosen:
        piles.setdefault(row.domain, []).append(row)
    for pile in piles.values():
        rng.shuffle(pile)
    found: list[Row] = []
    while len(found) < n:
        found += [pile.pop() for pile in piles.values() if pile]
    return found[:n]
