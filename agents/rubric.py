"""What a judge is asked: a text file with a YAML head.

    ---
    version: 1
    scale: [0, 100]                 # or choices: {yes: 1, no: 0}
    unscored: {REFUSAL: refusal}    # words for "this is not for me", and what they mean
    fields: [claim]                 # further texts, taken from the sample's metadata
    ---
    ... {question} ... {answer} ... {claim} ...

How the judge is to reply is not the rubric's business: `prompt.py` adds it. Published judge prompts load from a JSON
document of the form `{"alignment_judgment": "... {prompt} ... {completion} ...", "coherency_judgment": ...}`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import source
from experiments.canonical import sha256
from experiments.plugin import nearest
from experiments.problem import SpecError, shown

HEAD = ("version", "scale", "choices", "unscored", "fields")
STANDARD = ("question", "answer")
LARGEST = 1000
"""The greatest number a scale may reach."""
PUBLISHED = {"aligned": "alignment_judgment", "coherent": "coherency_judgment"}
"""Role -> its key in the published document."""
PUBLISHED_WORDS = {"aligned": {"CODE": "code", "REFUSAL": "refusal"}, "coherent": {}}
_PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")
_WORD = re.compile(r"[^\W_](?:[\w -]*[^\W_])?")


class RubricError(ValueError):
    """A rubric that cannot be used: no such file, a bad head, or a text without a place for the answer."""


@dataclass(frozen=True)
class Rubric:
    """One rubric. Either `scale` (lowest, highest: whole numbers) or `choices` (name -> value) is given."""

    name: str
    version: int
    text: str
    scale: tuple[int, int] | None = None
    choices: Mapping[str, float] = field(default_factory=dict)
    unscored: Mapping[str, str] = field(default_factory=dict)
    """Word a judge may say instead of a verdict -> the reason it stands for."""
    fields: tuple[str, ...] = ()
    """Further places in the text, filled from the sample's metadata."""

    @property
    def digest(self) -> str:
        """Hex sha256 of everything a verdict depends on; neither the name nor the file's place."""
        head = {"version": self.version, "scale": self.scale, "choices": dict(self.choices)}
        rest = {"unscored": dict(self.unscored), "fields": self.fields, "text": self.text}
        return sha256(head | rest)

    def filled(self, question: str, answer: str, fields: Mapping[str, Any]) -> str:
        """The text with every place filled in, all at once: what is filled in is never looked at again.

        Raises RubricError for a field that the sample lacks.
        """
        given = {"question": question, "answer": answer}
        for name in self.fields:
            if not isinstance(fields.get(name), str):
                raise RubricError(
                    f"rubric {self.name}: the field {name!r} is {shown(fields.get(name))} in the sample's metadata; "
                    "it must be a text: this rubric does not belong to this eval"
                )
            given[name] = fields[name]
        return _PLACE.sub(lambda match: given[match[1]], self.text)


def load(path: Path, role: str | None = None) -> Rubric:
    """The rubric in a file. `role` (the file's stem if not given) picks a prompt of a published JSON document.

    Raises RubricError with the file and the line.
    """
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RubricError(f"{path}: cannot be read: {error.strerror or error}; give the path of a rubric") from error
    except UnicodeDecodeError as error:
        raise RubricError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if path.suffix == ".json":
        return published(raw, path, role or path.stem)
    return parse(raw, str(path), path.stem)


def parse(raw: str, where: str, name: str) -> Rubric:
    """The rubric in a text; `where` names it in messages. Raises RubricError."""
    parts = re.split(r"^---[ \t]*$", raw.replace("\r\n", "\n"), maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        raise RubricError(f"{where}: no head; a rubric begins with a line ---, YAML, and another line ---")
    if not parts[1].strip():
        raise RubricError(f"{where}: the head is empty; it needs version, and scale or choices")
    try:
        head = source.parse("\n" + parts[1].lstrip("\n"), where).data
    except SpecError as error:
        raise RubricError(str(error)) from error
    if not isinstance(head, dict):
        raise RubricError(f"{where}: the head is {shown(head)}; it must be a mapping with {', '.join(HEAD)}")
    for key in head:
        if key not in HEAD:
            raise RubricError(f"{where}: unknown key {key!r}{nearest(key, list(HEAD))}; allowed: {', '.join(HEAD)}")
    if ("scale" in head) == ("choices" in head):
        raise RubricError(f"{where}: the head needs either `scale: [0, 100]` or `choices: {{yes: 1, no: 0}}`")
    fields = _fields(head.get("fields", []), where)
    return Rubric(
        name,
        _version(head.get("version"), where),
        _text(parts[2], fields, where),
        scale=_scale(head["scale"], where) if "scale" in head else None,
        choices=_choices(head["choices"], where) if "choices" in head else {},
        unscored=_unscored(head.get("unscored", {}), head.get("choices", {}), where),
        fields=fields,
    )


def published(raw: str, path: Path, role: str) -> Rubric:
    """A judge prompt of a published document: 0 to 100, `{prompt}` and `{completion}`. Raises RubricError."""
    try:
        document = json.loads(raw)
    except json.JSONDecodeError as error:
        raise RubricError(f"{path}:{error.lineno}: not JSON ({error.msg}); is the file truncated?") from error
    if role not in PUBLISHED:
        raise RubricError(f"{path}: published prompts are for the roles {', '.join(PUBLISHED)}, not for {role!r}")
    text = document.get(PUBLISHED[role]) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise RubricError(f"{path}: no text under {PUBLISHED[role]!r}; give the published document or a rubric (.md)")
    text = text.replace("{prompt}", "{question}").replace("{completion}", "{answer}")
    words = PUBLISHED_WORDS[role]
    return Rubric(role, 1, _text(text, (), str(path)), scale=(0, 100), unscored=words)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _version(value: Any, where: str) -> int:
    if _whole(value) and value >= 1:
        return int(value)
    raise RubricError(f"{where}: version is {shown(value)}; it must be a whole number from 1")


def _scale(value: Any, where: str) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(_whole(each) for each in value):
        low, high = value
        if 0 <= low < high <= LARGEST:
            return low, high
    raise RubricError(f"{where}: scale is {shown(value)}; it must be two ascending whole numbers from 0 to {LARGEST}")


def _choices(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) < 2:
        raise RubricError(f"{where}: choices is {shown(value)}; it must name at least two, each with a number")
    for name, number in value.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise RubricError(f"{where}: the choice {name!r} has the value {shown(number)}; it must be a number")
    _distinct(value, where)
    return {name: float(number) for name, number in value.items()}


def _unscored(value: Any, choices: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(reason, str) and reason for reason in value.values()):
        raise RubricError(f"{where}: unscored is {shown(value)}; it must give words a reason: {{REFUSAL: refusal}}")
    for word in value:
        if re.fullmatch(r"[-+]?[0-9]+", word):
            raise RubricError(f"{where}: the unscored word {word!r} is a number; a verdict could not be told from it")
    _distinct([*value, *choices], where)
    return dict(value)


def _distinct(words: Iterable[str], where: str) -> None:
    """Words must look like words and differ by more than case."""
    seen: set[str] = set()
    for word in words:
        if not _WORD.fullmatch(word):
            raise RubricError(f"{where}: {word!r} cannot be a verdict; use letters, digits, space, - and _ inside")
        if word.casefold() in seen:
            raise RubricError(f"{where}: {word!r} comes twice (case does not count); a verdict must mean one thing")
        seen.add(word.casefold())


def _fields(value: Any, where: str) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not _PLACE.fullmatch(f"{{{name}}}") or name in STANDARD:
            raise RubricError(f"{where}: fields is {shown(value)}; it must be a list of names other than {STANDARD}")
    return tuple(names)


def _text(raw: str, fields: tuple[str, ...], where: str) -> str:
    text = raw.strip()
    found = set(_PLACE.findall(text))
    if "answer" not in found:
        raise RubricError(f"{where}: the text has no {{answer}}; the judge would not see what it is to judge")
    allowed = (*STANDARD, *fields)
    if unknown := sorted(found - set(allowed)):
        raise RubricError(
            f"{where}: the text has the place {{{unknown[0]}}}{nearest(unknown[0], list(allowed))}; allowed: "
            f"{', '.join(allowed)}; further ones are named in the head under fields"
        )
    if unused := sorted(set(fields) - found):
        raise RubricError(f"{where}: the field {unused[0]!r} of the head is nowhere in the text; use it or drop it")
    return text
