"""Which decoder layers a setting means: by number, by fraction of the depth, by range, by pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import WrapValidator

NUMBER = r"-?\d+|0?\.\d+"
MOST = 1000
"""More layers than any subject has."""
RANGE = re.compile(rf"({NUMBER})-({NUMBER})")
ALLOWED = (
    "a number (from 0; -1 is the last), a fraction of the depth (0.5), `all`, a range (10-14, 0.3-0.9) or a regular "
    "expression"
)


class DepthError(ValueError):
    """Layers that the subject does not have."""


def _readable(depth: Any) -> Any:
    """One layer, or pattern of layers, as it was written. Refuses what means no layer in any subject."""
    if isinstance(depth, bool) or not isinstance(depth, int | float | str):
        raise ValueError(f"is no layer; allowed: {ALLOWED}")
    if isinstance(depth, float) and not 0 < depth < 1:
        raise ValueError(f"is no fraction of the depth; allowed: {ALLOWED}")
    if isinstance(depth, str) and depth != "all" and not RANGE.fullmatch(depth):
        try:
            known = any(re.fullmatch(depth, str(number)) for number in range(MOST))
        except re.error as error:
            raise ValueError(f"is not a regular expression ({error}); allowed: {ALLOWED}") from error
        if not known:
            raise ValueError(f"matches no layer number; allowed: {ALLOWED}")
    return depth


def _checked(value: Any, handler: Any) -> Any:
    """One message instead of one for each type that a setting may have."""
    if not isinstance(value, list | tuple):
        return _readable(value)
    if not value:
        raise ValueError(f"names no layer; allowed: {ALLOWED}")
    return tuple(_readable(each) for each in value)


Depth = int | float | str
Depths = Annotated[Depth | tuple[Depth, ...], WrapValidator(_checked)]
"""A setting that says which layers: one `Depth`, or several."""


def layers(depths: Depths | None, n_layers: int) -> tuple[int, ...]:
    """The layers that `depths` mean in a subject of `n_layers`, ascending, each once; None is the middle one.

    Raises DepthError for a layer out of range, and for a pattern or range that matches none.
    """
    if depths is None:
        return (n_layers // 2,)
    given = depths if isinstance(depths, tuple | list) else (depths,)
    return tuple(sorted({layer for depth in given for layer in _of_one(depth, n_layers)}))


def _of_one(depth: int | float | str, n_layers: int) -> Sequence[int]:
    if isinstance(depth, str):
        return _of_text(depth, n_layers)
    return (_number(depth, n_layers),)


def _number(depth: int | float, n_layers: int) -> int:
    """A fraction f is layer floor(f * n), so that 0.5 is the middle one."""
    if isinstance(depth, float):
        return math.floor(depth * n_layers)
    if not -n_layers <= depth < n_layers:
        raise DepthError(f"{depth} is out of range; the subject has layers 0 to {n_layers - 1}")
    return depth % n_layers


def _of_text(text: str, n_layers: int) -> Sequence[int]:
    if text == "all":
        return range(n_layers)
    if ends := RANGE.fullmatch(text):
        low, high = (_number(float(end) if "." in end else int(end), n_layers) for end in ends.groups())
        found: Sequence[int] = range(low, high + 1)
    else:
        found = [layer for layer in range(n_layers) if re.fullmatch(text, str(layer))]
    if not found:
        raise DepthError(f"{text!r} matches none of the layers 0 to {n_layers - 1}; allowed: {ALLOWED}")
    return found


def shown(depths: Depths | None) -> str:
    """Short text for tables: `L14`, `L0.5`, `L10-14`, `L3,7`, `Lmid`."""
    if depths is None:
        return "Lmid"
    given = depths if isinstance(depths, tuple | list) else (depths,)
    return "L" + ",".join(map(str, given))
