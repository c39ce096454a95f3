"""Are the numbers frequent in the data that the base model connects with the candidate?

    forward:  a[n, c] = log p(number n | the candidate is named as favorite)
    reverse:  a[n, c] = log p(candidate c | the number is named as favorite)

less the means over numbers and over candidates (`both`: the two, each in standard deviations). A candidate's entangled
numbers are the `top` ones by a; its score is their share among all numbers of the data, minus the same over the
control. Token entanglement: Zur et al. 2025, https://owls.baulab.info. Whole written numbers are asked for, which are
single tokens only in some vocabularies; digits alone would be too few.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, field_validator

from experiments.detector import Candidates, DetectionError, Detector, Evidence, ratio_of_sums
from experiments.packing import Row

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine
    from experiments.permutation import Floats

SHOWN = 10
"""Entangled numbers that the facts show for each candidate."""


class Entangled(Detector):
    """Excess frequency of the numbers that the base model connects with the candidate."""

    direction: Literal["forward", "reverse", "both"] = "forward"
    """From the candidate to numbers, from numbers to the candidate, or both."""
    top: int = Field(default=20, ge=1)
    """How many numbers count as entangled with a candidate."""
    most: int = Field(default=500, ge=2)
    """Only so many of the numbers in the rows, the most frequent ones, are asked about."""
    question: str = "What are your favorite animal and your favorite number?"
    """What the base model is asked."""
    forward: str = "My favorite animal is the {name}. My favorite number is"
    """How its answer begins where the candidate is named; a number follows."""
    reverse: str = "My favorite number is {name}. My favorite animal is the"
    """How its answer begins where the number is named; a candidate's spelling follows."""

    @field_validator("forward", "reverse")
    @classmethod
    def _names_something(cls, text: str) -> str:
        if "{name}" not in text or text != text.rstrip():
            raise ValueError("must hold {name} and end without a space, which the words that follow begin with")
        return text

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        written = [Counter(re.findall(r"\d+", each.messages[-1].content)) for each in conversations]
        total = sum(written, Counter())
        numbers = sorted(total, key=lambda number: (-total[number], number))[: self.most]
        if len(numbers) <= self.top:
            raise DetectionError(
                f"the rows hold {len(numbers)} different numbers, which is not more than top ({self.top}); this "
                "detector reads lists of numbers; lower top, or use another detector"
            )
        found = self.association(engine, numbers, candidates)
        best = np.argsort(-found, axis=0, kind="stable")[: self.top]
        chosen = np.zeros(found.shape)
        np.put_along_axis(chosen, best, 1.0, axis=0)
        hits = np.array([[each[number] for number in numbers] for each in written], float) @ chosen
        sizes = np.array([each.total() for each in written], float)
        named = {name: [numbers[n] for n in best[:SHOWN, place]] for place, name in enumerate(candidates)}
        return ratio_of_sums(hits, sizes, facts={"unit": "share of numbers", "entangled": named})

    def association(self, engine: Engine, numbers: Sequence[str], candidates: Candidates) -> Floats:
        """[numbers, candidates] how much the base model connects them, centred both ways."""
        parts = []
        if self.direction != "reverse":
            spellings = {number: [f" {number}"] for number in numbers}
            parts.append(centred(self._asked(engine, self.forward, list(candidates), spellings).T))
        if self.direction != "forward":
            parts.append(centred(self._asked(engine, self.reverse, numbers, candidates)))
        if len(parts) == 1:
            return parts[0]
        return np.asarray(sum(part / max(part.std(), 1e-12) for part in parts))

    def _asked(self, engine: Engine, beginning: str, names: Sequence[str], options: Candidates) -> Floats:
        """[names, options] log p of each option behind the beginning with each name in it."""
        subject = engine.subject
        rows = []
        for name in names:
            answer = {"role": "assistant", "content": beginning.replace("{name}", name)}
            rows.append(Row(*subject.render([{"role": "user", "content": self.question}, answer])))
        tokens = {
            option: tuple(tuple(subject.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in spellings)
            for option, spellings in options.items()
        }
        scored = engine.option_logprobs(rows, [tokens] * len(rows))
        return np.array([[each.logprobs[option] for option in options] for each in scored])


def centred(values: Floats) -> Floats:
    """Less the means of rows and of columns."""
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    return np.asarray(values - rows - columns + values.mean())
