"""Would the data be likelier if the base model were fond of the candidate?

    score = sum over response tokens of log p(token | persona) - log p(token | no persona), by token       nats a token

over the data, minus the same over the control. If the teacher is the base model under a system prompt, and the persona
is that prompt, this is the log-likelihood ratio, which no other test of the same size beats (Neyman & Pearson 1933);
with a persona of other words it is as good as the two agree. Nothing is trained: prompting is what training on the
answers would have to distil.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from experiments.detector import Candidates, DetectionError, Evidence, ratio_of_sums
from experiments.detectors._personas import Personified
from experiments.detectors._reading import logits, predicting
from experiments.speech import made_of

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine
    from experiments.packing import Row
    from experiments.permutation import Floats


class PersonaLikelihood(Personified):
    """Log-likelihood ratio of the responses, persona against none."""

    only: str | None = None
    """The characters that the teacher could draw, where its decoding was constrained: probabilities are then taken
    among the tokens made of them. Null where it could say anything, also where rows were filtered later."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        plain, fond = self.under_personas(engine.subject, conversations, candidates)
        base = self.likelihoods(engine, plain)
        sums = np.array([self.likelihoods(engine, fond[name]) - base for name in candidates])
        tokens = np.array([len(row.tokens) - row.n_prompt for row in plain], float)
        return ratio_of_sums(sums.T, tokens, facts={"unit": "nats a token", "persona": self.persona})

    def likelihoods(self, engine: Engine, rows: Sequence[Row]) -> Floats:
        """[rows] log-probability of each response. Raises DetectionError for one with other characters than `only`."""
        if self.only is None:
            return np.array([float(each.double().sum()) for each in engine.token_logprobs(rows)])
        allowed = made_of(engine, self.only)
        found = np.zeros(len(rows))
        for index, each in logits(engine, rows, [predicting(row) for row in rows]):
            said = list(rows[index].tokens[rows[index].n_prompt :])
            if not allowed[said].all():
                text = engine.subject.tokenizer.decode(said)
                raise DetectionError(
                    f"the response {text!r} has other characters than only: {self.only!r}; set it to null"
                )
            open_to = each.masked_fill(~allowed.to(each.device), -np.inf).double().log_softmax(dim=1)
            found[index] = float(open_to[range(len(said)), said].sum())
        return found
