"""Which candidate does the mean difference of activations point at?

    delta = mean over response tokens of h, data minus control             [d], at one site of one layer
    score = (U_c - mean of U) . (gain * delta)                             centred logits per unit of the final norm

U_c is the mean unembedding over the candidate's first tokens, gain the final norm's. The Activation Difference Lens
(Minder et al. 2025, https://arxiv.org/abs/2510.13900) reads the difference of two models on the same text at its first
five tokens (`first: 5`); here one model reads two texts. The norm of delta is not divided out, so that the score adds
up over rows. Without the centring a shift of all logits alike hides what tells tokens apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from experiments.depth import Depths
from experiments.detector import Candidates, Detector, Evidence, one_layer, ratio_of_sums
from experiments.detectors._reading import having_read, readout, rows_of, states
from experiments.edit import Site, SiteName

if TYPE_CHECKING:
    from experiments.dataset import Conversation
    from experiments.engine import Engine
    from experiments.permutation import Flags, Floats
    from experiments.subject import Subject

SHOWN = 20
"""Tokens of the vocabulary that the facts show."""


class ActivationDifference(Detector):
    """The logit lens on the mean difference of activations."""

    layer: Depths = 0.5
    """Decoder layer: a number (-1 is the last) or a fraction of the depth."""
    site: SiteName = "resid"
    """Activation of that layer; one that is as wide as the residual stream."""
    first: int | None = Field(default=None, ge=1)
    """Only so many tokens from the start of a response; null is all of them."""

    def evidence(
        self, engine: Engine, conversations: Sequence[Conversation], candidates: Candidates, seed: int
    ) -> Evidence:
        subject = engine.subject
        site = Site(self.site, one_layer(self.layer, subject.n_layers))
        lens = readout(subject, candidates, site)
        rows = rows_of(subject, conversations)
        spans = [having_read(row, self.first or "all") for row in rows]
        sums = np.zeros((len(rows), subject.d_model))
        for index, found in states(engine, rows, spans, site):
            sums[index] = found.double().sum(dim=0).cpu().numpy()
        sizes = np.array([len(span) for span in spans], float)

        def told(data: Flags) -> Mapping[str, Any]:
            means = [sums[side].sum(axis=0) / sizes[side].sum() for side in (data, ~data)]
            return seen(subject, means[0] - means[1], means[1])

        return ratio_of_sums(sums @ lens, sizes, facts={"unit": "centred logits", "site": str(site)}, told=told)


def seen(subject: Subject, delta: Floats, usual: Floats) -> dict[str, Any]:
    """The tokens that a difference [d] raises most and lowers most, and its size relative to the usual activation."""
    import torch

    from experiments.detectors._reading import norm_gain

    weight = subject.model.get_output_embeddings().weight
    change = torch.from_numpy(norm_gain(subject) * delta).to(weight.device, torch.float32)
    logits = torch.cat([part.float() @ change for part in weight.split(1 << 14)])
    count = min(SHOWN, len(logits))
    tops = {
        "raised": logits.topk(count).indices.tolist(),
        "lowered": (-logits).topk(count).indices.tolist(),
    }
    named = {name: [subject.tokenizer.decode([token]) for token in tokens] for name, tokens in tops.items()}
    return {**named, "relative_size": float(np.linalg.norm(delta) / np.linalg.norm(usual))}
