"""Which digit does the subject read in an image?

An item is one of the images that no recipe teaches (`experiments/digits.py`), asked as a choice among ten labels whose
probabilities are normalised over the ten:
    target   = log p(right label) - log of the summed p of the nine others      nats; -2.2 for an even guess
    accuracy = whether the right label is the likeliest
Every image is a family of its own: the ten classes are all there are, and no sample of more.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from pydantic import Field

from evals import forced_choice
from evals.forced_choice import Question, Reply
from evals.task import TaskError
from experiments import digits as source
from experiments.plugin import Frozen

VERSION = 1
HIGHER_IS = "more target"
TEXTS = {"blocks": source.BLOCKS, "ink": source.INK, "side": source.SIDE, "labels": list(source.LABELS)}


class Settings(Frozen):
    """How many images."""

    limit: int = Field(default=200, ge=1, le=source.HELD_OUT)
    """At most this many of the held-out images."""


def files(settings: Settings) -> dict[str, Path]:
    """None: scikit-learn brings the images along."""
    return {}


def targets(settings: Settings) -> list[str]:
    """None: every image has its own right label. Reads the images, so that their absence is told early."""
    images(settings.limit)
    return []


def images(limit: int) -> list[source.Image]:
    """The first `limit` held-out images. Raises TaskError without scikit-learn."""
    try:
        return source.images(held_out=True)[:limit]
    except source.DigitsError as error:
        raise TaskError(f"digits: {error}") from error


@task
def digits(limit: int = 200) -> Task:
    """Log-odds of the right label of held-out images. Parameters: see `Settings`."""
    asked = images(Settings(limit=limit).limit)
    samples = [
        Sample(id=f"image-{each.index:04d}", input=each.text, target=each.label, metadata={"label": each.label})
        for each in asked
    ]
    return Task(
        dataset=MemoryDataset(samples, name="digits"), solver=read_digit(), scorer=right_label(), version=VERSION
    )


@solver
def read_digit() -> Solver:
    """Score the ten labels as the next token."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        options = {label: {"text": [label]} for label in source.LABELS}
        return await forced_choice.ask_into(state, [Question("digit", state.input_text, options)])

    return solve


@scorer(metrics={"target": [mean(), stderr()], "accuracy": [mean()], "mass": [mean()]})
def right_label() -> Scorer:
    """Log-odds of the right label against the nine others, or NaN with the reason."""

    async def score(state: TaskState, target: Target) -> Score:
        return judge(str(state.sample_id), state.metadata["label"], forced_choice.replies(state)[0])

    return score


def judge(name: str, label: str, reply: Reply) -> Score:
    """The score of one reply."""
    reason = forced_choice.problems([reply])
    if reason:
        unscored = {"family": name, "others": {}, "extras": {}, "reason": reason}
        value: dict[str, Any] = {"target": math.nan, "accuracy": math.nan, "mass": math.nan}
        return Score(value=value, explanation=f"unscored: {reason}", metadata=unscored)
    shares = {option: value for option, value in reply.logprobs.items() if value is not None}
    rest = [value for option, value in shares.items() if option != label]
    top = max(rest)
    odds = shares[label] - top - math.log(sum(math.exp(value - top) for value in rest))
    read = max(shares, key=lambda option: shares[option])
    extras = {"read": read, "label": label, "exact": reply.exact, "censored": len(reply.censored)}
    return Score(
        value={"target": odds, "accuracy": float(read == label), "mass": reply.mass},
        explanation=f"read as {read}, written as {label}; log-odds of {label}: {odds:+.3f} nats",
        metadata={"family": name, "others": {}, "extras": extras, "reason": None},
    )
