"""What is wrong with a spec, said so that it can be put right: where, what, the value, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from experiments.plugin import nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from experiments.source import Source

SpecPath = tuple[str | int, ...]
SHOWN = 80
"""Characters of a value that a message shows."""
_ABSENT = object()


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one place of a spec."""

    path: SpecPath
    text: str

    @property
    def field(self) -> str:
        """The path in dots: `interventions.0.layer`."""
        return ".".join(str(part) for part in self.path)


class SpecError(ValueError):
    """A spec that cannot be used. `problems` has every reason; the message has one line for each."""

    def __init__(self, *problems: Problem, source: Source | None = None) -> None:
        self.problems = problems
        self.source = source
        super().__init__("\n".join(self._line(problem) for problem in problems))

    @property
    def path(self) -> SpecPath:
        """Where the first problem is."""
        return self.problems[0].path if self.problems else ()

    def at(self, source: Source) -> SpecError:
        """The same problems with file and line."""
        return SpecError(*sorted(self.problems, key=lambda p: source.position(p.path)), source=source)

    def under(self, *prefix: str | int) -> SpecError:
        """The same problems, of a part that sits at `prefix`."""
        return SpecError(*(replace(p, path=(*prefix, *p.path)) for p in self.problems), source=self.source)

    def _line(self, problem: Problem) -> str:
        where = f"{self.source.where(problem.path)}: " if self.source else ""
        return where + (f"{problem.field}: " if problem.path else "") + problem.text

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.problems, self.source))


def _rebuild(problems: tuple[Problem, ...], source: Source | None) -> SpecError:
    return SpecError(*problems, source=source)


def shown(value: Any) -> str:
    """`value` as text, cut where it would flood a terminal."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def unknown(what: str, value: Any, allowed: Iterable[str]) -> str:
    """`unknown method; got 'loar'; allowed: ...; did you mean 'lora'?`"""
    allowed = list(allowed)
    near = nearest(str(value), allowed).strip(" ()")
    return f"unknown {what}; got {shown(value)}; allowed: {', '.join(allowed)}" + (f"; {near}" if near else "")


def problems_of(error: ValidationError, model: type[BaseModel], data: Any) -> list[Problem]:
    """Each error pydantic found in `data`, with its place in `data` and in our words; one for each place."""
    found: dict[SpecPath, list[str]] = {}
    for detail in error.errors():
        path = _place(detail["loc"], data, detail["type"])
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, SpecError):
            new = [((*path, *problem.path), problem.text) for problem in inner.problems]
        else:
            new = [(path, _text(detail, path, model))]
        for place, text in new:
            if text not in found.setdefault(place, []):
                found[place].append(text)
    return [Problem(path, "; or ".join(texts)) for path, texts in found.items() if not _follows(path, texts, found)]


def _follows(path: SpecPath, texts: list[str], found: Mapping[SpecPath, list[str]]) -> bool:
    """True for a list that is too short only because its wrong items were not counted."""
    inside = any(len(other) > len(path) and other[: len(path)] == path for other in found)
    return inside and all("at least" in text and "item" in text for text in texts)


def _place(loc: Sequence[str | int], data: Any, kind: str) -> SpecPath:
    """`loc` without the branch names that pydantic puts in for unions: the parts that lead through `data`."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        inside = _get(data, part)
        if inside is _ABSENT and not (kind == "missing" and index == len(loc) - 1):
            continue
        path.append(part)
        data = inside
    return tuple(path)


def _get(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping) and part in data:
        return data[part]
    if isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int) and part < len(data):
        return data[part]
    return getattr(data, part, _ABSENT) if isinstance(data, BaseModel) and isinstance(part, str) else _ABSENT


def _text(detail: ErrorDetails, path: SpecPath, model: type[BaseModel]) -> str:
    value = detail["input"]
    holder = _model_at(model, path[:-1])
    if detail["type"] == "extra_forbidden":
        return unknown("setting", path[-1], holder.model_fields if holder else ())
    if detail["type"] == "missing":
        field = holder.model_fields.get(str(path[-1])) if holder else None
        meaning = f"; it is: {' '.join((field.description or '').split())}" if field and field.description else ""
        return f"is required and missing{meaning}"
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    text = text.replace("Input should be", "must be")
    if detail["type"] == "too_short":
        text = f"must have at least {detail['ctx']['min_length']} item"
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        inner = _model_at(model, path)
        text = "must be a mapping" + (f" with {', '.join(inner.model_fields)}" if inner else "")
    if detail["type"] == "literal_error" and isinstance(value, str):
        expected = detail.get("ctx", {}).get("expected", "").replace(" or ", ", ")
        text += (near := nearest(value, [name.strip().strip("'") for name in expected.split(",")])) and f"{near}"
    if detail["type"] in ("tuple_type", "list_type", "set_type"):
        text += " (a list is a grid axis; a setting that is itself a list is written [[...]])"
    return text if _whole(value) else f"{text}; got {shown(value)}{_yaml_boolean(value, detail)}"


def _whole(value: Any) -> bool:
    """True for what is no value but a part of a spec, or a list of such parts: showing it would say nothing."""
    several = isinstance(value, list | tuple) and len(value) > 0
    return all(_whole(each) for each in value) if several else isinstance(value, BaseModel | Mapping)


def _yaml_boolean(value: Any, detail: ErrorDetails) -> str:
    if isinstance(value, bool) and detail["type"] in ("string_type", "literal_error"):
        return " (unquoted yes, no, on, off, true and false are booleans in YAML: put the word in quotes)"
    if isinstance(value, int | float) and detail["type"] == "string_type":
        return " (put it in quotes to make it a text)"
    return ""


def _model_at(model: type[BaseModel], path: SpecPath) -> type[BaseModel] | None:
    """The model that holds the field at `path`, as far as annotations say it plainly."""
    current: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = _first_model(field.annotation) if field else None
    return current


def _first_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_first_model(argument) for argument in getattr(annotation, "__args__", ()))
    return next((found for found in inner if found), None)
