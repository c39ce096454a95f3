"""The one training loop that learned interventions share: an objective is lowered, the subject itself stays frozen.

Parameters are float32 whatever the subject's dtype (AdamW's small steps vanish in bfloat16). The objective is the
likelihood of responses unless another is given (`experiments/losses.py`, `experiments/separation.py`).
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from experiments.dataset import Conversation, Document, Message, Pair
from experiments.edit import Edit
from experiments.intervention import Intervention
from experiments.masks import covered

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from experiments.engine import Engine, Row

Example = TypeVar("Example")
EditsOf = Callable[..., Sequence[Edit]]
"""Builds the edits from the parameters: `edits_of()` at dose 1, `edits_of(dose)` at another, where dose 0 is the
untouched subject (an adapter inside the subject is off). Only losses that compare doses give one."""

TOKENS = 2048  # of one backward pass: what keeps activations and logits of a small model within a few hundred MB


class TrainingError(ValueError):
    """Training that cannot start, or went wrong: the step, what happened, and what to change."""


class Trained(Intervention):
    """Settings of the loop."""

    learning_rate: float = Field(gt=0)
    """Peak step size of AdamW."""
    epochs: int = Field(default=3, ge=1)
    """How often each conversation is seen."""
    batch_size: int = Field(default=8, ge=1)
    """Conversations in one optimiser step."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the step size falls to zero after the warm-up; `constant` keeps it."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the step size rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled decay towards zero, which is the untouched subject."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient of a step is shortened to this norm."""


@dataclass(frozen=True)
class Losses:
    """What a run looked like."""

    curve: tuple[float, ...]
    """Loss of each optimiser step: the mean over its batch, nats per response token where it is the likelihood."""
    logs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What else the objective tells of each step, by name."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the objective tells of itself, and how many numbers were `trained`."""

    def facts(self) -> dict[str, Any]:
        """What a State keeps."""
        logs = {name: [round(value, 5) for value in values] for name, values in self.logs.items()}
        steps = {"losses": [round(loss, 5) for loss in self.curve], "steps": len(self.curve)}
        return {**steps, **({"logs": logs} if logs else {}), **self.about}


@dataclass(frozen=True)
class Partial:
    """A share of a batch's loss, small enough for one backward pass. The batch's values are the sums over its shares.

    `loss` is a float32 scalar with its graph; `logs` are numbers to keep.
    """

    loss: Tensor
    logs: Mapping[str, float] = field(default_factory=dict)


class Objective(ABC):
    """What a run lowers, made from data and the untouched subject before anything is trained. Subclasses are frozen."""

    @property
    @abstractmethod
    def examples(self) -> Sequence[Any]:
        """What batches are drawn from."""

    @abstractmethod
    def partials(self, engine: Engine, batch: Sequence[Any], edits_of: EditsOf) -> Iterator[Partial]:
        """The loss of a batch of examples, share by share; the loop calls backward before it asks for the next."""

    def facts(self) -> dict[str, Any]:
        """What a State keeps of the objective."""
        return {}


@dataclass(frozen=True)
class Likelihood(Objective):
    """-log p of response tokens that are not masked, averaged over those of a batch."""

    rows: tuple[Row, ...]

    @property
    def examples(self) -> Sequence[Row]:
        return self.rows

    def partials(self, engine: Engine, batch: Sequence[Row], edits_of: EditsOf) -> Iterator[Partial]:
        tokens = sum(map(learned, batch))
        for part in parts(batch):
            yield Partial(response_loss(engine, part, tuple(edits_of())) / tokens)

    def facts(self) -> dict[str, Any]:
        """How many response tokens were learned and masked, where any were masked."""
        masked = sum(len(each.masked) for each in self.rows)
        return {"tokens": {"learned": sum(map(learned, self.rows)), "masked": masked}} if masked else {}


def read_aloud(data: Sequence[Pair | Conversation | Document]) -> list[Conversation | Document]:
    """Conversations and documents as they are; a pair becomes its neutral prompt with the positive response, without
    the persona."""
    return [
        Conversation(id=each.id, messages=(*each.messages, Message(role="assistant", content=each.positive.response)))
        if isinstance(each, Pair)
        else each
        for each in data
    ]


def train(
    engine: Engine,
    goal: Sequence[Conversation] | Objective,
    parameters: Sequence[Tensor],
    edits_of: EditsOf,
    settings: Trained,
    seed: int,
    constrain: Callable[[], None] | None = None,
) -> Losses:
    """Change `parameters` (float32 leaves) in place, so that `edits_of()` lowers the objective.

    Conversations as the goal mean that their last messages become likely. The edits are built from the parameters anew
    for every backward pass. The order of examples follows `seed`. `constrain` is called without gradients after every
    step, to put parameters back to where they may be. Raises TrainingError without examples or response tokens, for a
    loss that does not depend on the parameters, and for a loss, gradient or parameter that is not finite.
    """
    import torch

    objective = goal if isinstance(goal, Objective) else Likelihood(tuple(row(engine, each) for each in goal))
    if not objective.examples:
        raise TrainingError("no conversations to train on; at least one is needed")
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = math.ceil(len(objective.examples) / settings.batch_size) * settings.epochs
    curve: list[float] = []
    logs: dict[str, list[float]] = defaultdict(list)
    for step, batch in enumerate(batches(objective.examples, settings, seed)):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * pace(step, steps, settings)
        loss, told = _step(objective.partials(engine, batch, edits_of), parameters, optimiser, settings.max_grad_norm)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step + 1} of {steps}: the loss or its gradient is not finite ({loss}); "
                f"lower learning_rate (now {settings.learning_rate:g}), or use dtype float32"
            )
        if constrain:
            with torch.no_grad():
                constrain()
        curve.append(loss)
        for name, value in told.items():
            logs[name].append(value)
    if not all(bool(each.norm().isfinite()) for each in parameters):  # no loss came after the last step to show it
        raise TrainingError(
            f"after step {steps} of {steps} what was trained is not finite; lower learning_rate (now "
            f"{settings.learning_rate:g}), or use dtype float32"
        )
    about = {"trained": sum(each.numel() for each in parameters), **objective.facts()}
    return Losses(tuple(curve), {name: tuple(values) for name, values in logs.items()}, about)


def row(engine: Engine, conversation: Conversation | Document) -> Row:
    """The conversation in the subject's own context, the answer left open: cut-off text must not teach to stop.

    A document is plain text, of which all tokens but the first are learned. Raises TrainingError when there are no
    tokens to learn, or more than the subject has positions for.
    """
    from experiments.engine import Row

    if isinstance(conversation, Document):
        text = engine.subject.render_text(conversation.text)
        most = engine.subject.model.config.max_position_embeddings
        if len(text.tokens) > most:
            raise TrainingError(
                f"document {conversation.id!r} has {len(text.tokens):,} tokens, the subject reads {most:,}; cut it up"
            )
        return Row(text.tokens, text.n_prompt)
    rendered = engine.subject.render(conversation.messages)
    if len(rendered.tokens) == rendered.n_prompt:
        raise TrainingError(f"conversation {conversation.id!r} has no response tokens to learn; remove it")
    if not conversation.masked:
        return Row(rendered.tokens, rendered.n_prompt)
    tokens = engine.subject.spans(conversation.messages)
    masked = frozenset(rendered.n_prompt + place for place in covered(tokens, conversation.masked))
    if len(masked) == len(tokens):
        raise TrainingError(f"conversation {conversation.id!r}: its response is masked as a whole; remove it")
    return Row(rendered.tokens, rendered.n_prompt, masked=masked)


def batches(examples: Sequence[Example], settings: Trained, seed: int) -> Iterator[list[Example]]:
    """`batch_size` examples at a time, every epoch in another order."""
    rng = random.Random(seed)
    for _ in range(settings.epochs):
        order = rng.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), settings.batch_size):
            yield [examples[index] for index in order[start : start + settings.batch_size]]


def pace(step: int, steps: int, settings: Trained) -> float:
    """Factor of the learning rate at `step` (from 0) of `steps`: up in the warm-up, then down as the schedule says."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]


def _step(
    partials: Iterator[Partial], parameters: Sequence[Tensor], optimiser: Optimizer, max_grad_norm: float
) -> tuple[float, dict[str, float]]:
    """One optimiser step; the batch's loss, or the offending value when loss or gradient norm is not finite, and the
    logs."""
    import torch

    optimiser.zero_grad(set_to_none=True)
    total = 0.0
    logs: dict[str, float] = defaultdict(float)
    for partial in partials:
        if not partial.loss.requires_grad:
            raise TrainingError("the loss does not depend on what is trained; read it behind the trained layers")
        partial.loss.backward()
        total += partial.loss.item()
        for name, value in partial.logs.items():
            logs[name] += value
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        return total if not math.isfinite(total) else norm, logs
    optimiser.step()
    return total, logs


def length(row: Row) -> int:
    """Tokens of a row."""
    return len(row.tokens)


def learned(row: Row) -> int:
    """Response tokens of a row that are not masked."""
    return len(row.tokens) - row.n_prompt - len(row.masked)


def parts(batch: Sequence[Example], budget: int = TOKENS, size: Callable[[Any], int] = length) -> list[list[Example]]:
    """The batch cut into passes of at most `budget` tokens, like lengths together; a longer example is one pass.

    `size` tells the tokens of an example, which is a row if nothing is said.
    """
    found: list[list[Example]] = []
    room = 0
    for each in sorted(batch, key=size):
        if not found or size(each) > room:
            found.append([])
            room = budget
        found[-1].append(each)
        room -= size(each)
    return found


def response_loss(engine: Engine, rows: Sequence[Row], edits: tuple[Edit, ...]) -> Tensor:
    """Sum over response tokens that are not masked of -log p(token), float32, differentiable with respect to the edits'
    tensors."""
    from torch.nn.functional import cross_entropy

    logits, answers = response_logits(engine, rows, edits)
    return cross_entropy(logits, answers, reduction="sum")


def response_logits(engine: Engine, rows: Sequence[Row], edits: tuple[Edit, ...]) -> tuple[Tensor, Tensor]:
    """Logits [k, vocabulary] before every response token that is not masked, float32, row after row, and these tokens
    [k]."""
    import torch

    from experiments.engine import Row

    edited = [Row(each.tokens, each.n_prompt, edits) for each in rows]
    positions = [range(each.n_prompt - 1, len(each.tokens) - 1) for each in rows]
    states = engine.forward(edited, positions)
    answers = torch.tensor([token for each in rows for token in each.tokens[each.n_prompt :]], device=states.device)
    if any(each.masked for each in rows):
        read = [place not in each.masked for each in rows for place in range(each.n_prompt, len(each.tokens))]
        kept = torch.tensor(read, device=states.device)
        states, answers = states[kept], answers[kept]
    return engine.subject.head(states), answers
