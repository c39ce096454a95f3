"""One text for one value, so that its digest can be its identity: sorted keys, no NaN, nothing but plain data."""

from __future__ import annotations

import hashlib
import math
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from experiments.files import ADAPTER_FILES, digest, digest_all, is_adapter

IDENTITY = {"for": "identity"}
"""The context of serialisation in which settings leave out what is no part of their identity."""


class CanonicalError(ValueError):
    """A value that has no canonical text: where it is, what it is, what is allowed."""

    def __init__(self, reason: str, path: tuple[str, ...] = ()) -> None:
        self.reason, self.path = reason, path
        super().__init__(f"{'.'.join(path) or 'value'}: {reason}")

    def under(self, part: str) -> CanonicalError:
        """The same reason, of a value that sits at `part`."""
        return CanonicalError(self.reason, (part, *self.path))


class Shared(dict[str, Any]):
    """A dict that many nodes hold, with its canonical text made once. Not to be changed after that."""

    __slots__ = ("text",)

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.text = _mapping(value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Shared, (dict(self),))


def canonical(value: Any) -> str:
    """`value` as JSON without a choice: keys sorted, no spaces, ASCII, floats by `repr`, -0.0 as 0.0, tuples as lists.

    An int and a float of equal value have different texts: hash validated settings, whose fields have one type.
    Raises CanonicalError for NaN, infinity, keys that are not text, and any other type.
    """
    kind = type(value)
    if kind is str:
        return quoted(value)
    if kind is Shared:
        return str(value.text)
    if kind is float:
        if not math.isfinite(value):
            raise CanonicalError(f"{value!r}; only finite numbers have an identity")
        return repr(value + 0.0)  # -0.0 + 0.0 is 0.0
    if kind is int:
        return repr(value)
    if kind is dict:
        return _mapping(value)
    if kind is list or kind is tuple:
        return _sequence(value)
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    raise CanonicalError(f"{value!r} is a {kind.__name__}; allowed: text, number, bool, None, list, dict")


def _mapping(value: dict[str, Any]) -> str:
    for key in value:
        if type(key) is not str:
            raise CanonicalError(f"the key {key!r} is a {type(key).__name__}; keys are text")
    parts = []
    for key in sorted(value):
        item = value[key]
        try:
            parts.append(f"{quoted(key)}:{quoted(item) if type(item) is str else canonical(item)}")
        except CanonicalError as error:
            raise error.under(key) from None
    return "{" + ",".join(parts) + "}"


def _sequence(value: list[Any] | tuple[Any, ...]) -> str:
    parts = []
    for index, item in enumerate(value):
        try:
            parts.append(canonical(item))
        except CanonicalError as error:
            raise error.under(str(index)) from None
    return "[" + ",".join(parts) + "]"


def sha256(value: Any) -> str:
    """Hex sha256 of `canonical(value)`."""
    return hashlib.sha256(canonical(value).encode("ascii")).hexdigest()


_digests: dict[tuple[str, int, int], str] = {}


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's content; kept for this process while path, size and modification time stay.

    Of a PEFT adapter's folder: of the names and contents of its two files, whatever else lies there.
    """
    if is_adapter(path):
        return digest_all(file for name in ADAPTER_FILES if (file := path / name).is_file())
    stat = path.stat()
    seen = (str(path), stat.st_size, stat.st_mtime_ns)
    if seen not in _digests:
        _digests[seen] = digest(path)
    return _digests[seen]


def identity_of(settings: BaseModel) -> dict[str, Any]:
    """Settings as plain data for a key: a `Path` becomes `{"sha256": digest of the file}`, so that it may move."""
    return dict(_plain(settings.model_dump(mode="python", context=IDENTITY), by_digest=True))


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
