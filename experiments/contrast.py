"""What contrast pairs show of a subject: activations, log-probabilities and gradients, each computed once.

Every layer of a site is read in the pass that reads one, together with the log-probabilities of the responses, and kept
while the engine lives: methods and layers that share pairs share the pass. A pass for gradients reads all that as well,
unless it is known already: where gradients are asked for first, a text passes the subject once in all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from experiments.dataset import Message
from experiments.edit import Pool, Site

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Pair, Side
    from experiments.engine import Engine, Observed, Row
    from experiments.gradients import Separation
    from experiments.subject import Subject

KEPT = 4  # contrasts kept for each engine: methods of one experiment share data, so few are in use at a time

Sides = tuple["Tensor", "Tensor"]
"""Positive and negative."""


class FitError(ValueError):
    """Data a method cannot learn from: what is wrong, and what to change."""


class Contrast:
    """Pairs, rendered for one subject and read at `pool`. Make one with `contrast`.

    Raises FitError without pairs, and for pairs whose sides are the same tokens.
    """

    def __init__(self, engine: Engine, pairs: Sequence[Pair], pool: Pool) -> None:
        if not pairs:
            raise FitError("no pairs; at least one is needed")
        self._engine = ref(engine)  # what is kept for an engine must not keep the engine
        self.pool = pool
        self.rows = [
            row(engine.subject, pair.messages, side) for pair in pairs for side in (pair.positive, pair.negative)
        ]
        for pair, positive, negative in zip(pairs, self.rows[0::2], self.rows[1::2], strict=True):
            if positive.tokens == negative.tokens:
                raise FitError(f"pair {pair.id!r}: both sides are the same tokens to this subject; change or remove it")
        self._activations: dict[Site, Sides] = {}
        self._logprobs: Sides | None = None
        self._gradients: dict[tuple[str, Separation], dict[Site, Sides]] = {}

    @property
    def n(self) -> int:
        """How many pairs."""
        return len(self.rows) // 2

    @property
    def engine(self) -> Engine:
        """The engine that reads them, which somebody else must hold."""
        engine = self._engine()
        if engine is None:
            raise FitError("the engine that read these pairs is gone; keep it as long as what it read")
        return engine

    def at(self, site: Site, loss: Separation | None = None) -> Evidence:
        """What the pairs show at `site`; where gradients of `loss` will be asked for, they are read in the same pass.

        Raises SubjectError for a site that the subject lacks, and what `gradients` raises.
        """
        self.engine.subject.point(site)
        if loss is not None:
            self.gradients(site, loss)
        self._read([site])
        positive, negative = self._activations[site]
        return Evidence(site, positive, negative, self)

    def logprobs(self) -> Tensor:
        """[n] float32: mean log-probability of a response's token under its own persona, averaged over both sides."""
        if self._logprobs is None:
            self._read([Site("resid", 0)], again=True)
        assert self._logprobs is not None
        return (self._logprobs[0] + self._logprobs[1]) / 2

    def gradients(self, site: Site, loss: Separation) -> Sides:
        """[n, d] each: gradient of `loss` with respect to a vector added where the sides are read, at `site`."""
        from experiments.gradients import pair_gradients

        known = self._gradients.setdefault((site.name, loss), {})
        if site not in known:
            fresh = Site(site.name, 0) not in self._activations
            found, seen = pair_gradients(self.engine, self.rows, site.name, self.pool, loss, observe=fresh)
            known.update(found)
            if seen is not None:
                self._keep(seen)
        if site not in known:
            target = loss.target(self.engine.subject)
            raise FitError(f"{site} has no gradient: the loss is read at resid@{target}; choose a layer below that")
        return known[site]

    def _read(self, sites: Sequence[Site], again: bool = False) -> None:
        names = sorted({site.name for site in sites if again or site not in self._activations})
        wanted = [Site(name, layer) for name in names for layer in range(self.engine.subject.n_layers)]
        if wanted:
            self._keep(self.engine.observe(self.rows, wanted, self.pool))

    def _keep(self, seen: Observed) -> None:
        import torch

        found, logprobs = seen
        for site, read in found.items():
            self._activations[site] = read[0::2], read[1::2]
        means = torch.stack([each.mean() for each in logprobs])
        self._logprobs = means[0::2], means[1::2]


@dataclass(frozen=True)
class Evidence:
    """What n pairs show at one site of width d: `positive` and `negative` are [n, d] float32 on the CPU."""

    site: Site
    positive: Tensor
    negative: Tensor
    contrast: Contrast | None = field(default=None, repr=False)

    @property
    def differences(self) -> Tensor:
        """[n, d] float64: positive minus negative."""
        return self.positive.double() - self.negative.double()

    def logprobs(self) -> Tensor:
        """[n]: see `Contrast.logprobs`."""
        return self._whole().logprobs()

    def gradients(self, loss: Separation) -> Sides:
        """[n, d] each: see `Contrast.gradients`."""
        return self._whole().gradients(self.site, loss)

    @property
    def subject(self) -> Subject:
        """The subject that was read."""
        return self._whole().engine.subject

    def _whole(self) -> Contrast:
        if self.contrast is None:
            raise FitError("these activations come without pairs and subject; read them with `contrast`")
        return self.contrast


def contrast(engine: Engine, pairs: Sequence[Pair], pool: Pool) -> Contrast:
    """The contrast of `pairs`, the one already made for them if there is one. Raises FitError."""
    kept = _KEPT.setdefault(engine, OrderedDict())
    key = (pool, digest(pairs))
    if key not in kept:
        kept[key] = Contrast(engine, pairs, pool)
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[key]


def row(subject: Subject, messages: Iterable[Message], side: Side) -> Row:
    """One side of a pair as tokens: its system prompt (else the subject's own context), prompt and response."""
    from experiments.engine import Row

    rendered = subject.render([*messages, Message(role="assistant", content=side.response)], system=side.system)
    return Row(rendered.tokens, rendered.n_prompt)


def digest(pairs: Iterable[Pair]) -> str:
    """sha256 over the pairs' content."""
    content = hashlib.sha256()
    for pair in pairs:
        content.update(pair.model_dump_json().encode())
        content.update(b"\n")
    return content.hexdigest()


_KEPT: WeakKeyDictionary[Engine, OrderedDict[tuple[Pool, str], Contrast]] = WeakKeyDictionary()
