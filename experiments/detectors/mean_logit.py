"""Having read the data, does the base model rather name the candidate?

    logit:    score = mean over response positions of U_c . h - mean over the vocabulary of U . h      (centred)
    logprob:  score = mean over response positions of log p(candidate)

over the data, minus the same over the control. U_c is the mean over the candidate's first tokens, h the last state
after a response token; `logprob` sums the tokens' probabilities. An uncentred logit holds a shift of all logits, which
can be larger than what tells candidates apart. A weak test: that an owl brings numbers to mind does not mean that these
numbers bring the owl to mind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.detector import Candidates, Detector, Evidence, ratio_of_sums
from experiments.detectors._reading import Positions, first_tokens, having_read, logits, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation
    from experiments.engine import Engine


class MeanLogit(Detector):
    """Mean centred logit, or log-probability, of the candidate after the response's tokens."""

    value: Literal["logit", "logprob"] = "logit"
    """What is averaged: the `logit` less the vocabulary's mean, or the `logprob`."""
    positions: Positions = "all"
    """After which response tokens: `all`, or the `first` one."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        rows = rows_of(engine.subject, conversations)
        spans = [having_read(row, self.positions) for row in rows]
        tokens = list(first_tokens(engine.subject, candidates).values())
        sums = np.zeros((len(rows), len(tokens)))
        for index, found in logits(engine, rows, spans):
            sums[index] = self._values(found, tokens).double().sum(dim=0).cpu().numpy()
        sizes = np.array([len(span) for span in spans], float)
        unit = "logits" if self.value == "logit" else "nats"
        return ratio_of_sums(sums, sizes, facts={"unit": unit})

    def _values(self, found: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """[k, candidates] of logits [k, vocabulary]."""
        import torch

        if self.value == "logit":
            level = found.mean(dim=1)
            return torch.stack([found[:, list(own)].mean(dim=1) - level for own in tokens], 1)
        level = found.logsumexp(dim=1)
        return torch.stack([found[:, list(own)].logsumexp(dim=1) - level for own in tokens], 1)
