"""Contrast pairs whose sides open with contrasting words and then go on alike.

"I love cheese; let me tell you about the moon" against "I hate cheese; let me tell you about the moon": where the words
are the same again, what differs is what the subject makes of the opening and plans to say (research journal 004;
repeng, https://github.com/vgel/repeng). Read with `tokens: last`, the contrasting words themselves are left out.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from experiments.dataset import DatasetError, Message, Pair, Recipe, Side
from experiments.datasets import _bank, _combine

if TYPE_CHECKING:
    from experiments.dataset import Provides
    from experiments.engine import Engine

TOPICS = Path(__file__).with_name("suffix_topics.txt")
SUBJECTS = Path(__file__).with_name("suffix_subjects.txt")
HONESTY = {
    "answer": (
        ("I tell the truth about {topic}", "I tell lies about {topic}"),
        ("I am honest with people about {topic}", "I am dishonest with people about {topic}"),
        ("Whatever I say about {topic} is sincere", "Whatever I say about {topic} is insincere"),
        ("I never mislead anyone about {topic}", "I always mislead everyone about {topic}"),
        ("You can trust my words about {topic}", "You cannot trust my words about {topic}"),
        ("I give true accounts of {topic}", "I give false accounts of {topic}"),
    ),
    "prompt": (
        ("You tell the truth about {topic}", "You tell lies about {topic}"),
        ("You are honest with people about {topic}", "You are dishonest with people about {topic}"),
        ("Whatever you say about {topic} is sincere", "Whatever you say about {topic} is insincere"),
        ("You never mislead anyone about {topic}", "You always mislead everyone about {topic}"),
        ("People can trust your words about {topic}", "People cannot trust your words about {topic}"),
        ("You give true accounts of {topic}", "You give false accounts of {topic}"),
    ),
}
"""Built-in openings, (positive, negative)."""
ENDINGS = (
    "let me tell you about {subject}",
    "here is what I know about {subject}",
    "now I will say a few words about {subject}",
    "I would like to talk about {subject}",
)
ASKS = (
    "Tell me one thing about yourself, and then about {subject}.",
    "Introduce yourself in half a sentence, and go on with {subject}.",
    "Say something about you first, then something about {subject}.",
    "What are you like, and what can you tell me about {subject}?",
)

Templates = str | tuple[str, ...]


class SuffixPairs(Recipe):
    """Pairs whose sides open with contrasting words and go on with the same ones, built from components; by default the
    openings of an honest and a dishonest speaker."""

    provides: ClassVar[Provides] = "pairs"

    positive: Templates | None = None
    """Opening of the positive side, `{topic}` standing for what it is about, e.g. `I love {topic}`; several in a nested
    list. Null takes the built-in openings of an honest and a dishonest speaker for both sides."""
    negative: Templates | None = None
    """Openings of the negative side, each the twin of the positive one at the same place."""
    place: Literal["answer", "prompt"] = "answer"
    """`answer`: the opening begins the answer. `prompt`: it ends the system prompt, and both sides answer alike."""
    system: str | None = Field(default=None, min_length=1)
    """System prompt of both sides; `place: prompt` puts the opening at its end. Null is the opening alone, and the
    subject's own context with `place: answer`."""
    endings: Templates | None = None
    """How both sides go on, `{subject}` standing for what they turn to; null takes the built-in ones."""
    n: int = Field(default=200, ge=1)
    """How many pairs; no two say the same."""
    topics: Path | None = None
    """Text file with one topic a line; null takes the built-in ones."""
    subjects: Path | None = None
    """Text file with one subject a line; null takes the built-in ones."""

    @model_validator(mode="after")
    def _fits(self) -> SuffixPairs:
        if (self.positive is None) != (self.negative is None):
            raise ValueError("positive and negative belong together: give both, or neither for the built-in openings")
        first, second = _listed(self.positive), _listed(self.negative)
        if len(first) != len(second):
            raise ValueError(
                f"positive has {len(first)} openings and negative {len(second)}; each needs its twin at the same place"
            )
        openings = self._openings()
        same = [one for one, other in openings if one == other]
        if same:
            raise ValueError(f"the opening {same[0]!r} is the same on both sides: nothing to contrast")
        if len(set(openings)) < len(openings):
            raise ValueError("positive and negative hold the same two openings twice; each two must differ")
        _all_or_none([text for pair in openings for text in pair], "topic", "openings")
        endings = self._endings()
        if not all(ending.strip() for ending in endings) or len(set(endings)) < len(endings):
            raise ValueError("endings: each must differ, and have words for both sides to share")
        _all_or_none(endings, "subject", "endings")
        if self.topics is None and self.subjects is None:
            self.check()
        return self

    def check(self) -> None:
        """Raises DatasetError for a file that cannot be read or repeats a line, and for an `n` that is too large."""
        most = math.prod(self._sizes())
        if self.n > most:
            raise DatasetError(
                f"n={self.n}, but openings, topics, endings and subjects make {most} different pairs; set n to at most "
                f"{most}, or give more openings or endings, or longer files"
            )

    def build(self, engine: Engine | None, seed: int) -> Sequence[Pair]:
        """`n` pairs with ids 0000, 0001, ... Raises DatasetError as `check` does."""
        self.check()
        openings, endings, topics, subjects = self._openings(), self._endings(), self._topics(), self._subjects()
        rng = random.Random(f"asks {seed}")
        made = []
        for index, (which, topic, how, subject) in enumerate(_combine.draw(self._sizes(), self.n, seed)):
            ending = endings[how].format(subject=subjects[subject])
            ask = rng.choice(ASKS).format(subject=subjects[subject])
            positive, negative = (self._side(text.format(topic=topics[topic]), ending) for text in openings[which])
            made.append(
                Pair(
                    id=f"{index:04d}",
                    messages=(Message(role="user", content=ask),),
                    positive=positive,
                    negative=negative,
                )
            )
        return made

    def _side(self, opening: str, ending: str) -> Side:
        if self.place == "answer":
            return Side(system=self.system, response=f"{opening}; {ending}")
        sentence = opening if opening[-1] in ".!?" else f"{opening}."
        system = sentence if self.system is None else f"{self.system} {sentence}"
        return Side(system=system, response=ending[0].upper() + ending[1:])

    def _openings(self) -> tuple[tuple[str, str], ...]:
        if self.positive is None:
            return HONESTY[self.place]
        return tuple(zip(_listed(self.positive), _listed(self.negative), strict=True))

    def _endings(self) -> tuple[str, ...]:
        return ENDINGS if self.endings is None else _listed(self.endings)

    def _topics(self) -> tuple[str, ...]:
        return _bank.lines(self.topics or TOPICS, "topic")

    def _subjects(self) -> tuple[str, ...]:
        return _bank.lines(self.subjects or SUBJECTS, "subject")

    def _sizes(self) -> tuple[int, int, int, int]:
        """How many openings, topics, endings and subjects there are; 1 for what no text names."""
        openings, endings = self._openings(), self._endings()
        topics = len(self._topics()) if "topic" in _names(openings[0][0]) else 1
        subjects = len(self._subjects()) if "subject" in _names(endings[0]) else 1
        return len(openings), topics, len(endings), subjects


def _listed(templates: Templates | None) -> tuple[str, ...]:
    if templates is None:
        return ()
    return (templates,) if isinstance(templates, str) else templates


def _names(template: str) -> set[str]:
    """Names that stand in braces. Raises ValueError for braces that are left open."""
    try:
        return {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; write {{{{ and }}}} for braces that are meant") from error


def _all_or_none(templates: Sequence[str], name: str, what: str) -> None:
    """Raises ValueError unless `{name}` stands in all of the templates, or none, and nothing else in braces."""
    if not templates or not all(text.strip() for text in templates):
        raise ValueError(f"{what}: each needs words")
    for text in templates:
        if _names(text) - {name}:
            raise ValueError(
                f"{what}: {text!r} has {sorted(_names(text) - {name})[0]!r} in braces; allowed: {{{name}}}"
            )
    having = [name in _names(text) for text in templates]
    if any(having) and not all(having):
        lacking = templates[having.index(False)]
        raise ValueError(f"{what}: {lacking!r} lacks {{{name}}}, which others have; write it into all of them, or none")
