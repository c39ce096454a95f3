"""Contrastive training: an edit that drives the two sides of a pair apart at dose +1 and together at dose -1.

For a pair and a layer that is read, D(c) is the difference of both sides' residual streams at dose c, each the mean
over the last tokens of its response and rendered under its own persona; u is a unit direction, found once in the
untouched subject and frozen, so that the subject cannot be led to separate the sides by just anything. With
    g(c) = sign(c) * (D(c) - D(0)) . u / m,   m = mean over pairs of D(0) . u
the gain at dose 1 is how many mean differences were put between the sides, and at dose -1, where the sides are swapped,
how many were taken away. The loss is the mean over both doses, pairs and layers of one of
    raw          -g
    logsigmoid   -log sigmoid(sharpness * (g - margin))
    tanh         -margin * tanh(g / margin)
plus, at each dose, a hinge that keeps the text likely: coherence * mean over tokens of max(0, log p_0 - log p - trust).
It rests while a token has lost less than `trust` nats and has no gradient there.

After InnerPiSSA (wassname 2025: `ipissa`, research journal of 2025-11), with what is wrong there put right: gains are
in units of the base's separation, not of raw activations, whose size differs by model and layer (`raw_units` gives
theirs, sharpness 0.1 and margin 0.5); the hinge is on the loss of log-probability in nats, where an earlier version
compared with 0.99 times a negative number and so pulled at every token from the start.

What tells whether a run cheats is logged for each dose: `projection` (D(c) . u over D(0) . u: should rise at +1 and
fall at -1), `coherence` (-log p over -log p_0: should stay near 1), `outside` (share of tokens outside the trust
region) and `loss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, logsigmoid

from experiments.contrast import Evidence, FitError, contrast
from experiments.directions import orient_and_scale
from experiments.edit import Add, Edit, Site
from experiments.engine import Row
from experiments.interventions.sspace import weight
from experiments.training import EditsOf, Objective, Partial, TrainingError, length, parts

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.dataset import Pair
    from experiments.engine import Engine
    from experiments.taught import Form, Kind

COMPONENTS = 100  # principal directions to choose from when nothing is said; the journal's number
LAST = ("resid", "mlp_out", "down")  # a constant added here moves both sides alike as far as the layer's own output


@dataclass(frozen=True)
class Shape:
    """How a gain becomes a loss, and what holds it back; see the module."""

    form: Form = "logsigmoid"
    margin: float = 1.0
    sharpness: float = 1.0
    raw_units: bool = False
    last: int = 3
    coherence: float = 4.0
    trust: float = 1.5

    def separation(self, gain: Tensor) -> Tensor:
        """Loss of gains, element by element."""
        if self.form == "raw":
            return -gain
        if self.form == "tanh":
            return -self.margin * torch.tanh(gain / self.margin)
        return -logsigmoid(self.sharpness * (gain - self.margin))

    def hinge(self, base: Tensor, logprobs: Tensor) -> Tensor:
        """What each token lost beyond the trust region, nats."""
        return (base - logprobs - self.trust).relu()


@dataclass(frozen=True, eq=False)
class Axis:
    """The frozen direction of a layer: `unit` [d] float32, and the base's mean difference along it."""

    site: Site
    unit: Tensor
    scale: float
    facts: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Opposed:
    """A pair: both sides, and what the untouched subject makes of them: the difference along each axis [axes], and the
    log-probabilities of each side's response."""

    rows: tuple[Row, Row]
    along: Tensor
    logprobs: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Contrastive(Objective):
    """Separation of pairs along frozen axes, at doses +1 and -1."""

    pairs: tuple[Opposed, ...]
    axes: tuple[Axis, ...]
    shape: Shape

    @property
    def examples(self) -> Sequence[Opposed]:
        return self.pairs

    def partials(self, engine: Engine, batch: Sequence[Opposed], edits_of: EditsOf) -> Iterator[Partial]:
        tokens = sum(len(side) for pair in batch for side in pair.logprobs)
        nll = -sum(float(side.sum()) for pair in batch for side in pair.logprobs)
        for sign in (1, -1):
            for part in parts(batch, size=lambda pair: sum(map(length, pair.rows))):
                edits = tuple(edits_of(float(sign)))
                self._check(edits)
                loss, logs = self._share(engine, part, edits, sign)
                shares = {
                    "loss": loss.item() / len(batch),
                    "projection": logs["projection"] / len(batch),
                    "coherence": logs["nll"] / nll,
                    "outside": logs["outside"] / tokens,
                }
                yield Partial(loss / (2 * len(batch)), {f"{name}{sign:+d}": value for name, value in shares.items()})

    def _share(
        self, engine: Engine, part: Sequence[Opposed], edits: tuple[Edit, ...], sign: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and logs of some pairs at one dose, summed over them."""
        rows = [Row(side.tokens, side.n_prompt, edits) for pair in part for side in pair.rows]
        ends, logprobs = read(engine, rows, [axis.site for axis in self.axes], self.shape.last)
        along = torch.stack([differences(ends[axis.site]) @ axis.unit for axis in self.axes], 1)
        moved = along - torch.stack([pair.along for pair in part])
        relative = moved / torch.tensor([axis.scale for axis in self.axes], device=moved.device)
        loss = self.shape.separation(sign * (moved if self.shape.raw_units else relative)).mean(1).sum()
        base = [side for pair in part for side in pair.logprobs]
        hinges = [self.shape.hinge(old, new) for old, new in zip(base, logprobs, strict=True)]
        if self.shape.coherence:
            loss = loss + self.shape.coherence * torch.stack([each.mean() for each in hinges]).sum() / 2
        logs = {
            "projection": (1 + relative).mean(1).sum().item(),
            "nll": -sum(each.sum().item() for each in logprobs),
            "outside": sum((each > 0).sum().item() for each in hinges),
        }
        return loss, logs

    def _check(self, edits: Sequence[Edit]) -> None:
        """Raise TrainingError where vectors move both sides alike: only rounding would be left to learn from."""
        for axis in self.axes:
            at = [edit.site for edit in edits if isinstance(edit, Add)]
            felt = [site.layer + (site.name in LAST) <= axis.site.layer for site in at]
            if edits and len(at) == len(edits) and not any(felt):
                lowest = min(at, key=lambda site: site.layer)
                raise TrainingError(
                    f"read at layer {axis.site.layer}: a vector at {lowest} moves both sides alike there; set read "
                    f"above layer {lowest.layer}, or train a lower layer"
                )

    def facts(self) -> dict[str, Any]:
        return {"axes": {str(axis.site): axis.facts for axis in self.axes}}


def contrastive(
    engine: Engine, pairs: Sequence[Pair], layers: Sequence[int], kind: Kind, rank: int | None, shape: Shape
) -> Contrastive:
    """Read the untouched subject at the outputs of `layers` and freeze an axis of each.

    Raises FitError for pairs without a difference, and as `direction` does.
    """
    shows = contrast(engine, pairs, "last")
    sites = [Site("resid", layer) for layer in layers]
    both = list(zip(shows.rows[0::2], shows.rows[1::2], strict=True))
    ends: dict[Site, list[Tensor]] = {site: [torch.empty(0)] * len(both) for site in sites}
    logprobs: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(both)
    with torch.no_grad():
        for part in parts(range(len(both)), size=lambda index: sum(map(length, both[index]))):
            found, said = read(engine, [side for index in part for side in both[index]], sites, shape.last)
            for place, index in enumerate(part):
                logprobs[index] = said[2 * place], said[2 * place + 1]
                for site in sites:
                    ends[site][index] = found[site][2 * place : 2 * place + 2]
    stacked = {site: torch.stack(each) for site, each in ends.items()}  # [pairs, 2, d]
    axes = tuple(
        axis(Evidence(site, each[:, 0].cpu(), each[:, 1].cpu(), shows), kind, rank, engine.subject.device)
        for site, each in stacked.items()
    )
    along = torch.stack([(stacked[each.site][:, 0] - stacked[each.site][:, 1]) @ each.unit for each in axes], 1)
    return Contrastive(tuple(Opposed(*each) for each in zip(both, along, logprobs, strict=True)), axes, shape)


def axis(evidence: Evidence, kind: Kind, rank: int | None, device: torch.device) -> Axis:
    """The frozen axis of a site, turned so that the pairs' mean difference points along it."""
    found, told = direction(evidence, kind, rank)
    vector, facts = orient_and_scale(found, evidence.differences, evidence.site)
    unit = vector.double() / vector.double().norm()
    scale = (evidence.differences.mean(0) @ unit).item()
    if scale <= 0:
        raise FitError(f"the pairs do not differ along the {kind} direction at {evidence.site}; choose another")
    return Axis(evidence.site, unit.float().to(device), scale, facts | told | {"separation": scale})


def direction(evidence: Evidence, kind: Kind, rank: int | None) -> tuple[Tensor, dict[str, Any]]:
    """Direction [d] of any length and sign, and what to tell of it.

    `mean`: the mean difference. `pca`: of the first `rank` right singular vectors of the differences (not centred), the
    one most in line with the mean. `singular`: the mean difference within the first `rank` left singular vectors of
    the weight that writes to the site. Raises FitError for a rank there is not.
    """
    differences = evidence.differences
    mean = differences.mean(0)
    if kind == "mean":
        return mean, {}
    if kind == "pca":
        basis = torch.linalg.svd(differences, full_matrices=False).Vh
        rank = min(COMPONENTS, len(basis)) if rank is None else rank
    else:
        basis = torch.linalg.svd(weight(evidence), full_matrices=False).U.T
        rank = max(1, len(basis) // 4) if rank is None else rank
    if rank > len(basis):
        raise FitError(f"direction_rank {rank} at {evidence.site}: there are {len(basis)} directions; set at most that")
    inside = basis[:rank] @ mean
    if kind == "singular":
        return basis[:rank].T @ inside, {}
    chosen = int(inside.abs().argmax())
    return basis[chosen], {"component": chosen}


def read(
    engine: Engine, rows: Sequence[Row], sites: Sequence[Site], last: int
) -> tuple[dict[Site, Tensor], list[Tensor]]:
    """By site [n, d] float32, the mean over the last `last` tokens of each response (all it has, if fewer); and the
    log-probabilities of each response's tokens. Differentiable, from one pass."""
    spans = [range(each.n_prompt - 1, len(each.tokens)) for each in rows]
    states, at = engine.trace(rows, spans, sites)
    sizes = [len(span) for span in spans]
    ends = {
        site: torch.stack([piece[1:][-last:].float().mean(0) for piece in values.split(sizes)])
        for site, values in at.items()
    }
    logits = engine.subject.head(torch.cat([piece[:-1] for piece in states.split(sizes)]))
    answers = torch.tensor([token for each in rows for token in each.tokens[each.n_prompt :]], device=logits.device)
    logprobs = -cross_entropy(logits, answers, reduction="none")
    return ends, list(logprobs.split([size - 1 for size in sizes]))


def differences(ends: Tensor) -> Tensor:
    """Positive minus negative [n, d] of sides that take turns [2n, d]."""
    return ends[0::2] - ends[1::2]
