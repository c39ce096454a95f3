"""Files of templates that prompts are built from: a list of texts for each component."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.dataset import DatasetError

BAR = " | "
"""What stands between the two halves of a template that has two."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DatasetError when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}; give a UTF-8 file with one JSON object") from error
    if not isinstance(data, dict):
        raise DatasetError(f"{path}: holds a {type(data).__name__}; must be a JSON object")
    return data


def read(path: Path, keys: Mapping[str, Sequence[str] | None]) -> dict[str, list[str]]:
    """The texts of a JSON file under each of `keys`, whose values are the places that may be filled; None is no place.

    Raises DatasetError naming the key and the template that cannot be used.
    """
    data = read_json(path)
    found = {}
    for key, places in keys.items():
        texts = data.get(key)
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise DatasetError(f"{path}: {key} must be a list of at least one text; got {str(texts)[:60]}")
        for index, text in enumerate(texts if places is not None else ()):
            try:
                text.format(**dict.fromkeys(places or (), "1"))
            except (LookupError, ValueError, AttributeError) as error:
                allowed = ", ".join(f"{{{place}}}" for place in places or ())
                raise DatasetError(
                    f"{path}: {key}.{index} cannot be filled: {text!r} ({error!r}); allowed places: {allowed}"
                ) from error
        found[key] = texts
    return found


def split(path: Path, keys: Mapping[str, Sequence[str] | None], key: str) -> dict[str, list[str]]:
    """What `read` reads, where every text under `key` has two halves with a bar between them.

    Raises DatasetError naming the template that has one half only.
    """
    found = read(path, keys)
    for index, text in enumerate(found[key]):
        if not all(half.strip() for half in text.partition(BAR)):
            raise DatasetError(f"{path}: {key}.{index} must be two texts with {BAR!r} between them; got {text!r}")
    return found
