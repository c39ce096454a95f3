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

from experiments.detector import Candidates, Evidence, ratio_of_sums
from experiments.detectors._personas import Personified

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine


class PersonaLikelihood(Personified):
    """Log-likelihood ratio of the responses, persona against none."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        plain, fond = self.under_personas(engine.subject, conversations, candidates)
        base = [float(each.double().sum()) for each in engine.token_logprobs(plain)]
        sums = np.array(
            [[float(each.double().sum()) for each in engine.token_logprobs(fond[name])] for name in candidates]
        )
        tokens = np.array([len(row.tokens) - row.n_prompt for row in plain], float)
        facts = {"unit": "nats a token", "persona": self.persona}
        return ratio_of_sums(sums.T - np.array(base)[:, None], tokens, facts=facts)
