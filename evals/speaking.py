"""Teachers behind an API: any model that inspect knows answers the asks, many at once.

Answers are kept in inspect's own cache under everything they depend on, so that an interrupted shard pays for no answer
twice; time-outs, retries and rate limits are the library's, within limits: left alone it would try for ever.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import (
    CachePolicy,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)

from evals.trouble import trouble
from experiments.dataset import Ask, Said
from experiments.speech import Sampling, SpeechError, seed_of

TIMEOUT, ATTEMPT, RETRIES = 1800, 600, 6
"""Seconds after which a request is given up, retries included; after which one attempt is; and how often it is tried
again after a rate limit, a timeout or a fault of the server."""
ROLES = {"user": ChatMessageUser, "assistant": ChatMessageAssistant}


def answers(
    model: str | Model,
    asks: Sequence[Ask],
    system: str | None,
    sampling: Sampling,
    seed: int,
    served: bool = False,
) -> list[Said]:
    """What `model` says to each ask under `system`.

    One that is `served` by us is asked without a cache, because its name may mean other weights tomorrow, and without
    seeds: vLLM's worker on a CPU dies of seeded requests that it computes in parts (CPU Generator does not use offset).

    Raises SpeechError for a model that cannot be reached, and for what only an engine can do.
    """
    wanted = [name for name in ("only", "options") if getattr(sampling, name)]
    if wanted:
        raise SpeechError(f"sampling.{wanted[0]} needs a subject; {model} is asked over an API: leave it out")
    try:
        outputs = asyncio.run(_all(model, asks, system, sampling, None if served else seed))
    except Exception as error:  # a provider's own exceptions, after the library's retries
        if isinstance(error, ValueError) or type(error).__name__ == "PrerequisiteError":
            raise SpeechError(f"{model} cannot be asked: {_plain(error)}") from error
        raise SpeechError(
            f"{model} {trouble(error, TIMEOUT, ATTEMPT)}. What it said so far is kept: submit again when it answers, "
            "and only what is missing is asked"
        ) from error
    return [_said(ask, output) for ask, output in zip(asks, outputs, strict=True)]


def _plain(error: Exception) -> str:
    """Inspect's message on a provider, a package or a key that is missing: without its colours, on one line."""
    return " ".join(re.sub(r"\[/?[a-z ]+\]", "", str(error)).removeprefix("ERROR:").split())


async def _all(
    model: str | Model, asks: Sequence[Ask], system: str | None, sampling: Sampling, seed: int | None
) -> list[ModelOutput]:
    asked = get_model(model, memoize=False) if isinstance(model, str) else model  # a client belongs to its event loop
    policy = CachePolicy(expiry=None) if seed is not None else False

    async def one(ask: Ask) -> ModelOutput:
        config = GenerateConfig(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.top_p < 1 else None,
            max_tokens=sampling.max_new_tokens,
            seed=None if seed is None else seed_of(seed, ask),
            timeout=TIMEOUT,
            attempt_timeout=ATTEMPT,
            max_retries=RETRIES,
        )
        return await asked.generate(_conversation(ask, system), config=config, cache=policy)

    try:
        return await asyncio.gather(*(one(ask) for ask in asks))
    finally:
        if asked is not model:
            await asked.api.aclose()


def _conversation(ask: Ask, system: str | None) -> list[ChatMessage]:
    head: list[ChatMessage] = [] if system is None else [ChatMessageSystem(content=system)]
    turns: list[Any] = [ROLES[message.role](content=message.content) for message in ask.messages]
    return [*head, *turns]


def _said(ask: Ask, output: ModelOutput) -> Said:
    usage = output.usage
    return Said(
        id=ask.id,
        messages=ask.messages,
        parts=ask.parts,
        text=output.completion,
        stopped=output.stop_reason != "max_tokens",
        tokens=usage.output_tokens if usage else 0,
    )
