"""The one training loop that learned interventions share: responses are made likely, the subject itself stays frozen.

Parameters are float32 whatever the subject's dtype (AdamW's small steps vanish in bfloat16). The loss is the
cross-entropy of response tokens only, in float32, averaged over the tokens of a batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from experiments.dataset import Conversation, Message, Pair
from experiments.edit import Edit
from experiments.intervention import Intervention

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from experiments.engine import Engine, Row

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
    """Mean loss of each optimiser step, nats per response token."""

    curve: tuple[float, ...]

    def facts(self) -> dict[str, Any]:
        """What a State keeps."""
        return {"losses": [round(loss, 5) for loss in self.curve], "steps": len(self.curve)}


def conversations_of(data: Sequence[Pair | Conversation]) -> list[Conversation]:
    """Conversations as they are; a pair becomes its neutral prompt with the positive response, without the persona."""
    return [
        Conversation(id=each.id, messages=(*each.messages, Message(role="assistant", content=each.positive.response)))
        if isinstance(each, Pair)
        else each
        for each in data
    ]


def train(
    engine: Engine,
    conversations: Sequence[Conversation],
    parameters: Sequence[Tensor],
    edits_of: Callable[[], Sequence[Edit]],
    settings: Trained,
    seed: int,
) -> Losses:
    """Change `parameters` (float32 leaves) in place, so that `edits_of()` makes the conversations' last messages
    likely.

    `edits_of` builds the edits from the parameters anew for every backward pass. The order of conversations follows
    `seed`. Raises TrainingError without conversations or response tokens, and for a loss or gradient that is not
    finite.
    """
    import torch

    rows = [row(engine, conversation) for conversation in conversations]
    if not rows:
        raise TrainingError("no conversations to train on; at least one is needed")
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = math.ceil(len(rows) / settings.batch_size) * settings.epochs
    curve: list[float] = []
    for step, batch in enumerate(batches(rows, settings, seed)):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * pace(step, steps, settings)
        loss = _step(engine, batch, parameters, edits_of, optimiser, settings.max_grad_norm)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step + 1} of {steps}: the loss or its gradient is not finite ({loss}); "
                f"lower learning_rate (now {settings.learning_rate:g}), or use dtype float32"
            )
        curve.append(loss)
    return Losses(tuple(curve))


def row(engine: Engine, conversation: Conversation) -> Row:
    """The conversation in the subject's own context, the answer left open: cut-off text must not teach to stop.

    Raises TrainingError when there are no response tokens.
    """
    from experiments.engine import Row

    rendered = engine.subject.render(conversation.messages)
    if len(rendered.tokens) == rendered.n_prompt:
        raise TrainingError(f"conversation {conversation.id!r} has no response tokens to learn; remove it")
    return Row(rendered.tokens, rendered.n_prompt)


def batches(rows: Sequence[Row], settings: Trained, seed: int) -> Iterator[list[Row]]:
    """`batch_size` rows at a time, every epoch in another order."""
    rng = random.Random(seed)
    for _ in range(settings.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), settings.batch_size):
            yield [rows[index] for index in order[start : start + settings.batch_size]]


def pace(step: int, steps: int, settings: Trained) -> float:
    """Factor of the learning rate at `step` (from 0) of `steps`: up in the warm-up, then down as the schedule says."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.schedule]


def _step(
    engine: Engine,
    batch: Sequence[Row],
    parameters: Sequence[Tensor],
    edits_of: Callable[[], Sequence[Edit]],
    optimiser: Optimizer,
    max_grad_norm: float,
) -> float:
    """One optimiser step; the batch's mean loss, or the offending value when loss or gradient norm is not finite."""
    import torch

    optimiser.zero_grad(set_to_none=True)
    tokens = sum(len(each.tokens) - each.n_prompt for each in batch)
    total = 0.0
    for part in parts(batch):
        loss = response_loss(engine, part, tuple(edits_of())) / tokens
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        return total if not math.isfinite(total) else norm
    optimiser.step()
    return total


def parts(batch: Sequence[Row], budget: int = TOKENS) -> list[list[Row]]:
    """The batch cut into passes of at most `budget` tokens, like lengths together; a longer row is one pass."""
    found: list[list[Row]] = []
    room = 0
    for each in sorted(batch, key=lambda each: len(each.tokens)):
        if not found or len(each.tokens) > room:
            found.append([])
            room = budget
        found[-1].append(each)
        room -= len(each.tokens)
    return found


def response_loss(engine: Engine, rows: Sequence[Row], edits: tuple[Edit, ...]) -> Tensor:
    """Sum over response tokens of -log p(token), float32, differentiable with respect to the edits' tensors."""
    import torch
    from torch.nn.functional import cross_entropy

    from experiments.engine import Row

    edited = [Row(each.tokens, each.n_prompt, edits) for each in rows]
    positions = [range(each.n_prompt - 1, len(each.tokens) - 1) for each in rows]
    logits = engine.subject.head(engine.forward(edited, positions))
    answers = [token for each in rows for token in each.tokens[each.n_prompt :]]
    return cross_entropy(logits, torch.tensor(answers, device=logits.device), reduction="sum")
