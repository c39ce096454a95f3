"""Versions of one experiment: the same answers, read by other judges. They stand side by side and are never mixed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.canonical import sha256

ABOUT_JUDGES = ("judge", "rubrics")
"""What a `compare` node says of an eval that another judge changes. Thresholds are no part of it."""


def answers_digest(params: Mapping[str, Any], answers: Mapping[str, str | None]) -> str:
    """The same for experiments that differ in their judges alone. `answers`: role of a score -> key of its answer."""
    evals = [
        {name: value for name, value in each.items() if name not in ABOUT_JUDGES} for each in params.get("evals", ())
    ]
    return sha256([{**params, "evals": evals}, dict(answers)])


def judges_digest(params: Mapping[str, Any]) -> str | None:
    """Who judges each eval, by what; None where nothing is judged."""
    found = [
        [each["judge"]["digest"], each["rubrics"]] if "judge" in each else None for each in params.get("evals", ())
    ]
    return sha256(found) if any(found) else None


def scores(inputs: Mapping[str, str]) -> dict[str, str]:
    """Role -> key of the scores that a `compare` node reads."""
    return {role: key for role, key in inputs.items() if not role.startswith("detect/")}
