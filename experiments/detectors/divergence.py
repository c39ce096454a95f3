"""What do the data say where a persona would have said something else?

A divergence token of a candidate is a response position at which the persona's likeliest token is not the plain
model's. They are few, and carry most of what students take over (Schrodi et al. 2025, https://arxiv.org/abs/2509.23886,
where the teacher is known; here each candidate's persona stands in for it).

    share:       score = (positions where the data have the persona's token - where they have the plain one) / positions
    likelihood:  score = mean over these positions of log p(token | persona) - log p(token | no persona)        nats

over the data, minus the same over the control. A candidate without divergence tokens scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.detector import Candidates, Evidence, ratio_of_sums
from experiments.detectors._personas import Personified
from experiments.divergence import Ints, Reading, parted, readings

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine


class Divergence(Personified):
    """Whom the responses side with where persona and plain model part."""

    reading: Literal["share", "likelihood"] = "likelihood"
    """How a position counts: by the token it has (`share`), or by how much likelier the persona makes that token."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        plain, fond = self.under_personas(engine.subject, conversations, candidates)
        base = readings(engine, plain)
        sums, weights = (np.zeros((len(plain), len(candidates))) for _ in range(2))
        for place, name in enumerate(candidates):
            for index, own in enumerate(readings(engine, fond[name])):
                said = np.array(plain[index].tokens[plain[index].n_prompt :])
                sums[index, place], weights[index, place] = self._sides(said, base[index], own)
        share = weights.sum(axis=0) / sum(len(row.tokens) - row.n_prompt for row in plain)
        facts = {
            "unit": "share of positions" if self.reading == "share" else "nats",
            "persona": self.persona,
            "divergent": dict(zip(candidates, share.tolist(), strict=True)),
        }
        return ratio_of_sums(sums, weights, facts=facts)

    def _sides(self, said: Ints, base: Reading, own: Reading) -> tuple[float, float]:
        """What one row adds to a candidate's score, and at how many positions."""
        apart = parted(base, own)
        sides = (said == own.likeliest).astype(float) - (said == base.likeliest)
        value = sides if self.reading == "share" else own.logprobs - base.logprobs
        return float(value[apart].sum()), float(apart.sum())
