"""Frozen settings models, and finding the one class a plug-in file defines: the file's name is its id."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Settings as data: immutable, unknown fields refused, field docstrings become the schema's descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )


class PluginError(ValueError):
    """A plug-in id that names no file, or a file that does not hold exactly one implementation."""


def names(package: str) -> list[str]:
    """Ids available in `package`: its module names, without private ones. Imports none of them."""
    folder = Path(importlib.import_module(package).__path__[0])
    return sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_"))


def nearest(name: str, allowed: list[str]) -> str:
    """` (did you mean 'x'?)` when one of `allowed` is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load(package: str, name: str, base: type[Any]) -> type[Any]:
    """The one public subclass of `base` defined in `package/name.py`.

    Raises PluginError naming what exists and the file to write.
    """
    allowed = names(package)
    if name not in allowed:
        kind = package.rsplit(".", 1)[-1]
        raise PluginError(
            f"unknown name {name!r}{nearest(name, allowed)}; allowed: {', '.join(allowed)}; "
            f"to add one, write {package.replace('.', '/')}/{name}.py ({kind})"
        )
    module = importlib.import_module(f"{package}.{name}")
    found = [
        value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not key.startswith("_")
    ]
    if len(found) != 1:
        raise PluginError(
            f"{module.__file__} must define exactly one public subclass of {base.__name__}, found "
            f"{[cls.__name__ for cls in found]}"
        )
    return found[0]


class Versioned(Frozen):
    """Settings whose meaning is pinned by an integer: bump it when the same settings would now give another result."""

    version: ClassVar[int] = 1
