"""A node's key: what was done, to what, with which settings. Never where, on what machine, or at what price."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from experiments.canonical import CanonicalError, Shared, canonical, quoted, sha256

__all__ = ["SHORT", "CanonicalError", "Shared", "canonical", "node_key", "sha256"]

SHORT = 12
"""Hex digits of a key that are shown, and that name its folder."""


def node_key(stage: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hex sha256 of the canonical JSON of {inputs: {role: key}, params, stage, version}.

    Raises CanonicalError for what has no canonical text: NaN, infinity, keys that are not text, objects.
    """
    parts = f'{{"inputs":{canonical(inputs)},"params":{canonical(params)},"stage":{quoted(stage)},"version":{version}}}'
    return hashlib.sha256(parts.encode("ascii")).hexdigest()
