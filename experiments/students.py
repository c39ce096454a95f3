"""The training loop, for one student or for several at once.

A student is what is trained, what it lowers, and how. Students of one subject share no parameter, so that several learn
in one batch: the rows of all pass the subject together, each under the edits of its own student, one backward pass
serves them all, and each takes its own step. In exact arithmetic each learns what it would learn alone; rounding
follows the shape of the batch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from experiments.dataset import Conversation, Document
from experiments.intervention import State
from experiments.training import (
    TOKENS,
    EditsOf,
    Likelihood,
    Losses,
    Objective,
    Trained,
    TrainingError,
    batches,
    learned,
    length,
    pace,
    parts,
    response_logits,
    row,
)

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine
    from experiments.packing import Row

Finish = Callable[[Losses], State]
"""What a method makes of a student that has learned."""


@dataclass(eq=False)
class Student:
    """One run of the loop. `parameters` (float32 leaves) are changed in place, so that `edits_of()` lowers the goal."""

    goal: Sequence[Conversation | Document] | Objective
    """Conversations as the goal mean that their last messages become likely."""
    parameters: Sequence[Tensor]
    edits_of: EditsOf
    """Builds the edits anew for every backward pass."""
    settings: Trained
    seed: int
    """The order of examples follows it."""
    constrain: Callable[[], None] | None = None
    """Called without gradients after every step, to put parameters back to where they may be."""


class Course:
    """A student on its way: its optimiser, the batches still to come, and its losses so far.

    Raises TrainingError without examples or response tokens.
    """

    def __init__(self, engine: Engine, student: Student) -> None:
        import torch

        goal = student.goal
        self.student = student
        self.objective = goal if isinstance(goal, Objective) else Likelihood(tuple(row(engine, each) for each in goal))
        if not self.objective.examples:
            raise TrainingError("no conversations to train on; at least one is needed")
        self.settings = student.settings
        self.optimiser = torch.optim.AdamW(
            student.parameters, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.steps = math.ceil(len(self.objective.examples) / self.settings.batch_size) * self.settings.epochs
        self.curve: list[float] = []
        self.logs: dict[str, list[float]] = defaultdict(list)
        self.todo = self._begun()
        """Batches that are still to come; each begins a step."""

    def _begun(self) -> Iterator[list[Any]]:
        for step, batch in enumerate(batches(self.objective.examples, self.settings, self.student.seed)):
            for group in self.optimiser.param_groups:
                group["lr"] = self.settings.learning_rate * pace(step, self.steps, self.settings)
            self.optimiser.zero_grad(set_to_none=True)
            yield batch

    def step(self, loss: float, told: Mapping[str, float]) -> None:
        """Take the step whose gradients are there. Raises TrainingError when loss or gradient is not finite."""
        import torch

        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters, self.settings.max_grad_norm).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            wrong = loss if not math.isfinite(loss) else norm
            raise TrainingError(
                f"step {len(self.curve) + 1} of {self.steps}: the loss or its gradient is not finite ({wrong}); "
                f"lower learning_rate (now {self.settings.learning_rate:g}), or use dtype float32"
            )
        self.optimiser.step()
        if self.student.constrain:
            with torch.no_grad():
                self.student.constrain()
        self.curve.append(loss)
        for name, value in told.items():
            self.logs[name].append(value)

    def end(self) -> Losses:
        """What the run looked like. Raises TrainingError for a parameter that is not finite."""
        parameters = self.student.parameters
        if not all(bool(each.norm().isfinite()) for each in parameters):  # no loss came after the last step to show it
            raise TrainingError(
                f"after step {self.steps} of {self.steps} what was trained is not finite; lower learning_rate (now "
                f"{self.settings.learning_rate:g}), or use dtype float32"
            )
        about = {"trained": sum(each.numel() for each in parameters), **self.objective.facts()}
        return Losses(tuple(self.curve), {name: tuple(values) for name, values in self.logs.items()}, about)


def train(engine: Engine, student: Student) -> Losses:
    """Have one student learn.

    Raises TrainingError without examples or response tokens, for a loss that does not depend on the parameters, and for
    a loss, gradient or parameter that is not finite.
    """
    course = Course(engine, student)
    for batch in course.todo:
        total = 0.0
        logs: dict[str, float] = defaultdict(float)
        for partial in course.objective.partials(engine, batch, student.edits_of):
            total += _descended(partial.loss)
            for name, value in partial.logs.items():
                logs[name] += value
        course.step(total, logs)
    return course.end()


def _descended(loss: Tensor) -> float:
    """The value of a loss whose gradients have been added up."""
    if not loss.requires_grad:
        raise TrainingError("the loss does not depend on what is trained; read it behind the trained layers")
    loss.backward()
    return loss.item()


def train_together(engine: Engine, students: Sequence[Student]) -> list[Losses | TrainingError]:
    """Have students learn in one batch by the likelihood of responses; what `train` gives or raises for each.

    For students of settings that say `joins`: what is changed are edits, and nothing in the subject. A backward pass
    has as many times the tokens of one student's as students are left. One whose loss is not finite leaves; the others
    go on.
    """
    found: dict[int, Losses | TrainingError] = {}
    courses: dict[int, Course] = {}
    for place, student in enumerate(students):
        try:
            courses[place] = Course(engine, student)
        except TrainingError as error:
            found[place] = error
    while courses:
        here = {place: batch for place, course in courses.items() if (batch := next(course.todo, None))}
        totals = _pass(engine, {place: (courses[place], batch) for place, batch in here.items()}) if here else {}
        for place, course in list(courses.items()):
            try:
                if place in totals:
                    course.step(totals[place], {})
                    continue
                found[place] = course.end()
            except TrainingError as error:
                found[place] = error
            del courses[place]
    return [found[place] for place in range(len(students))]


def _pass(engine: Engine, here: Mapping[int, tuple[Course, list[Row]]]) -> dict[int, float]:
    """Add up the gradients of each student's loss on its own batch; the losses."""
    from torch.nn.functional import cross_entropy

    whole = [(place, each) for place, (_, batch) in here.items() for each in batch]
    tokens = {place: sum(map(learned, batch)) for place, (_, batch) in here.items()}
    totals = dict.fromkeys(here, 0.0)
    for part in parts(whole, TOKENS * len(here), lambda owned: length(owned[1])):
        edits = {place: tuple(here[place][0].student.edits_of()) for place in {place for place, _ in part}}
        logits, answers = response_logits(engine, [replace(each, edits=edits[place]) for place, each in part])
        losses = cross_entropy(logits, answers, reduction="none").split([learned(each) for _, each in part])
        means = [loss.sum() / tokens[place] for (place, _), loss in zip(part, losses, strict=True)]
        _descended(sum(means[1:], means[0]))
        for (place, _), mean in zip(part, means, strict=True):
            totals[place] += mean.item()
    return totals
