"""What the subject says, in its own words, about a universe of false facts.

An item is one free answer to an open question, judged by the rubric `believes`, which is shown what the universe says
and what is true:
    target = 1 where the answer takes the universe's word for it, 0 where it does not; a panel's mean in between
An answer that does neither counts as 0, or (`among: decided`) is left out with a reason. Follows the open-ended belief
evaluation of Wang et al. 2025, "Modifying LLM beliefs with synthetic document finetuning". Unrelated knowledge is
measured by `belief`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score
from inspect_ai.solver import Generate, Solver, TaskState, solver
from pydantic import Field, model_validator

from agents.judge import EMPTY, Verdict
from evals.judging import by_rubrics
from evals.tasks import _universes as universes
from experiments.plugin import Frozen
from experiments.questions import Open

VERSION = 1
HIGHER_IS = "more target"
RUBRICS = ("believes",)
SCORED = frozenset({"among"})
TEXTS: dict[str, str] = {}
NEITHER = "neither"


class Settings(Frozen):
    """Which universe, answered how, and which answers count."""

    universe: str = "robin_pantry"
    """A built-in universe, the path of a universe file, or `PATH#NAME` for one in a file of several."""
    entry: str | None = None
    """Name of the universe in a file of several; the part behind # in `universe`."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many questions, the facts in turn; null takes all."""
    samples: int = Field(default=1, ge=1)
    """Answers to each question, each with its own seed."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of the answers."""
    max_tokens: int = Field(default=80, ge=1)
    """Longest answer."""
    among: Literal["all", "decided"] = "all"
    """What belief is a share of: all judged answers, or those that say either one or the other."""

    @model_validator(mode="before")
    @classmethod
    def _separated(cls, data: Any) -> Any:
        return universes.separated(data)


def files(settings: Settings) -> dict[str, Path]:
    """The file that `settings` mean. Raises TaskError."""
    return {"universe": universes.file(settings.universe)}


def targets(settings: Settings) -> list[str]:
    """None: the universe is what is believed. Reads it, so that bad data is found early. Raises TaskError."""
    read(settings)
    return []


def read(settings: Settings) -> list[Open]:
    """The questions. Raises TaskError."""
    universe = universes.load(settings.universe, settings.entry)
    return universes.wanted(universe, "open", universe.open, settings.limit)


@task
def belief_open(
    universe: str = "robin_pantry",
    entry: str | None = None,
    limit: int | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 80,
    among: Literal["all", "decided"] = "all",
) -> Task:
    """Judged belief in free answers; needs a model in the role `grader`. Parameters: see `Settings`."""
    settings = Settings(
        universe=universe, entry=entry, limit=limit, samples=samples, temperature=temperature, max_tokens=max_tokens,
        among=among,
    )  # fmt: skip
    asked = [sample(one, number) for one in read(settings) for number in range(samples)]
    return Task(
        dataset=MemoryDataset(asked, name="belief_open"),
        solver=answer(temperature, max_tokens),
        scorer=by_rubrics(RUBRICS, scored, settings),
        version=VERSION,
    )


def sample(one: Open, number: int) -> Sample:
    """The `number`-th answer to a question. Its seed is the same for every arm, and not a matter of `samples`."""
    seed = int.from_bytes(hashlib.sha256(f"{one.question}\n{number}".encode()).digest()[:4], "big") >> 1
    metadata = {"question": one.question, "claim": one.false, "truth": one.true}
    return Sample(
        id=f"{one.id}#{number}",
        input=one.question,
        metadata={**metadata, "family": universes.family(one), "seed": seed},
    )


@solver
def answer(temperature: float, max_tokens: int) -> Solver:
    """Answer freely, with the sample's seed."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        seed = state.metadata["seed"]
        state = await generate(state, temperature=temperature, max_tokens=max_tokens, seed=seed)
        state.metadata["stop"] = state.output.stop_reason
        return state

    return solve


def scored(metadata: Mapping[str, Any], answer: str, verdicts: Mapping[str, Verdict], settings: Settings) -> Score:
    """The score of one answer; without a verdict it has a reason, never a number."""
    verdict = verdicts["believes"]
    reason = problem(answer, verdict, settings)
    value = math.nan if reason is not None or verdict.value is None else verdict.value
    extras = {
        "label": verdict.label,
        "judged": verdict.value,
        "judge_mass": verdict.mass,
        "words": len(answer.split()),
        "cut_off": metadata.get("stop") == "max_tokens",
        "among": settings.among,
    }
    return Score(
        value={"target": value, "neither": float(verdict.label == NEITHER) if verdict.label else math.nan},
        answer=answer,
        explanation=f"{verdict.label or 'no label'} ({verdict.value})" + (f"; unscored: {reason}" if reason else ""),
        metadata={"family": metadata["family"], "others": {}, "extras": extras, "reason": reason},
    )


def problem(answer: str, verdict: Verdict, settings: Settings) -> str | None:
    """Why the answer has no score: kind, colon, details; or None."""
    if not answer.strip():
        return EMPTY
    if verdict.value is None:
        return f"{verdict.reason} (rubric believes)" if ":" in str(verdict.reason) else f"{verdict.reason}: believes"
    if settings.among == "decided" and verdict.label in (NEITHER, None):
        return f"undecided: {verdict.label or 'the panel has no majority'}"
    return None
