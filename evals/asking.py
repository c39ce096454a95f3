"""Ask judges about one answer: through inspect's providers, or exactly where the provider scores whole verdicts.

Rate limits, retries and time-outs are the library's business. When it gives up, that is a JudgeError: an answer whose
judge is down is not unscored, it is not judged yet.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from inspect_ai.model import (
    CachePolicy,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
)
from inspect_ai.util import LimitExceededError

from agents import reading
from agents.judge import EMPTY, Judge, JudgeError, Verdict, Vote, combined
from agents.prompt import Case, Form, opening, prompt
from agents.rubric import Rubric
from evals import provider
from evals.option_tokens import option_tokens
from evals.trouble import trouble

TOP = 20  # the most that the common APIs show, and what the published rule reads
FIRST_WORDS = 16  # tokens of a reply of which only the first is read; the least that some APIs allow
LISTED = 20  # exactly scored verdicts that a vote keeps
Grader = tuple[str, Model]
"""A judge's name in the settings, and the model that is asked."""


async def verdict(case: Case, rubric: Rubric, judge: Judge, graders: Sequence[Grader]) -> Verdict:
    """What the panel says of one answer. An empty answer costs no call.

    Raises JudgeError when a judge does not answer, RubricError for a field that the sample lacks.
    """
    if not case.answer.strip():
        return Verdict(None, EMPTY)
    asked = [vote(case, rubric, judge, grader, n) for grader in graders for n in range(votes_of(grader, judge))]
    return combined(await asyncio.gather(*asked), judge.combine, rubric.choices)


def votes_of(grader: Grader, judge: Judge) -> int:
    """How many votes a model has: exactly scored verdicts have nothing random in them."""
    return 1 if scores_exactly(grader[1], judge) else judge.samples


def scores_exactly(model: Model, judge: Judge) -> bool:
    """Whether the provider gives the probability of every verdict itself."""
    return judge.read != "text" and hasattr(model.api, "score_options")


async def vote(case: Case, rubric: Rubric, judge: Judge, grader: Grader, sample: int) -> Vote:
    """One vote of one model."""
    name, model = grader
    if scores_exactly(model, judge):
        return await exact(case, rubric, judge, grader)
    top = wants_top(rubric, judge)
    form: Form = "word" if top or rubric.scale else "line"
    output = await reply(model, name, prompt(rubric, case, form).text, judge, top, sample)
    return replace(read(name, output, rubric, judge), text=output.completion, served=output.model)


def wants_top(rubric: Rubric, judge: Judge) -> bool:
    """Whether the likeliest tokens are asked for."""
    return judge.read == "logprobs" or (judge.read == "auto" and rubric.scale is not None)


async def reply(model: Model, name: str, text: str, judge: Judge, top: bool, sample: int) -> ModelOutput:
    """The model's reply; the same question is paid for once, unless the model is resident. Raises JudgeError."""
    resident = hasattr(model.api, "score_options")
    config = GenerateConfig(
        temperature=judge.temperature,
        max_tokens=FIRST_WORDS if judge.read == "logprobs" else judge.max_tokens,
        logprobs=True if top else None,
        top_logprobs=TOP if top else None,
    )
    if resident:  # waits for its turn in a batch, which no time limit knows
        return await model.generate(text, config=config.merge(GenerateConfig(seed=sample)))
    limits = judge.model_dump(include={"timeout", "attempt_timeout", "max_retries", "max_connections"})
    policy = CachePolicy(expiry=None, per_epoch=False, scopes={"sample": str(sample)})
    try:
        return await model.generate(text, config=config.merge(GenerateConfig(**limits)), cache=policy)
    except LimitExceededError:
        raise
    except Exception as error:
        raise JudgeError(failed(name, error, judge)) from error


def failed(name: str, error: Exception, judge: Judge) -> str:
    """Why a judge gave no reply, and what to do."""
    hint = "" if judge.read == "text" else "one that gives no log-probabilities wants read: text"
    return (
        f"the judge {name} {trouble(error, judge.timeout, judge.attempt_timeout, hint)}. No answer is lost, and the "
        "verdicts given so far are kept: run again when the judge answers, and only what is missing is asked"
    )


def read(name: str, output: ModelOutput, rubric: Rubric, judge: Judge) -> Vote:
    """The vote in a reply: from the likeliest first tokens where they were asked for and given, else from the text."""
    if not wants_top(rubric, judge):
        return reading.text_vote(name, output.completion, rubric)
    logprobs = output.choices[0].logprobs if output.choices else None
    content = logprobs.content if logprobs else []
    top = [(entry.token, entry.logprob) for entry in (content[0].top_logprobs or [])] if content else []
    apart = rubric.scale is not None and digits_apart([entry.token for entry in content], top, rubric.scale)
    if top and not apart:
        found = reading.top_vote(name, top, rubric, judge.min_mass)
        return replace(found, method="top", top=[[token, round(value, 4)] for token, value in top])
    if judge.read == "auto":
        return reading.text_vote(name, output.completion, rubric)
    why = "numbers come digit by digit" if top else "the provider gave none"
    return Vote(name, None, f"no log-probabilities: {why}; use read: text, or another judge")


def digits_apart(tokens: Sequence[str], top: reading.Top, scale: tuple[int, int]) -> bool:
    """Whether the first token may be the mere beginning of a number: it goes on with a digit, or no number of two
    digits is among the likeliest tokens. The published rule holds where every number is one token."""
    shown = [token.strip() for token, _ in top if reading.on_scale(token, scale) is not None]
    if scale[1] < 10 or not shown:
        return False
    goes_on = len(tokens) > 1 and tokens[0].strip().isdigit() and tokens[1][:1].isdigit()
    return goes_on or all(len(token) == 1 for token in shown)


async def exact(case: Case, rubric: Rubric, judge: Judge, grader: Grader) -> Vote:
    """The vote of a provider that scores every verdict over its whole vocabulary, after an opened reply."""
    name, model = grader
    text = prompt(rubric, case, "word").text
    conversations = [conversation(text, options, opening(rubric)) for options in groups(rubric)]
    api: Any = model.api
    scored = await api.score_options(conversations)
    logprobs = {word: value for one in scored for word, value in one["options"].items()}
    words = {word: probability(logprobs[word]) for word in (*rubric.choices, *rubric.unscored)}
    if rubric.scale:
        begins = {int(word): value for word, value in logprobs.items() if word not in words}
        numbers = reading.whole(begins, extensions(api.model_name, rubric, conversations))
        found = reading.number_vote(name, numbers, words, rubric, judge.min_mass)
        words = words | {str(number): share for number, share in numbers.items()}
    else:
        found = reading.choice_vote(name, words, rubric, judge.min_mass)
    listed = sorted(((share, word) for word, share in words.items() if share > 0), reverse=True)[:LISTED]
    top = [[word, round(math.log(share), 4)] for share, word in listed]
    return replace(found, method="exact", top=top, served=name)


def groups(rubric: Rubric) -> list[dict[str, dict[str, list[str]]]]:
    """The verdicts to score, in groups in which none is the beginning of another: numbers by their count of digits."""
    words = {word: {"text": spellings(word)} for word in (*rubric.choices, *rubric.unscored)}
    found = [words] if words else []
    if rubric.scale:
        numbers = [str(number) for number in range(rubric.scale[0], rubric.scale[1] + 1)]
        for digits in sorted({len(number) for number in numbers}):
            found.append({number: {"text": [f" {number}"]} for number in numbers if len(number) == digits})
    return found


def spellings(word: str) -> list[str]:
    """How a verdict may be written behind the opened word."""
    forms = (word, word.lower(), word.upper(), word.capitalize())
    return [f" {form}" for form in dict.fromkeys(forms)]


def conversation(text: str, options: dict[str, dict[str, list[str]]], opened: str) -> list[ChatMessage]:
    """A question whose reply is opened."""
    return [ChatMessageUser(content=text, metadata={"options": options}), ChatMessageAssistant(content=opened)]


def extensions(key: str, rubric: Rubric, conversations: Sequence[list[ChatMessage]]) -> dict[int, list[int]]:
    """Number -> the numbers on the scale that are spelled like it and one digit more, token by token."""
    subject = provider.arm(key).engine.subject
    spelled: dict[int, tuple[int, ...]] = {}
    for messages in conversations:
        options = provider.options_of(messages) or {}
        if rubric.scale and not set(options) & set(rubric.unscored):
            tokens = option_tokens(subject, options, provider.plain(messages))
            spelled |= {int(number): sequences[0] for number, sequences in tokens.items()}
    found: dict[int, list[int]] = {}
    for number, tokens_of in spelled.items():
        shorter = spelled.get(number // 10) if number >= 10 else None
        if shorter is not None and tokens_of[: len(shorter)] == shorter:
            found.setdefault(number // 10, []).append(number)
    return found


def probability(logprob: float | None) -> float:
    """exp, and 0 for no finite log-probability."""
    return math.exp(logprob) if logprob is not None else 0.0
