"""What teachers say: who is asked, how the answers are drawn, and the answers themselves.

A teacher is a subject (the experiment's own unless another is named) with an intervention at a dose: a system prompt, a
finetuned model, a steered one, or none. Students learn what it said without what made it say so (subliminal learning,
Cloud et al. 2025, https://arxiv.org/abs/2507.14805).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from experiments.dataset import Ask, Derived, Ingredient, Recipe, Said
from experiments.intervention import NeedsError
from experiments.nested import Part
from experiments.parts import SubjectSpec
from experiments.plugin import Frozen
from experiments.verdicts import JudgeFilter

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.edit import Edit
    from experiments.engine import Engine, Row

SHARD = 256
"""Answers in one unit of work: what an interruption loses at most."""


class SpeechError(ValueError):
    """A teacher that cannot be asked: what is in the way, and what to change."""


class Teacher(Frozen):
    """Who answers."""

    name: str = Field(min_length=1, max_length=40)
    """What tables call it; data of a teacher are labelled with it."""
    trait: str | None = None
    """What it is meant to hand on: the eval's target for students of its data. Null: the eval's own."""
    control: bool = False
    """True for the teacher whose students the others are compared with: no preference, same prompts, same size."""
    system: str | None = None
    """System prompt in force while it answers, and never shown to students; null is the subject's own context."""
    intervention: Part | None = None
    """What was done to it: a method with its settings, trained or steered; null is nothing."""
    data: tuple[Ingredient, ...] = ()
    """What the intervention learns from, one recipe for each kind that it takes."""
    dose: float = 1.0
    """The dose at which the intervention is in force."""
    subject: SubjectSpec | None = None
    """Another subject than the experiment's."""
    by: Literal["engine", "vllm"] = "engine"
    """What computes the answers: the engine, or a vLLM server that the run starts (`make vllm`), which is quicker and
    draws by random numbers of its own, so that it is part of what the data are."""
    model: str | None = None
    """A model that inspect knows (`openai/gpt-4.1-mini`, `vllm/org/name`), asked instead of a subject."""

    def __str__(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _whole(self) -> Teacher:
        if self.intervention is None and self.data:
            raise ValueError("has data but no intervention that learns from them")
        if self.intervention is not None:
            try:
                self.intervention.settings.takes({each.settings.provides for each in self.data})
            except NeedsError as error:
                lacking = str(error).rpartition("; add ")[0]
                raise ValueError(
                    f"{lacking}; give the teacher a recipe of that kind, as data: [{{recipe: ...}}]"
                ) from error
            if self.dose == 0:
                raise ValueError("dose is 0, which is the untouched subject; leave the intervention out")
        if self.model is not None and self.by != "engine":
            raise ValueError(f"by: {self.by} serves a subject, and {self.model} is asked as it is; leave one out")
        if self.model is not None and (self.subject is not None or self.intervention is not None):
            raise ValueError("model is asked as it is: it takes neither a subject nor an intervention")
        return self


class Sampling(Frozen):
    """How answers are drawn."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus: the smallest set of likeliest tokens that reaches this probability takes part."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens after which an answer is cut off."""
    only: str | None = None
    """Characters an answer may consist of, e.g. "0123456789,; "; tokens with others cannot be drawn (constrained
    decoding, which also hides what the teacher would rather have said). Null: anything."""
    options: tuple[str, ...] = ()
    """Beginnings of an answer whose log-probabilities are kept, instead of drawing one."""


@dataclass(frozen=True)
class Speech:
    """Answers of a teacher to asks: what a `Derived` recipe names as a source."""

    asks: Ingredient
    """A recipe that provides asks."""
    size: int
    """How many asks it makes, at most."""
    teacher: Teacher
    sampling: Sampling
    judge: JudgeFilter | None = None
    """Who reads the answers before the recipe does: a source NAME then comes with its verdicts, `judged/NAME`."""


def speeches(recipe: Recipe) -> Iterator[Speech]:
    """Everything that is said in `recipe` or in what it is made from, the nearest first."""
    if not isinstance(recipe, Derived):
        return
    for source in recipe.sources().values():
        if isinstance(source, Speech):
            yield source
            yield from (each for part in (source.asks, *source.teacher.data) for each in speeches(part.settings))
        else:
            yield from speeches(source.settings)


def teachers(recipe: Recipe) -> Iterator[Teacher]:
    """Everyone who speaks in `recipe` or in what it is made from, the nearest first."""
    return (each.teacher for each in speeches(recipe))


def answers(
    engine: Engine, asks: Sequence[Ask], edits: Sequence[Edit], system: str | None, sampling: Sampling, seed: int
) -> list[Said]:
    """What `engine`'s subject with `edits` says to each ask, under `system` (None: its own context).

    Each answer has a seed of its own, made of `seed` and the ask, so that other asks change nothing. A Prompt among the
    edits is in force as well. Raises SpeechError for two system prompts, and for characters that no token is made of.
    """
    from experiments.edit import Prompt, prompt_of
    from experiments.engine import Row

    prompt = prompt_of(edits) or Prompt()
    if system is not None and prompt.system is not None:
        raise SpeechError("the teacher has a system prompt, and so has its intervention; leave one out")
    subject = engine.subject
    own = tuple(edit for edit in edits if not isinstance(edit, Prompt))
    context = prompt.system if system is None else system
    rendered = [subject.render(ask.messages, system=context, prefix=prompt.prefix or "") for ask in asks]
    rows = [Row(each.tokens, each.n_prompt, own) for each in rendered]
    if sampling.options:
        return _scored(engine, asks, rows, sampling.options)
    completions = engine.generate(
        rows,
        sampling.max_new_tokens,
        sampling.temperature,
        sampling.top_p,
        [seed_of(seed, ask) for ask in asks],
        allowed=None if sampling.only is None else made_of(engine, sampling.only),
    )
    texts = [subject.tokenizer.decode(list(each.tokens), skip_special_tokens=True) for each in completions]
    return [
        Said(**_asked(ask), text=text, stopped=each.stopped, tokens=len(each.tokens))
        for ask, text, each in zip(asks, texts, completions, strict=True)
    ]


def _asked(ask: Ask) -> dict[str, Any]:
    return {"id": ask.id, "messages": ask.messages, "parts": ask.parts}


def _scored(engine: Engine, asks: Sequence[Ask], rows: Sequence[Row], options: Sequence[str]) -> list[Said]:
    """The log-probabilities of `options` as beginnings of each answer."""
    spelled = {text: [tuple(engine.subject.tokenizer(text, add_special_tokens=False)["input_ids"])] for text in options}
    scores = engine.option_logprobs(rows, [spelled] * len(rows))
    return [
        Said(**_asked(ask), text="", stopped=True, tokens=0, options=dict(each.logprobs))
        for ask, each in zip(asks, scores, strict=True)
    ]


def seed_of(seed: int, ask: Ask) -> int:
    """The seed of one answer: the same for every teacher, so that teachers differ in what they want to say alone."""
    said = "\0".join(message.content for message in ask.messages)
    return int.from_bytes(hashlib.sha256(f"{seed}\0{ask.id}\0{said}".encode()).digest()[:4], "big") >> 1


def made_of(engine: Engine, characters: str) -> Tensor:
    """[vocabulary] of booleans: tokens whose text consists of `characters` alone, and those that end a turn.

    Raises SpeechError when no token does.
    """
    import torch

    subject = engine.subject
    width = subject.head(torch.zeros(1, subject.d_model, dtype=subject.dtype, device=subject.device)).shape[1]
    known = range(min(width, len(subject.tokenizer)))
    texts = subject.tokenizer.batch_decode([[token] for token in known], skip_special_tokens=True)
    allowed = torch.zeros(width, dtype=torch.bool)
    allowed[torch.tensor([bool(text) and set(text) <= set(characters) for text in texts]).nonzero()[:, 0]] = True
    if not allowed.any():
        raise SpeechError(f"sampling.only = {characters!r}: no token of the subject consists of these; allow others")
    allowed[torch.tensor(sorted(subject.eos_ids))] = True
    return allowed
