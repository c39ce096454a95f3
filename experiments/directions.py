"""Steering vectors: what mean_diff, pca, pca_centred and random share.

A pair gives one difference: its positive conversation's activation minus its negative one's, each side rendered with
its own system prompt and its own response, pooled over the response. A method turns the differences [n, d] into one
direction; here it is oriented (positives project higher) and scaled to the norm of the mean difference at the same
site, so that dose 1 is "one mean difference" for every method, and a random direction is norm-matched.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from pydantic import Field

from experiments.dataset import Message
from experiments.edit import Add, Edit, Site, SiteName
from experiments.intervention import Intervention, Positions, State, method_name

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Pair, Side
    from experiments.engine import Engine, Row
    from experiments.subject import Subject

Tokens = Literal["response_mean", "last", "prompt_last"]
KEPT = 4  # difference sets kept for each engine: methods of one experiment share data, so few are in use at a time


class FitError(ValueError):
    """Data a method cannot learn from: what is wrong, and what to change."""


class Direction(Intervention):
    """Settings of every steering vector. A subclass says how differences become a direction."""

    oriented: ClassVar[bool] = True
    """Whether the direction is turned towards the positive side: its sign is not part of what `direction` finds."""

    layer: int | None = Field(default=None, ge=0)
    """Decoder layer, from 0; null is the middle one, `n_layers // 2`."""
    site: SiteName = "resid"
    """Activation of that layer to read from and to add to; `resid` is the layer's output."""
    tokens: Tokens = "response_mean"
    """Where a conversation is read: the mean over the response, its `last` token, or the prompt's last token."""
    positions: Positions = "all"
    """Where the vector is added: `all`, `prompt`, `response` or `last:N` (the last N prompt tokens)."""

    def direction(self, differences: Tensor, seed: int) -> Tensor:
        """[n, d] differences -> [d] direction of any length and sign."""
        raise TypeError(f"{type(self).__name__} does not implement direction()")

    def fit(self, engine: Engine, data: Sequence[Pair], seed: int) -> State:
        """One vector [d] of the mean difference's norm.

        Raises SubjectError for a layer or site the subject lacks, FitError for pairs without a difference.
        """
        site = self.at(engine.subject)
        engine.subject.point(site)
        found = differences(engine, data, [site], self.tokens)[site]
        vector, facts = orient_and_scale(self.direction(found, seed), found, site, self.oriented)
        return State({"vector": vector}, {"site": str(site), "n": len(data), **facts})

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        return [Add(Site.parse(state.facts["site"]), dose * state.tensors["vector"], self.positions)]

    def at(self, subject: Subject) -> Site:
        """The site, with the middle layer filled in."""
        return Site(self.site, subject.n_layers // 2 if self.layer is None else self.layer)

    def label(self) -> str:
        where = "Lmid" if self.layer is None else f"L{self.layer}"
        return f"{method_name(type(self))} {where}" + ("" if self.site == "resid" else f" {self.site}")


def orient_and_scale(
    direction: Tensor, differences: Tensor, site: Site, orient: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """The direction [d] with the norm of the mean of `differences` [n, d].

    Where `orient`, it is turned so that positives project higher on average.

    Facts: `norm`; `flipped`, whether it was turned; `agreement`, the share of pairs whose difference projects above
    zero; `cosine`, with the mean difference. Raises FitError where there is no mean difference, or no direction.
    """
    differences = differences.double()
    mean = differences.mean(0)
    norm, length = mean.norm(), direction.double().norm()
    if not norm.isfinite() or not length.isfinite():
        raise FitError(f"activations at {site} are not finite; use a wider dtype (dtype: float32), or another layer")
    if norm == 0 or length == 0:
        raise FitError(f"the {len(differences)} pairs do not differ at {site}: nothing to steer along; use other pairs")
    unit = direction.double() / length
    flipped = orient and bool(mean @ unit < 0)
    if flipped:
        unit = -unit
    facts = {
        "norm": norm.item(),
        "flipped": flipped,
        "agreement": (differences @ unit > 0).double().mean().item(),
        "cosine": (mean @ unit / norm).item(),
    }
    return (norm * unit).float(), facts


def principal(differences: Tensor) -> Tensor:
    """First right singular vector [d] of [n, d]: the direction most of the sum of squares lies along."""
    import torch

    return torch.linalg.svd(differences.double(), full_matrices=False).Vh[0]


def differences(engine: Engine, pairs: Sequence[Pair], sites: Iterable[Site], tokens: Tokens) -> dict[Site, Tensor]:
    """Positive minus negative activation of every pair at `sites`: [n, d] float32 each, on the CPU.

    All layers of a site are read in the pass that reads one, and kept while the engine lives: fits that share pairs
    share the pass. Raises FitError without pairs.
    """
    if not pairs:
        raise FitError("no pairs; at least one is needed")
    kept = _KEPT.setdefault(engine, OrderedDict())
    key = (tokens, digest(pairs))
    found = kept.setdefault(key, {})
    kept.move_to_end(key)
    sites = list(sites)
    names = {site.name for site in sites if site not in found}
    wanted = [Site(name, layer) for name in sorted(names) for layer in range(engine.subject.n_layers)]
    if wanted:
        rows = [row(engine.subject, pair.messages, side) for pair in pairs for side in (pair.positive, pair.negative)]
        for site, read in engine.activations(rows, wanted, tokens).items():
            found[site] = (read[0::2] - read[1::2]).float().cpu()
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return {site: found[site] for site in sites}


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


_KEPT: WeakKeyDictionary[Engine, OrderedDict[tuple[str, str], dict[Site, Tensor]]] = WeakKeyDictionary()
