"""What detectors read of a subject: rows, logits and states at responses, unembeddings of candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from experiments.detector import Candidates, DetectionError
from experiments.packing import Row

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.dataset import Conversation
    from experiments.edit import Site
    from experiments.engine import Engine
    from experiments.permutation import Floats
    from experiments.subject import Subject

LOGITS = 1 << 25
"""Logits held at once: 128 MB of float32."""
Positions = Literal["all", "first"]
"""Every position of a response, or its first one."""


def rows_of(subject: Subject, conversations: Sequence[Conversation], system: str | None = None) -> list[Row]:
    """The conversations as the subject reads them. Raises DetectionError for one whose response has no tokens."""
    rows = []
    for conversation in conversations:
        rendered = subject.render(conversation.messages, system=system)
        if len(rendered.tokens) == rendered.n_prompt:
            raise DetectionError(f"conversation {conversation.id!r}: the response has no tokens; leave it out")
        rows.append(Row(rendered.tokens, rendered.n_prompt))
    return rows


def predicting(row: Row, positions: Positions = "all") -> range:
    """Where the subject says what comes next: the position before each response token."""
    return range(row.n_prompt - 1, len(row.tokens) - 1)[: _count(positions)]


def having_read(row: Row, positions: Positions | int = "all") -> range:
    """Where the subject has read some of the response: the position of each of its tokens, or of the first few."""
    return range(row.n_prompt, len(row.tokens))[: _count(positions)]


def _count(positions: Positions | int) -> int | None:
    if isinstance(positions, int):
        return positions
    return None if positions == "all" else 1


def logits(engine: Engine, rows: Sequence[Row], spans: Sequence[range]) -> Iterator[tuple[int, Tensor]]:
    """(number of a row, its logits [k, vocabulary] float32 at its span), in order."""
    import torch

    most = max(1, LOGITS // int(engine.subject.model.config.vocab_size))
    for batch in _batches(rows, spans, engine.max_tokens, most):
        with torch.no_grad():
            states = engine.forward([rows[i] for i in batch], [spans[i] for i in batch])
            pieces = states.split([len(spans[i]) for i in batch])
            for index, piece in zip(batch, pieces, strict=True):
                yield index, engine.subject.head(piece)


def states(engine: Engine, rows: Sequence[Row], spans: Sequence[range], site: Site) -> Iterator[tuple[int, Tensor]]:
    """(number of a row, what it has at `site` at its span, [k, width] float32), in order."""
    import torch

    for batch in _batches(rows, spans, engine.max_tokens, engine.max_tokens):
        with torch.no_grad():
            found = engine.trace([rows[i] for i in batch], [spans[i] for i in batch], [site], above=False)[1][site]
            yield from zip(batch, found.float().split([len(spans[i]) for i in batch]), strict=True)


def _batches(rows: Sequence[Row], spans: Sequence[range], tokens: int, positions: int) -> Iterator[list[int]]:
    """Numbers of rows that a pass takes: at most so many tokens, and positions read, but at least one row."""
    batch: list[int] = []
    held = read = 0
    for index, (row, span) in enumerate(zip(rows, spans, strict=True)):
        if batch and (held + len(row.tokens) > tokens or read + len(span) > positions):
            yield batch
            batch, held, read = [], 0, 0
        batch.append(index)
        held, read = held + len(row.tokens), read + len(span)
    if batch:
        yield batch


def first_tokens(subject: Subject, candidates: Candidates) -> dict[str, list[int]]:
    """The tokens that a candidate's spellings begin with, without those that another one's begin with too.

    Raises DetectionError for candidates that no single token tells apart.
    """
    begin = {
        name: {int(subject.tokenizer(spelling, add_special_tokens=False)["input_ids"][0]) for spelling in spellings}
        for name, spellings in candidates.items()
    }
    shared = Counter(token for tokens in begin.values() for token in tokens)
    found = {name: sorted(token for token in tokens if shared[token] == 1) for name, tokens in begin.items()}
    for name, tokens in found.items():
        if not tokens:
            twins = [other for other in begin if other != name and begin[other] & begin[name]]
            raise DetectionError(
                f"candidate {name!r} begins with the same tokens as {', '.join(twins)}, so that no single token tells "
                "them apart; give more spellings, leave one out, or use persona_likelihood"
            )
    return found


def centred_unembedding(subject: Subject, candidates: Candidates) -> Tensor:
    """[d, candidates] float64 on the CPU: mean unembedding of a candidate's tokens, less the mean of the vocabulary.

    That mean moves all logits alike, which no probability feels; left in, it is the largest part of many a
    direction's read-out.
    """
    import torch

    weight = subject.model.get_output_embeddings().weight
    middle = weight.mean(dim=0, dtype=torch.float32)
    tokens = first_tokens(subject, candidates).values()
    return torch.stack([weight[each].float().mean(dim=0) - middle for each in tokens], 1).double().cpu()


def readout(subject: Subject, candidates: Candidates, site: Site) -> Floats:
    """[width, candidates] what a change at `site` does to each centred logit, per unit of the final norm.

    The unembedding with the final norm's gain, and for a layer norm without the part that it takes away. Raises
    DetectionError for a site that is not as wide as the residual stream.
    """
    import torch

    width = subject.point(site).width
    if width != subject.d_model:
        raise DetectionError(
            f"{site} is {width} wide, the residual stream {subject.d_model}: its directions name no tokens; use resid, "
            "attn_out or mlp_out"
        )
    found = norm_gain(subject)[:, None] * centred_unembedding(subject, candidates).numpy()
    if isinstance(final_norm(subject), torch.nn.LayerNorm):
        found -= found.mean(axis=0)
    return np.asarray(found)


def norm_gain(subject: Subject) -> Floats:
    """[d] what the final norm multiplies each channel by once it has divided by the size."""
    import torch

    norm = final_norm(subject)
    like = next(norm.parameters())
    signs = torch.ones(subject.d_model, device=like.device, dtype=like.dtype)
    signs[1::2] = -1  # mean 0 and mean square 1: both kinds of norm leave it as it is, but for gain and bias
    with torch.no_grad():
        found = (norm(signs[None]) - norm(-signs[None]))[0] / 2 * signs
    return np.asarray(found.double().cpu().numpy())


def final_norm(subject: Subject) -> nn.Module:
    """The norm behind the last decoder layer. Raises DetectionError for a layout that hides it."""
    names = {module: name for name, module in subject.model.named_modules()}
    for child in subject.body.children():
        weighty = next(child.parameters(), None) is not None and subject.blocks[0] not in child.children()
        if weighty and subject.layer(names[child]) == subject.n_layers:
            return child
    raise DetectionError(
        f"{type(subject.model).__name__}: no norm behind the last decoder layer; its layout is not known"
    )
