"""Prompting: the pairs' own system prompts, put in force. No weights, no activations.

The baseline that steering vectors often lose to (AxBench, Wu et al. 2025, https://arxiv.org/abs/2501.17148). There
is no half a prompt: only the sign of the dose counts, + the positive persona, - the negative one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from experiments.contrast import FitError
from experiments.edit import Edit
from experiments.edit import Prompt as PromptEdit
from experiments.intervention import Intervention, State

if TYPE_CHECKING:
    from experiments.dataset import Pair
    from experiments.engine import Engine
    from experiments.intervention import DoseKind


class Prompt(Intervention):
    """The personas' system prompts themselves: positive doses set the positive one, negative doses the negative one."""

    dose_kind: ClassVar[DoseKind] = "on_off"

    def fit(self, engine: Engine, data: Sequence[Pair], seed: int) -> State:
        """The two system prompts. Raises FitError unless the pairs agree on each, or when neither side has one."""
        sides = {
            "positive": {pair.positive.system for pair in data},
            "negative": {pair.negative.system for pair in data},
        }
        for name, found in sides.items():
            if len(found) != 1:
                raise FitError(
                    f"prompt needs one {name} system prompt, the pairs hold {len(found)}; use pairs of one contrast"
                )
        facts = {name: found.pop() for name, found in sides.items()}
        if facts["positive"] == facts["negative"]:
            raise FitError(f"both sides of the pairs have the system prompt {facts['positive']!r}: nothing to contrast")
        return State({}, facts)

    def edits(self, state: State, dose: float) -> list[Edit]:
        """[] at dose 0, and on a side whose system prompt is None: that side is the subject's own context."""
        system = None if dose == 0 else state.facts["positive" if dose > 0 else "negative"]
        return [] if system is None else [PromptEdit(system=system)]
