"""One text for one value, so that its digest can be its identity: sorted keys, no NaN, nothing but plain data."""

from __future__ import annotations

import hashlib
import math
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from experiments.files import digest


class CanonicalError(ValueError):
    """A value that has no canonical text: where it is, what it is, what is allowed."""


class Shared(dict[str, Any]):
    """A dict that many nodes hold, with its canonical text made once. Not to be changed after that."""

    __slots__ = ("text",)

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.text = _mapping(value, "")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Shared, (dict(self),))


def canonical(value: Any, where: str = "") -> str:
    """`value` as JSON without a choice: keys sorted, no spaces, ASCII, floats by `repr`, -0.0 as 0.0, tuples as lists.

    An int and a float of equal value have different texts: hash validated settings, whose fields have one type.
    Raises CanonicalError for NaN, infinity, keys that are not text, and any other type.
    """
    kind = type(value)
    if kind is str:
        return quoted(value)
    if kind is float:
        return _number(value, where)
    if kind is int:
        return repr(value)
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is Shared:
        return value.text
    if kind is dict:
        return _mapping(value, where)
    if kind is list or kind is tuple:
        return "[" + ",".join([canonical(item, f"{where}.{index}") for index, item in enumerate(value)]) + "]"
    raise CanonicalError(
        f"{where.lstrip('.') or 'value'}: {value!r} is a {kind.__name__}; allowed: text, number, bool, None, list, dict"
    )


def _mapping(value: dict[str, Any], where: str) -> str:
    try:
        items = sorted(value.items())
    except TypeError:
        items = list(
            value.items()
        )  # either a key is not text, refused below, or equal keys made values compare: impossible
    for key, _ in items:
        if type(key) is not str:
            raise CanonicalError(
                f"{where.lstrip('.') or 'value'}: key {key!r} is a {type(key).__name__}; keys are text"
            )
    return "{" + ",".join([f"{quoted(key)}:{canonical(item, f'{where}.{key}')}" for key, item in items]) + "}"


def _number(value: float, where: str) -> str:
    if not math.isfinite(value):
        raise CanonicalError(f"{where.lstrip('.') or 'value'}: {value!r}; only finite numbers have an identity")
    return repr(value + 0.0)  # -0.0 + 0.0 is 0.0


def sha256(value: Any) -> str:
    """Hex sha256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


_digests: dict[tuple[str, int, int], str] = {}


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's content; kept for this process while path, size and modification time stay."""
    stat = path.stat()
    seen = (str(path), stat.st_size, stat.st_mtime_ns)
    if seen not in _digests:
        _digests[seen] = digest(path)
    return _digests[seen]


def identity_of(settings: BaseModel) -> dict[str, Any]:
    """Settings as plain data for a key: a `Path` becomes `{"sha256": digest of the file}`, so that it may move."""
    return dict(_plain(settings.model_dump(mode="python"), by_digest=True))


def plain_of(settings: BaseModel) -> dict[str, Any]:
    """Settings as plain data to build them again from: a `Path` becomes its text."""
    return dict(_plain(settings.model_dump(mode="python"), by_digest=False))


def _plain(value: Any, *, by_digest: bool) -> Any:
    if isinstance(value, Path):
        return {"sha256": file_digest(value)} if by_digest else str(value)
    if isinstance(value, dict):
        return {key: _plain(item, by_digest=by_digest) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, by_digest=by_digest) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item, by_digest=by_digest) for item in value)
    return value
