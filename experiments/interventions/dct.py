"""Deep causal transcoding: input directions v and output directions u that explain how a change spreads downstream.

Mack 2024, "Deep causal transcoding" (alignment forum; code melbo-dct-post, src/dct.py), the successor of MELBO. With
D(theta) the mean change of a target layer under theta (experiments/downstream.py), J and H its first and second
derivatives at zero, the factors of a fit are n unit vectors v and u:

    linear       the leading singular vectors of J
    quadratic    u <- H(v, v), v <- H(u, v, .)                 power iteration on the second-order term
    exponential  u <- D(R v), v <- J(R v)'u                    D(R v) ~ sum_l alpha_l u_l (exp(<v_l, v>) - 1)

each brought back to norm 1, all v made orthonormal before every iteration. Quadratic and exponential factors start from
J seen through random output directions (`projection`). They are ranked by the squared weight alpha_l that fits D(R v)
best, alpha = K^-1 (<u_l, D(R v_l)>) with K = (U'U) o h(V'V) and h the kind's own function (expm1; the square), linear
ones by singular value; or all by how far they move the target along a direction (`towards`). What a trial adds is R v.

Where this departs from the published code: u is what the orthonormal v of the *same* iteration does. The code updates
both from the iteration before, so that u belongs to a v that orthogonalisation has meanwhile turned; where R is large
enough for curvature, sum |D(R v)| then swings instead of rising (`published` brings that back). Signs survive the
orthogonalisation (theirs is a plain QR, which may turn v without its u, and exp is not odd). More vectors than
projections start from random directions drawn from the seed, instead of from whatever the singular value decomposition
completes its basis with.

A fit costs `iterations` times two forward passes and a backward pass from source to target over `n` x `prompts` rows
(the quadratic kind some three times that, with attention that is not fused); the exact linear kind as many rows as the
target is wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from experiments.contrast import FitError
from experiments.directions import own_seed
from experiments.edit import Site
from experiments.unsupervised import CONTROLS, Found, Slice, Unsupervised, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.downstream import Arms, Downstream
    from experiments.engine import Engine
    from experiments.subject import Subject

PROJECTIONS = 3_000_000  # seeds of random output directions start here
FILLERS = 4_000_000  # and those of random starts here


@dataclass
class Factors:
    """`u` [n, D] and `v` [n, d], unit rows; `scores` [n] where the order is known already."""

    u: Tensor
    v: Tensor
    scores: Tensor | None = None


class Dct(Unsupervised):
    """Factors of the map from a source vector to its mean effect at the target."""

    kind: Literal["linear", "quadratic", "exponential"] = "exponential"
    """Which model of that map the factors belong to."""
    iterations: int = Field(default=10, ge=1)
    """Power iterations of the quadratic and the exponential kind."""
    beta: float = Field(default=1.0, gt=0, le=1)
    """Share of the new factor in an iteration; smaller is steadier."""
    projection: int | None = Field(default=32, ge=1)
    """Random output directions through which the Jacobian is seen; null takes all of it."""
    published: bool = False
    """Update u and v from each other's values of the iteration before, and leave v as the last one made it."""
    target_tokens: Slice = "last:3"
    """Tokens of a prompt over which the target's change is averaged: `all`, `last:N`, or the first position (-3)."""
    towards: tuple[str, str] | None = None
    """Rank by how far a vector moves the target towards the first word and from the second, as the head reads them
    (two words of one token each, in a nested list); null ranks by weight."""

    def search(self, engine: Engine, effect: Downstream, source: Site, seed: int) -> Found:
        from experiments.spheres import drawn

        subject = engine.subject
        width = subject.point(source).width
        if self.n > width:
            raise FitError(f"{self.n} factors do not fit into the {width} dimensions of {source}; ask for fewer")
        aim = self.aim(subject, effect)
        radius, facts = self.radius_of(effect, source, seed)
        put = self.put(source)
        factors = self.linear(effect, put, width, radius, seed)
        objective = [] if self.kind == "linear" else self.iterate(effect, put, factors, radius)
        changes = effect.mean_changes(put(radius * factors.v))
        scores = self.rank(factors, changes) if aim is None else changes @ aim
        order = scores.argsort(descending=True, stable=True)
        seeds = [own_seed(seed, CONTROLS + i) for i in range(self.controls)]
        facts |= {"scores": rounded(scores[order].tolist()), "objective": rounded(objective)}
        tensors = {"vectors": (radius * factors.v)[order].cpu(), "outputs": factors.u[order].cpu()}
        return Found(tensors, {"vectors": drawn([width], radius, seeds)}, facts)

    def linear(self, effect: Downstream, put: Arms, width: int, radius: float, seed: int) -> Factors:
        """Singular vectors of the Jacobian, or of what random output directions see of it.

        Raises FitError where there are fewer than `n` and the kind is linear.
        """
        import torch

        from experiments.spheres import drawn, orthogonal

        out = sum(change.shape[-1] for change in effect.base[0])
        device = effect.engine.subject.device
        k = self.projection
        if k is None:
            seen = torch.eye(out, device=device)
        else:
            seen = drawn([out], 1.0, [own_seed(seed, PROJECTIONS + i) for i in range(k)]).to(device)
        _, pulled = effect.pull(put, torch.zeros(len(seen), width, device=device), seen)
        _, values, right = torch.linalg.svd(pulled.double(), full_matrices=False)
        v = right[: self.n].float()
        if len(v) < self.n:
            if self.kind == "linear":
                raise FitError(f"{self.n} linear factors of {len(v)} projections; raise projection or lower n")
            fill = drawn([width], 1.0, [own_seed(seed, FILLERS + i) for i in range(self.n - len(v))])
            v = orthogonal(torch.cat([v, fill.to(device)]))
        if self.kind == "linear":
            return Factors(unit(effect.push(put, v)), v, values[: self.n].float())
        return Factors(unit(effect.mean_changes(put(radius * v))), v)

    def iterate(self, effect: Downstream, put: Arms, factors: Factors, radius: float) -> list[float]:
        """Change `factors` by power iteration; the sum over factors of <u, what v does> in each iteration."""
        from experiments.spheres import orthogonal

        objective = []
        for _ in range(self.iterations):
            factors.v = orthogonal(factors.v)
            if not self.published:
                factors.u = unit(self.out_of(effect, put, factors, radius))
            if self.kind == "exponential":
                u, v = effect.pull(put, radius * factors.v, factors.u)
            else:
                u, v = effect.bend(put, factors.v, factors.u)
            objective.append((u * factors.u).sum().item())
            factors.u, factors.v = self._mixed(u, factors.u), self._mixed(v, factors.v)
        if not self.published:
            factors.v = orthogonal(factors.v)
            factors.u = unit(self.out_of(effect, put, factors, radius))
        return objective

    def out_of(self, effect: Downstream, put: Arms, factors: Factors, radius: float) -> Tensor:
        """What the input directions do downstream: D(R v) or H(v, v), [n, D]."""
        if self.kind == "exponential":
            return effect.mean_changes(put(radius * factors.v))
        return effect.bend(put, factors.v, factors.u)[0]

    def _mixed(self, new: Tensor, old: Tensor) -> Tensor:
        return unit(self.beta * unit(new) + (1 - self.beta) * old)

    def rank(self, factors: Factors, changes: Tensor) -> Tensor:
        """[n]: singular values of the linear kind, else the squared weights that fit `changes` D(R v) [n, D] best."""
        import torch

        if factors.scores is not None:
            return factors.scores
        u, v = factors.u.double(), factors.v.double()
        inner = v @ v.T
        kernel = (u @ u.T) * (torch.expm1(inner) if self.kind == "exponential" else inner.square())
        weights = torch.linalg.lstsq(kernel, (changes.double() * u).sum(1, keepdim=True)).solution
        return weights[:, 0].square()

    def aim(self, subject: Subject, effect: Downstream) -> Tensor | None:
        """The direction [D] that `towards` means at the target. Raises FitError for words of several tokens."""
        if self.towards is None:
            return None
        tokens: list[Any] = [subject.tokenizer(word, add_special_tokens=False)["input_ids"] for word in self.towards]
        for word, found in zip(self.towards, tokens, strict=True):
            if len(found) != 1:
                raise FitError(f"towards {word!r} is {len(found)} tokens to this subject; name a word of one (' Sure')")
        rows = subject.model.get_output_embeddings().weight.detach().float()
        return (rows[tokens[0][0]] - rows[tokens[1][0]]).repeat(len(effect.targets))

    def strength(self, change: Tensor) -> Tensor:
        """|mean over tokens| of a change [tokens, width], a number."""
        return change.mean(0).norm()


def unit(rows: Tensor) -> Tensor:
    """Rows brought to norm 1. Raises FitError for one that is zero or not finite."""
    norms = rows.norm(dim=-1, keepdim=True)
    if not norms.isfinite().all() or not (norms > 0).all():
        raise FitError("a factor vanished or is not finite; use fewer factors, or a wider dtype (dtype: float32)")
    return rows / norms
