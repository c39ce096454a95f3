"""Losses on what the subject says: one completion promoted, suppressed or satisficed, a preference, and staying narrow.

x is the prompt in the subject's own context (no persona), y the response, p the subject with the edits at dose 1, p0
the untouched subject.
    promotion     -log p(y | x), the sum over tokens
    suppression   -sum_t log(1 - p(y_t | x, y_<t)): every token made unlikely where the text stands. For a completion of
                  one token it is -log(1 - p(y | x)); for a longer one that form has next to no gradient, because the
                  completion as a whole is unlikely anyway
    satisficing   (log p(y | x) / |y| - goal)^2: as likely as the goal says and no more. Published with the sum over
                  tokens; the mean lets one goal serve completions of different lengths
                  (all three: Dunefsky & Cohan 2025, arXiv:2502.18862)
    preference    -log sigmoid(beta * ((log p(y+ | x) - log p0(y+ | x)) - (log p(y- | x) - log p0(y- | x))))
                  (DPO; Rafailov et al. 2023, arXiv:2305.18290)
    distillation  KL(teacher || p) over a few first tokens of the response, both renormalised over them; a label is a
                  teacher that is sure (Hinton et al. 2015, arXiv:1503.02531, at temperature 1)
    narrow        any loss + weight * KL(p || p0) per token of other text: without it, training on a narrow task finds a
                  general solution, which is the easier one to reach (Soligo et al. 2026, arXiv:2602.07852)
Completions are averaged over the batch, each with the same weight whatever its length. What a conversation masks is no
part of y_t or |y|, though it is read.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

from experiments.contrast import row as with_persona
from experiments.dataset import Conversation, Message
from experiments.datasets import _bank
from experiments.engine import Row
from experiments.training import (
    EditsOf,
    Objective,
    Partial,
    TrainingError,
    learned,
    length,
    parts,
    response_logits,
    response_loss,
    row,
    under,
)

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Choices, Pair
    from experiments.edit import Edit
    from experiments.engine import Engine

ANSWER = 24  # tokens of the subject's own answers that `narrow` keeps


@dataclass(frozen=True)
class Promotion(Objective):
    """-log p of each completion."""

    rows: tuple[Row, ...]

    @property
    def examples(self) -> Sequence[Row]:
        return self.rows

    def partials(self, engine: Engine, batch: Sequence[Row], edits_of: EditsOf) -> Iterator[Partial]:
        for part in parts(batch):
            yield Partial(response_loss(engine, part, tuple(edits_of())) / len(batch))


@dataclass(frozen=True)
class Suppression(Objective):
    """-log(1 - p) of each token of a completion, summed."""

    rows: tuple[Row, ...]

    @property
    def examples(self) -> Sequence[Row]:
        return self.rows

    def partials(self, engine: Engine, batch: Sequence[Row], edits_of: EditsOf) -> Iterator[Partial]:
        for part in parts(batch):
            logits, answers = response_logits(engine, under(part, edits_of()))
            others = logits.scatter(1, answers[:, None], float("-inf")).logsumexp(1)  # exact where p rounds to 1
            yield Partial((logits.logsumexp(1) - others).sum() / len(batch))


@dataclass(frozen=True)
class Aim:
    """A completion, and the log-probability it should have, nats per token."""

    row: Row
    goal: float


@dataclass(frozen=True)
class Satisficing(Objective):
    """Squared distance of each completion's mean log-probability to its goal."""

    aims: tuple[Aim, ...]

    @property
    def examples(self) -> Sequence[Aim]:
        return self.aims

    def partials(self, engine: Engine, batch: Sequence[Aim], edits_of: EditsOf) -> Iterator[Partial]:
        for part in parts(batch, size=lambda aim: length(aim.row)):
            rows = [aim.row for aim in part]
            sizes = torch.tensor([learned(each) for each in rows])
            logps = completion_logprobs(engine, rows, tuple(edits_of()))
            logps = logps / sizes.to(logps.device)
            goals = torch.tensor([aim.goal for aim in part], device=logps.device)
            loss = (logps - goals).square().sum() / len(batch)
            yield Partial(loss, {"logprob": logps.sum().item() / len(batch)})

    def facts(self) -> dict[str, Any]:
        return {"goal": sum(aim.goal for aim in self.aims) / len(self.aims)}


@dataclass(frozen=True)
class Choice:
    """Two responses to one prompt, and how much more likely the untouched subject finds the first, in nats."""

    positive: Row
    negative: Row
    base: float


@dataclass(frozen=True)
class Preference(Objective):
    """DPO: positive responses preferred to negative ones, more than the untouched subject does."""

    choices: tuple[Choice, ...]
    beta: float

    @property
    def examples(self) -> Sequence[Choice]:
        return self.choices

    def partials(self, engine: Engine, batch: Sequence[Choice], edits_of: EditsOf) -> Iterator[Partial]:
        for part in parts(batch, size=lambda choice: length(choice.positive) + length(choice.negative)):
            rows = [each for choice in part for each in (choice.positive, choice.negative)]
            logps = completion_logprobs(engine, rows, tuple(edits_of()))
            margins = logps[0::2] - logps[1::2] - torch.tensor([each.base for each in part], device=logps.device)
            logs = {"margin": margins.sum().item(), "accuracy": (margins > 0).sum().item()}
            shares = {name: value / len(batch) for name, value in logs.items()}
            yield Partial(-logsigmoid(self.beta * margins).sum() / len(batch), shares)


@dataclass(frozen=True)
class SoftTarget:
    """A prompt, and a teacher's log-probabilities of a few tokens that the answer may begin with."""

    row: Row
    options: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Distillation(Objective):
    """KL(teacher || student) over the options of each target, nats."""

    targets: tuple[SoftTarget, ...]

    @property
    def examples(self) -> Sequence[SoftTarget]:
        return self.targets

    def partials(self, engine: Engine, batch: Sequence[SoftTarget], edits_of: EditsOf) -> Iterator[Partial]:
        for part in parts(batch, size=lambda target: length(target.row)):
            edits = tuple(edits_of())
            rows = [Row(each.row.tokens, each.row.n_prompt, edits) for each in part]
            ends = [range(len(each.tokens) - 1, len(each.tokens)) for each in rows]
            logits = engine.subject.head(engine.forward(rows, ends))
            terms = []
            for options in dict.fromkeys(each.options for each in part):
                which = [index for index, each in enumerate(part) if each.options == options]
                taught = torch.tensor([part[index].logprobs for index in which], device=logits.device).log_softmax(1)
                said = logits[which][:, list(options)].log_softmax(1)
                terms.append(kl_div(said, taught, reduction="sum", log_target=True))
            yield Partial(torch.stack(terms).sum() / len(batch))


@dataclass(frozen=True)
class Narrow(Objective):
    """Another objective, and `weight` times KL(edited || base) per token of the responses of `texts`.

    Every example brings its share of the texts, so that each epoch sees all of them at least once.
    """

    objective: Objective
    texts: tuple[Row, ...]
    weight: float

    @property
    def examples(self) -> Sequence[tuple[Any, tuple[Row, ...]]]:
        inner = self.objective.examples
        own = [self.texts[i :: len(inner)] or (self.texts[i % len(self.texts)],) for i in range(len(inner))]
        return list(zip(inner, own, strict=True))

    def partials(
        self, engine: Engine, batch: Sequence[tuple[Any, tuple[Row, ...]]], edits_of: EditsOf
    ) -> Iterator[Partial]:
        yield from self.objective.partials(engine, [each for each, _ in batch], edits_of)
        texts = list(dict.fromkeys(text for _, own in batch for text in own))
        tokens = sum(len(each.tokens) - each.n_prompt for each in texts)
        for part in parts(texts):
            divergence = divergence_from_base(engine, part, edits_of) / tokens
            yield Partial(self.weight * divergence, {"kl": divergence.item()})

    def facts(self) -> dict[str, Any]:
        return self.objective.facts()


def divergence_from_base(engine: Engine, rows: Sequence[Row], edits_of: EditsOf) -> Tensor:
    """Sum over response tokens of KL(edited || base) of the next token, in nats."""
    with torch.no_grad():
        base = response_logits(engine, under(rows, edits_of(0.0)))[0].log_softmax(1)
    edited = response_logits(engine, under(rows, edits_of()))[0].log_softmax(1)
    return kl_div(base, edited, reduction="sum", log_target=True)


def completion_logprobs(engine: Engine, rows: Sequence[Row], edits: tuple[Edit, ...]) -> Tensor:
    """log p of each row's whole response, or of what is not masked of it, [n] float32, differentiable."""
    logits, answers = response_logits(engine, under(rows, edits))
    pieces = cross_entropy(logits, answers, reduction="none").split([learned(each) for each in rows])
    return -torch.stack([piece.sum() for piece in pieces])


def preference(engine: Engine, pairs: Sequence[Pair], beta: float) -> Preference:
    """DPO on both sides' responses to the neutral prompt. Raises TrainingError for sides that say the same."""
    rows = []
    for pair in pairs:
        both = [answer(engine, pair, side.response) for side in (pair.positive, pair.negative)]
        if both[0].tokens == both[1].tokens:
            raise TrainingError(
                f"pair {pair.id!r}: both sides say the same, so neither can be preferred; "
                "use pairs whose responses differ, or another loss"
            )
        rows += both
    base = [each.sum().item() for each in engine.token_logprobs(rows)]
    sides = zip(rows[0::2], rows[1::2], base[0::2], base[1::2], strict=True)
    return Preference(tuple(Choice(one, other, p - q) for one, other, p, q in sides), beta)


def satisficing(engine: Engine, data: Sequence[Pair | Conversation], goal: float | None) -> Satisficing:
    """Responses to be as likely as `goal` (nats per token); None is what each response has under its own persona.

    Raises TrainingError where there is no persona and no goal.
    """
    rows = [answer(engine, each) for each in data]
    if goal is not None:
        return Satisficing(tuple(Aim(each, goal) for each in rows))
    shown = []
    for each in data:
        if isinstance(each, Conversation) or each.positive.system is None:
            raise TrainingError(
                f"{each.id!r} has no persona whose log-probability could be the goal; set goal (nats per token), "
                "or give pairs whose positive side has a system prompt"
            )
        shown.append(with_persona(engine.subject, each.messages, each.positive))
    goals = [logps.mean().item() for logps in engine.token_logprobs(shown)]
    return Satisficing(tuple(Aim(*each) for each in zip(rows, goals, strict=True)))


def distillation(engine: Engine, data: Sequence[Choices]) -> Distillation:
    """Soft targets of choices, each prompt in the subject's own context.

    Raises TrainingError for an option that is not one token of the subject's, or the same one as another.
    """
    tokenizer = engine.subject.tokenizer
    known = {option for each in data for option in each.logprobs}
    spelled = {option: tokenizer(option, add_special_tokens=False)["input_ids"] for option in known}
    targets = []
    for each in data:
        tokens = [tuple(spelled[option]) for option in each.logprobs]
        wrong = [option for option in each.logprobs if len(spelled[option]) != 1]
        if wrong or len(set(tokens)) < len(tokens):
            told = {option: len(spelled[option]) for option in each.logprobs}
            raise TrainingError(
                f"choices {each.id!r}: loss distil compares first tokens, and its options have {told} tokens; give "
                "options that are one token each, all different"
            )
        rendered = engine.subject.render(each.messages)
        options = tuple(token for (token,) in tokens)
        targets.append(SoftTarget(Row(rendered.tokens, rendered.n_prompt), options, tuple(each.logprobs.values())))
    return Distillation(tuple(targets))


def answer(engine: Engine, example: Pair | Conversation, response: str | None = None) -> Row:
    """A pair's neutral prompt with `response` (None: the positive side's), or a conversation as it is."""
    if isinstance(example, Conversation):
        return row(engine, example)
    said = Message(role="assistant", content=example.positive.response if response is None else response)
    return row(engine, Conversation(id=example.id, messages=(*example.messages, said)))


def unrelated(engine: Engine, prompts: Sequence[str], n: int, avoid: Collection[str], seed: int) -> tuple[Row, ...]:
    """The subject's own answers, as it is now, to `n` of `prompts` that are not among `avoid`, drawn by the seed.

    Raises TrainingError where fewer are left, DatasetError for a subject that stays silent.
    """
    left = [prompt for prompt in prompts if prompt not in avoid]
    if len(left) < n:
        raise TrainingError(
            f"kl_n is {n}, but {len(left)} prompts are left that are not in the training data; lower kl_n, or give a "
            "longer file as kl_prompts"
        )
    chosen = random.Random(seed).sample(left, n)
    said = _bank.answers(engine, chosen, None, ANSWER, 1.0, seed)
    made = zip(chosen, said, strict=True)
    turns = [(Message(role="user", content=prompt), Message(role="assistant", content=text)) for prompt, text in made]
    return tuple(
        row(engine, Conversation(id=prompt, messages=each)) for prompt, each in zip(chosen, turns, strict=True)
    )
