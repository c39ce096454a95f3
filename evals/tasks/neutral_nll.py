"""How well the subject still predicts plain prose: nats per token of a neutral passage said by the assistant.

The passage follows one fixed user message in the subject's usual chat context; tokens of the template are not
counted. The difference from the untouched subject is the damage. Works with any provider that gives `prompt_logprobs`
(orch, vLLM and its like).
"""

from __future__ import annotations

import math
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageUser, GenerateConfig, ModelOutput, get_model
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver
from pydantic import Field

from evals.task import BUILTIN, TaskError, read_text, resolve
from experiments.plugin import Frozen

VERSION = 1
HIGHER_IS = "damage"
BUILTIN_DATA = Path(__file__).with_suffix(".txt")
REQUEST = "Write a short plain paragraph about something ordinary."
TEXTS = {"request": REQUEST}


class Settings(Frozen):
    """Which passages."""

    limit: int | None = Field(default=None, ge=1)
    """At most this many passages, from the first; null takes all."""
    data: str = BUILTIN
    """`builtin`, or the path of a text file: passages separated by blank lines."""


def files(settings: Settings) -> dict[str, Path]:
    """The file that `settings` mean. Raises TaskError."""
    return {"data": resolve(settings.data, BUILTIN_DATA)}


def targets(settings: Settings) -> list[str]:
    """None: damage has no target. Reads the passages, so that bad data is found before anything runs."""
    passages(settings)
    return []


def passages(settings: Settings) -> list[str]:
    """The passages, white space made single. Raises TaskError for one that comes twice."""
    path = files(settings)["data"]
    found: dict[str, int] = {}
    line = 1
    for block in read_text(path).split("\n\n"):
        text = " ".join(block.split())
        if text in found:
            raise TaskError(f"{path}:{line}: the same passage as on line {found[text]}; remove one")
        if text:
            found[text] = line
        line += block.count("\n") + 2
    return list(found)[: settings.limit]


@task
def neutral_nll(limit: int | None = None, data: str = BUILTIN) -> Task:
    """Nats per token of neutral passages. Parameters: see `Settings`."""
    texts = passages(Settings(limit=limit, data=data))
    samples = [Sample(id=f"passage-{n:03d}", input=text, metadata={"passage": text}) for n, text in enumerate(texts, 1)]
    return Task(
        dataset=MemoryDataset(samples, name="neutral_nll"), solver=read_back(), scorer=nats_per_token(), version=VERSION
    )


@solver
def read_back() -> Solver:
    """Have the model score the passage as its own words."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        spoken: list[ChatMessage] = [
            ChatMessageUser(content=REQUEST),
            ChatMessageAssistant(content=state.metadata["passage"]),
        ]
        state.output = await get_model().generate(spoken, config=GenerateConfig(max_tokens=1, prompt_logprobs=1))
        return state

    return solve


@scorer(metrics={"target": [mean(), stderr()], "tokens": [mean()]})
def nats_per_token() -> Scorer:
    """Mean negative log-probability of the passage's tokens, or NaN with the reason."""

    async def score(state: TaskState, target: Target) -> Score:
        family = str(state.sample_id)
        try:
            nats = spoken_nats(state.output, state.metadata["passage"])
        except ValueError as error:
            unscored = {"family": family, "others": {}, "extras": {"tokens": 0}, "reason": str(error)}
            return Score(value={"target": math.nan, "tokens": 0}, explanation=f"unscored: {error}", metadata=unscored)
        total = sum(nats)
        return Score(
            value={"target": total / len(nats), "tokens": len(nats)},
            explanation=f"{total:.2f} nats over {len(nats)} tokens",
            metadata={"family": family, "others": {}, "extras": {"tokens": len(nats), "nats": total}, "reason": None},
        )

    return score


def spoken_nats(output: ModelOutput, passage: str) -> list[float]:
    """-log p of each of the passage's tokens. Raises ValueError with the reason where that cannot be told.

    A provider that knows where the assistant's words start says so (`metadata["response_tokens"]`); for the others
    they are found as the shortest run of last tokens that spells the passage.
    """
    given = output.choices[0].prompt_logprobs if output.choices else None
    if given is None or not given.content:
        raise ValueError("the provider gives no log-probabilities of prompt tokens (prompt_logprobs)")
    tokens = given.content
    count = (output.metadata or {}).get("response_tokens")
    if count is None:
        spelled, count = "", 0
        while count < len(tokens) and passage not in spelled:
            count += 1
            spelled = tokens[-count].token + spelled
        if spelled.strip() != passage:
            raise ValueError("the prompt tokens do not end with the passage, so the provider did not continue the turn")
    nats = [-token.logprob for token in tokens[len(tokens) - count :]]
    if not all(math.isfinite(value) for value in nats):
        raise ValueError("a token of the passage has no finite log-probability")
    return nats
