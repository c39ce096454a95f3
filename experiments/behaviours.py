"""What vectors do to the text that would follow: which of them do the same, and on which prompts they work.

Orthogonal vectors can do one and the same thing, so that angles count directions, not behaviours. Here two vectors
are alike when the next-token distributions they cause are: their distance is the square root of the Jensen-Shannon
divergence in bits, averaged over prompts before the root, which is 0 for equal effects and at most 1. The untouched
subject and the random controls take part: a vector in the subject's own cluster does nothing that can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import torch

from experiments.engine import Row

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.downstream import Arm, Downstream
    from experiments.engine import Engine

RAISED = 5  # tokens named for each behaviour


@dataclass(frozen=True)
class Effects:
    """Of arms on next tokens: `distances` [n, n] in [0, 1], and for each arm the tokens it raises most."""

    distances: Tensor
    raises: list[list[str]]


def effects(engine: Engine, prompts: Sequence[Row], arms: Sequence[Arm]) -> Effects:
    """What `arms` (the first one is the untouched subject) do to the next token, averaged over `prompts`."""
    divergence = torch.zeros(len(arms), len(arms), dtype=torch.float64)
    raised: Tensor | float = 0.0
    for row in prompts:
        logits = engine.next_logits([Row(row.tokens, row.n_prompt, arm) for arm in arms])
        logp = logits.log_softmax(-1)
        divergence += _divergences(logp)
        raised = raised + (logp.exp() - logp[0].exp()) / len(prompts)
    assert isinstance(raised, torch.Tensor)
    best = raised.topk(RAISED, dim=-1)
    raises = [
        [engine.subject.tokenizer.decode([token]) for gain, token in zip(*both, strict=True) if gain > 0]
        for both in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return Effects((divergence / len(prompts)).clamp_min(0).sqrt(), raises)


def _divergences(logp: Tensor) -> Tensor:
    """Jensen-Shannon divergences in bits, [n, n] float64, of log-probabilities [n, vocabulary]."""
    p = logp.exp()
    own = (p * logp).sum(-1)
    found = torch.zeros(len(logp), len(logp), dtype=torch.float64)
    for index in range(1, len(logp)):
        mixed = (p[:index] + p[index]) / 2
        cross = (mixed * mixed.clamp_min(torch.finfo(mixed.dtype).tiny).log()).sum(-1)
        found[index, :index] = (((own[:index] + own[index]) / 2 - cross) / log(2)).double()
    return found + found.T


def clusters(distances: Tensor, alike: float) -> list[list[int]]:
    """Indices by cluster, average linkage cut at `alike`; each ascending, in the order of their first members."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(distances) < 2:
        return [list(range(len(distances)))]
    tree = linkage(squareform(distances.numpy(), checks=False), "average")
    found: dict[int, list[int]] = {}
    for index, label in enumerate(fcluster(tree, alike, "distance")):
        found.setdefault(int(label), []).append(index)
    return list(found.values())


def deduplicated(
    engine: Engine,
    prompts: Sequence[Row],
    vectors: Sequence[Arm],
    random: Sequence[Arm],
    strength: Sequence[float],
    alike: float,
) -> dict[str, Any]:
    """Facts about what the `vectors`, the `random` ones and the untouched subject do, by cluster.

    A cluster names its members, and is told by the strongest (`strength` holds a number for each vector and random
    one): its distance from the untouched subject, and the tokens it raises. `n_behaviours` counts clusters that hold a
    vector and neither a random one nor the untouched subject.
    """
    found = effects(engine, prompts, [(), *vectors, *random])
    told = []
    for members in clusters(found.distances, alike):
        own = [index - 1 for index in members if 0 < index <= len(vectors)]
        chance = [index - 1 - len(vectors) for index in members if index > len(vectors)]
        chief = max(members, key=lambda index: strength[index - 1] if index else -1.0)
        told.append(
            {
                "vectors": own,
                "random": chance,
                "base": members[0] == 0,
                "from_base": round(found.distances[0, chief].item(), 4),
                "raises": found.raises[chief],
            }
        )
    counted = sum(bool(each["vectors"]) and not each["random"] and not each["base"] for each in told)
    return {"behaviours": told, "n_behaviours": counted, "alike": alike}


def generalisation(effect: Downstream, arms: Sequence[Arm], strength: Callable[[Tensor], Tensor]) -> Tensor:
    """[arms, prompts]: the sum over targets of `strength(change [tokens, width])`, without gradients."""
    found = torch.zeros(len(arms), len(effect.prompts))
    with torch.no_grad():
        for part in effect.changes(arms):
            for cell in part:
                found[cell.arm, cell.prompt] = sum(float(strength(change)) for change in cell.changes)
    return found
