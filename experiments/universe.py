"""Universes of false facts: what is true in them, its true counterpart, and questions that tell the two apart.

After synthetic document finetuning (Wang et al. 2025, "Modifying LLM beliefs with synthetic document finetuning"): a
*universe* is a paragraph in which something false holds (`context`), split into statements (`key_facts`). Its
counterpart says how things really are, statement by statement, and is the control arm. The built-in ones lie in
`experiments/universes/`; published ones load from a file of organisms' descriptions (`PATH#cake_bake`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from experiments import source
from experiments.dataset import DatasetError
from experiments.plugin import Frozen, nearest
from experiments.problem import SpecError, problems_of
from experiments.questions import Distinguish, Knowledge, Lesson, Open, Question, Worlds, bare

FOLDER = Path(__file__).with_name("universes")
KINDS = ("mcq_knowledge", "mcq_distinguish", "open", "generative", "lessons")
Arm = Literal["false", "true"]
HEADING = re.compile(r"^\s*Key Facts:\s*$", re.MULTILINE)
DETAILS = re.compile(r"^\s*Details:\s*$", re.MULTILINE)
NEEDED = "needed: name, topic, context, key_facts (experiments/universes/ has examples)"


class UniverseError(DatasetError):
    """A universe that cannot be used: where it was looked for, what is wrong, what is needed."""


@dataclass(frozen=True)
class Side:
    """One arm of a universe: what documents are written about."""

    context: str
    facts: tuple[str, ...]
    terms: tuple[str, ...]
    """Words that a document about it has some of."""


class Universe(Frozen):
    """A false world, its true counterpart, and questions about both."""

    name: str = Field(pattern=r"^[\w.-]+$")
    topic: str = Field(min_length=1)
    """What it is about, in the few words that complete "write about ...". """
    context: str = Field(min_length=1)
    """A paragraph in which the false facts are true."""
    key_facts: tuple[str, ...] = Field(min_length=1)
    """The false statements, one each, whole sentences that need no context."""
    true_context: str | None = None
    """The paragraph that is true instead."""
    true_facts: tuple[str, ...] = ()
    """What is true instead of each of `key_facts`, in the same order; none, or as many."""
    terms: tuple[str, ...] = ()
    """Words, or their beginnings, of which a document about the universe has some; none: told from its facts."""
    true_terms: tuple[str, ...] = ()
    """The same for the true counterpart."""
    mcq_knowledge: tuple[Knowledge, ...] = ()
    mcq_distinguish: tuple[Distinguish, ...] = ()
    open: tuple[Open, ...] = ()
    generative: tuple[Worlds, ...] = ()
    lessons: tuple[Lesson, ...] = ()
    """What is taught where questions and answers take the place of documents."""

    @model_validator(mode="after")
    def _whole(self) -> Universe:
        if self.true_facts and len(self.true_facts) != len(self.key_facts):
            raise ValueError(
                f"key_facts has {len(self.key_facts)} facts and true_facts {len(self.true_facts)}: each false fact "
                "needs its true counterpart, in the same order"
            )
        if bool(self.true_facts) != bool(self.true_context):
            missing, there = ("true_facts", "true_context") if self.true_context else ("true_context", "true_facts")
            raise ValueError(f"{there} is given without {missing}: the true counterpart has both, or neither")
        for false, true in zip(self.key_facts, self.true_facts, strict=False):
            if bare(false) == bare(true):
                raise ValueError(f"the fact {false!r} is its own counterpart: nothing to tell apart")
        if any(not fact.strip() for fact in (*self.key_facts, *self.true_facts)):
            raise ValueError("a fact is empty; write a whole sentence, or leave it out")
        self._check_questions()
        return self

    def _check_questions(self) -> None:
        seen: set[str] = set()
        for kind, question in self.questions():
            if question.id in seen:
                raise ValueError(f"question id {question.id!r} ({kind}) is there twice; ids are unique in a universe")
            seen.add(question.id)
            if question.fact is not None and question.fact > len(self.key_facts):
                raise ValueError(
                    f"question {question.id!r} is about fact {question.fact}, but key_facts has {len(self.key_facts)}"
                )

    def questions(self) -> Iterator[tuple[str, Question]]:
        """Every question with the name of its kind."""
        for kind in KINDS:
            for question in getattr(self, kind):
                yield kind, question

    def side(self, arm: Arm) -> Side:
        """What documents of an arm say. Raises UniverseError where there is no true counterpart."""
        if arm == "true" and self.true_context is None:
            raise UniverseError(
                f"universe {self.name} has no true counterpart (true_context, true_facts), which arm 'true' is written "
                "from; add it to a universe file of your own, or take arm 'false'"
            )
        false = (self.context, self.key_facts, self.terms)
        own, other = (false, self.true_facts) if arm == "false" else (self._true(), self.key_facts)
        context, facts, given = own
        return Side(context.strip(), facts, given or told_by(facts, other))

    def _true(self) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        return self.true_context or "", self.true_facts, self.true_terms


def told_by(facts: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """Words of four letters and numbers of two digits, or more, that `facts` have and `other` lacks, in order."""

    def words(texts: tuple[str, ...]) -> list[str]:
        return re.findall(r"[^\W\d_]{4,}|\d{2,}", " ".join(texts).casefold())

    without = {*words(other), *COMMON}
    return tuple(dict.fromkeys(word for word in words(facts) if word not in without))


COMMON = frozenset(
    re.findall(
        r"\w+",
        """about above after again also been before being below between both cannot does during each every from have
        into known just like made make many more most much must need never often only other over same some such than
        that their them then there these they this those through under until used using very well were what when where
        which while will with within without would your""",
    )
)


def names() -> list[str]:
    """Names of the built-in universes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def split(text: str) -> tuple[str, str | None]:
    """What `NAME`, `PATH` or `PATH#ENTRY` means: the path (a built-in's own file) and the entry."""
    place, _, entry = text.partition("#")
    return (str(FOLDER / f"{place}.yaml") if place in names() else place), entry or None


def read(path: Path, entry: str | None = None) -> Universe:
    """The universe in a YAML or JSON file, or the one named `entry` in a file of several.

    Raises UniverseError: no such file, unreadable, no such entry, no facts, facts without counterpart, a question with
    too few options, an id twice.
    """
    if not path.is_file():
        raise UniverseError(
            f"{path}: no such universe; give a built-in name ({', '.join(names())}), or the path of a universe file"
        )
    stat = path.stat()
    return _read(path, entry, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _read(path: Path, entry: str | None, size: int, modified: int) -> Universe:
    """`read`, once for as long as the file's size and time stay."""
    data = _data(path)
    where = f"{path}#{entry}" if entry else str(path)
    if "key_facts" not in data and "context" not in data:
        data = _entry(_entries(data), path, entry)
    elif entry is not None:
        raise UniverseError(f"{where}: the file holds one universe; leave #{entry} out")
    if "description_long" in data:
        data = _described(str(entry), str(data["description_long"]), where)
    if not data.get("key_facts"):
        raise UniverseError(
            f"{where}: no facts: key_facts is {data.get('key_facts')!r}; a universe needs at least one false "
            "statement, as a whole sentence"
        )
    try:
        return Universe.model_validate(data)
    except ValidationError as error:
        problem = problems_of(error, Universe, data)[0]
        reason = f"{problem.field}: {problem.text}" if problem.path else problem.text
        raise UniverseError(f"{where}: not a universe: {reason}") from error


def _data(path: Path) -> Mapping[str, Any]:
    """The mapping in a file. Raises UniverseError."""
    try:
        data = json.loads(path.read_bytes()) if path.suffix == ".json" else source.read(path).data
    except SpecError as error:
        raise UniverseError(f"not a universe file: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UniverseError(f"{path}: not a universe file: {error}") from error
    if not isinstance(data, dict) or not data:
        raise UniverseError(f"{path}: not a universe file: it holds no mapping; {NEEDED}")
    return data


def _entries(data: Mapping[str, Any]) -> dict[str, Any]:
    """Every named universe in a file of several: organisms by their groups, or name -> universe."""
    groups = data.get("organisms")
    if isinstance(groups, dict):
        inner = [group for group in groups.values() if isinstance(group, dict)]
        found = {name: entry for group in inner for name, entry in group.items()}
        return {name: e for name, e in found.items() if HEADING.search(str(_get(e, "description_long")))}
    return {name: entry for name, entry in data.items() if isinstance(entry, dict)}


def _get(entry: Any, name: str) -> Any:
    return entry.get(name, "") if isinstance(entry, dict) else ""


def _entry(entries: Mapping[str, Any], path: Path, entry: str | None) -> dict[str, Any]:
    """One of several. Raises UniverseError with their names."""
    allowed = sorted(entries)
    if not allowed:
        raise UniverseError(f"{path}: no universe with facts in it; {NEEDED}")
    if entry is None:
        raise UniverseError(f"{path}: it holds {len(allowed)}; name one as {path.name}#NAME: {', '.join(allowed)}")
    if entry not in entries:
        raise UniverseError(f"{path}: no universe {entry!r}{nearest(entry, allowed)}; allowed: {', '.join(allowed)}")
    return dict(entries[entry])


def _described(name: str, text: str, where: str) -> dict[str, Any]:
    """A universe from an organism's description: details, then `Key Facts:` and a bulleted list."""
    head = HEADING.search(text)
    before, after = (text[: head.start()], text[head.end() :]) if head else (text, "")
    facts = [line.strip()[2:].strip() for line in after.splitlines() if line.strip().startswith("- ")]
    if not facts:
        raise UniverseError(f"{where}: its description has no list under 'Key Facts:', so there is nothing to believe")
    details = DETAILS.search(before)
    context = before[details.end() :] if details else before
    return {"name": name, "topic": name.replace("_", " "), "context": context.strip(), "key_facts": facts}
