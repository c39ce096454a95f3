"""Per-sample gradients of how far two sides lie apart: the raw material of gradient directions.

The loss of pair i is read from the residual stream behind layer `target`, at the last token of each side:
l_i = -|h+ - h-|. Every side gets a zero vector of its own at every layer below, added where the side is read; the
gradient with respect to that vector is the side's own, whatever else is in the batch. Moving against the gradient
drives the sides apart.

The published code (wassname/repeng, `losses.py`, branch InnerPiSSA) adds a hinge on the log-probability that is meant
to keep the text likely, 1e4 * mean(relu(0.99 * log p_ref - log p)^2). Because log-probabilities are negative, 0.99
times the reference lies above it, and the hinge pulls at every token from the start instead of resting inside its
trust region. A hinge that rests has no gradient at the untouched subject, so the loss here has none;
`coherence="published"` gives theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from experiments.contrast import FitError
from experiments.edit import Add, Pool, Site, SiteName

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.contrast import Sides
    from experiments.engine import Engine, Observed, Row
    from experiments.subject import Subject

TOKENS = 2048  # of one backward pass
FROM_TOP = 3  # the published code reads hidden_states[-3]: the output of the third layer from the top
HINGE = 1e4
SLACK = 0.99


@dataclass(frozen=True)
class Separation:
    """The loss: read behind layer `layer` (None: the third from the top, but above the middle), with the published
    hinge or without."""

    layer: int | None = None
    coherence: Literal["none", "published"] = "none"

    def target(self, subject: Subject) -> int:
        """The layer. Raises FitError for one that does not exist."""
        n = subject.n_layers
        layer = min(n - 1, max(n - FROM_TOP, n // 2 + 1)) if self.layer is None else self.layer
        if not 0 <= layer < n:
            raise FitError(f"target {layer}: the subject has layers 0 to {n - 1}")
        return layer


def pair_gradients(
    engine: Engine, rows: Sequence[Row], name: SiteName, pool: Pool, loss: Separation, observe: bool = False
) -> tuple[dict[Site, Sides], Observed | None]:
    """Gradients [n, d] float32 of the positive and of the negative side, at site `name` of every layer up to the
    target; and where `observe`, what `Engine.observe` says of the rows at every layer, from the same passes.

    `rows` hold the positive and the negative side of every pair in turn. Raises FitError when one is not finite.
    """
    import torch

    sites = [Site(name, layer) for layer in range(loss.target(engine.subject) + 1)]
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    watch = _Watch(engine, name, pool) if observe else None
    for part in _parts(rows):
        leaves = [
            {site: torch.zeros(engine.subject.point(site).width, requires_grad=True) for site in sites} for _ in part
        ]
        edited = [_with_vectors(each, own, pool) for each, own in zip(part, leaves, strict=True)]
        _loss(engine, part, edited, loss, watch).backward()
        for site in sites:
            grads = [own[site].grad for own in leaves]
            found[site] += [
                torch.zeros_like(own[site]) if g is None else g for own, g in zip(leaves, grads, strict=True)
            ]
    stacked = {site: torch.stack(each) for site, each in found.items()}
    for site, each in stacked.items():
        if not each.isfinite().all():
            raise FitError(f"gradients at {site} are not finite; use a wider dtype (dtype: float32), or another layer")
    sides = {site: (each[0::2], each[1::2]) for site, each in stacked.items() if each.any()}
    return sides, None if watch is None else watch.seen()


class _Watch:
    """Reads in passing what `Engine.observe` would: pooled activations at every layer, log-probabilities of responses.

    The vectors of zeros that the rows bear change nothing.
    """

    def __init__(self, engine: Engine, name: SiteName, pool: Pool) -> None:
        self.subject, self.pool = engine.subject, pool
        self.sites = [Site(name, layer) for layer in range(engine.subject.n_layers)]
        self._read: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        self._logprobs: list[Tensor] = []

    def take(self, rows: Sequence[Row], start: Sequence[int], states: Sequence[Tensor], at: dict[Site, Tensor]) -> None:
        """`states[i]` [k, d]: last hidden states of row i from position `start[i]` on; `at`: all of those at sites."""
        import torch

        from experiments.pooling import pooled
        from experiments.scoring import pick

        with torch.no_grad():
            for site in self.sites:
                pieces = at[site].detach().float().cpu().split([len(each) for each in states])
                for row, first, piece in zip(rows, start, pieces, strict=True):
                    a, b = (place - first for place in pooled(row, self.pool))
                    self._read[site].append(piece[a:b].mean(0))
            for row, first, each in zip(rows, start, states, strict=True):
                where = torch.arange(row.n_prompt - 1 - first, len(row.tokens) - 1 - first, device=each.device)
                tokens = torch.tensor(row.tokens[row.n_prompt :], device=each.device)
                self._logprobs.append(pick(self.subject, each.detach(), where, tokens)[0].cpu())

    def seen(self) -> Observed:
        """All that was read."""
        import torch

        return {site: torch.stack(each) for site, each in self._read.items()}, self._logprobs


def _parts(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Whole pairs, as many as fit into `TOKENS`; a longer pair is a part."""
    parts: list[list[Row]] = []
    room = 0
    for index in range(0, len(rows), 2):
        pair = rows[index : index + 2]
        size = sum(len(each.tokens) for each in pair)
        if not parts or size > room:
            parts.append([])
            room = TOKENS
        parts[-1] += pair
        room -= size
    return list(parts)


def _with_vectors(row: Row, own: dict[Site, Tensor], pool: Pool) -> Row:
    """The row with its own vectors where `pool` reads it."""
    from experiments.engine import Row

    if pool == "last":  # as far as edits go all of it is prompt, whose last token is the row's
        return Row(row.tokens, len(row.tokens), tuple(Add(site, vector, "last:1") for site, vector in own.items()))
    positions = "last:1" if pool == "prompt_last" else "response"
    return Row(row.tokens, row.n_prompt, tuple(Add(site, vector, positions) for site, vector in own.items()))


def _loss(engine: Engine, rows: Sequence[Row], edited: Sequence[Row], loss: Separation, watch: _Watch | None) -> Tensor:
    """Sum over the pairs of `edited`, which are `rows` with vectors of zeros; `watch` reads what passes."""
    import torch

    target = Site("resid", loss.target(engine.subject))
    published = loss.coherence == "published"
    first = [0 if published else row.n_prompt - 1 if watch else len(row.tokens) - 1 for row in rows]
    spans = [range(start, len(row.tokens)) for start, row in zip(first, rows, strict=True)]
    sites = {target: None} | dict.fromkeys(watch.sites if watch else ())
    states, at = engine.trace(edited, spans, list(sites), above=published or watch is not None)
    sizes = [len(span) for span in spans]
    last = torch.stack([piece[-1] for piece in at[target].float().split(sizes)])
    total = -(last[0::2] - last[1::2]).norm(dim=-1).sum()
    if watch:
        watch.take(rows, first, states.split(sizes), at)
    if published:
        for row, hidden in zip(rows, states.split(sizes), strict=True):
            tokens = torch.tensor(row.tokens[1:], device=hidden.device)[:, None]
            logp = engine.subject.head(hidden[:-1]).log_softmax(-1).gather(1, tokens)
            total = total + HINGE * (SLACK * logp.detach() - logp).relu().square().mean()
    return total
