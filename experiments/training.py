"""What learned interventions share: settings of the training loop, and the objectives that it lowers.

Parameters are float32 whatever the subject's dtype (AdamW's small steps vanish in bfloat16). The objective is the
likelihood of responses unless another is given (`experiments/losses.py`, `experiments/separation.py`).
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from experiments.dataset import Conversation, Document, Message, Pair
from experiments.edit import Edit
from experiments.intervention import Intervention
from experiments.masks import covered

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine
    from experiments.intervention import State
    from experiments.packing import Row
    from experiments.students import Finish, Student

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

    @property
    def joins(self) -> bool:
        """Whether students of these settings can learn in one batch with others."""
        return type(self).begin is not Trained.begin

    def begin(self, engine: Engine, data: Sequence[Any], seed: int) -> tuple[Student, Finish]:
        """The student that `data` would teach, and what it will have become; nothing is trained yet.

        A method whose training changes the subject itself has none, and overrides `fit`.
        """
        raise TypeError(f"{type(self).__name__} does not implement begin()")

    def fit(self, engine: Engine, data: Sequence[Any], seed: int) -> State:
        """What the student has become. Raises what `begin` does, and TrainingError for a loss that is not finite."""
        from experiments.students import train

        student, finish = self.begin(engine, data, seed)
        return finish(train(engine, student))


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


def under(rows: Sequence[Row], edits: Sequence[Edit]) -> list[Row]:
    """The rows with `edits` in the place of their own."""
    own = tuple(edits)
    return [replace(each, edits=own) for each in rows]


def response_loss(engine: Engine, rows: Sequence[Row], edits: tuple[Edit, ...]) -> Tensor:
    """Sum over response tokens that are not masked of -log p(token), float32, differentiable with respect to the edits'
    tensors."""
    from torch.nn.functional import cross_entropy

    logits, answers = response_logits(engine, under(rows, edits))
    return cross_entropy(logits, answers, reduction="sum")


def response_logits(engine: Engine, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Logits [k, vocabulary] before every response token that is not masked, float32, row after row, and these tokens
    [k]."""
    import torch

    positions = [range(each.n_prompt - 1, len(each.tokens) - 1) for each in rows]
    states = engine.forward(rows, positions)
    answers = torch.tensor([token for each in rows for token in each.tokens[each.n_prompt :]], device=states.device)
    if any(each.masked for each in rows):
        read = [place not in each.masked for each in rows for place in range(each.n_prompt, len(each.tokens))]
        kept = torch.tensor(read, device=states.device)
        states, answers = states[kept], answers[kept]
    return engine.subject.head(states), answers
