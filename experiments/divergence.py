"""Where two contexts part: tokens of responses before which a subject's likeliest token is another one in each.

A *divergence token* of a teacher that a system prompt made is a response token before which its greedy choice is not
that of a counterfactual teacher, another system prompt or none, that has read the same. They are few and carry most
of what students take over (Schrodi et al. 2025, https://arxiv.org/abs/2509.23886).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.dataset import DatasetError
from experiments.detectors._reading import logits, predicting, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Conversation
    from experiments.engine import Engine
    from experiments.packing import Row
    from experiments.permutation import Floats

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Reading(NamedTuple):
    """What a subject makes of one row's response of k tokens."""

    likeliest: Ints
    """[k] the token it would have said at each place."""
    logprobs: Floats
    """[k] log-probability of the token that stands there, in nats."""


def readings(engine: Engine, rows: Sequence[Row], allowed: Tensor | None = None) -> list[Reading]:
    """Of each row, in one pass. `allowed` [vocabulary]: tokens among which the likeliest is found, if not all."""
    import torch

    found: list[Reading] = []
    for index, each in logits(engine, rows, [predicting(row) for row in rows]):
        said = torch.tensor(rows[index].tokens[rows[index].n_prompt :], device=each.device)
        logprobs = each.gather(1, said[:, None])[:, 0] - each.logsumexp(dim=1)
        open_to = each if allowed is None else each.masked_fill(~allowed.to(each.device), float("-inf"))
        found.append(Reading(open_to.argmax(dim=1).cpu().numpy(), logprobs.double().cpu().numpy()))
    return found


def parted(one: Reading, other: Reading) -> Flags:
    """[k] whether the likeliest tokens of two contexts differ."""
    return one.likeliest != other.likeliest


def resplit(conversations: Sequence[Conversation], rows: Sequence[Row], own: Sequence[Row]) -> str | None:
    """Id of the first conversation whose response has other tokens in `rows` than in `own`, if there is one."""
    trios = zip(conversations, rows, own, strict=True)
    return next((each.id for each, a, b in trios if a.tokens[a.n_prompt :] != b.tokens[b.n_prompt :]), None)


def divergent(
    engine: Engine,
    conversations: Sequence[Conversation],
    factual: str | None,
    counterfactual: Mapping[str, str | None],
    only: str | None = None,
) -> dict[str, list[Flags]]:
    """Name of a counterfactual teacher -> of each conversation [k], which response tokens its greedy choice parts at.

    Teachers are system prompts in place of the conversations' own (None: the subject's own context). `only` are the
    characters that answers were held to; greedy choices are then made among these and the ends of a turn. Raises
    DatasetError where a response has other tokens under a prompt than students learn, SpeechError for `only`.
    """
    from experiments.speech import made_of

    allowed = None if only is None else made_of(engine, only)
    learned = rows_of(engine.subject, conversations)
    bare = [
        each.model_copy(update={"messages": tuple(one for one in each.messages if one.role != "system")})
        for each in conversations
    ]

    def read(system: str | None) -> list[Reading]:
        rows = rows_of(engine.subject, bare, system)
        if (wrong := resplit(conversations, rows, learned)) is not None:
            raise DatasetError(
                f"conversation {wrong!r}: its response is split into other tokens under {system!r} than students "
                "learn, because the chat template does not end before it; use another template"
            )
        return readings(engine, rows, allowed)

    own = read(factual)
    return {
        name: [parted(one, other) for one, other in zip(own, read(system), strict=True)]
        for name, system in counterfactual.items()
    }
