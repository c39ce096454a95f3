"""MELBO: vectors that change what is far downstream as much as a vector of their norm can.

Mack and Turner 2024, "Mechanistically eliciting latent behaviors in language models" (alignmentforum.org/posts/
ioPnHKFyy4Cw2Gr2x; code amack315/unsupervised-steering-vectors):

    max over theta of  sum_i (sum_t |Z_it(theta) - Z_it(0)|^p)^(1/q)   subject to  |theta| = R

with Z_it the target layer's residual stream at token t of prompt i, and theta added to the source layer's MLP output at
every token. Other random starts end at other maxima, and with luck at other behaviours.

Where this departs from the published code: all vectors are trained together, as rows of one batch (see
experiments/spheres.py for what that means for orthogonal ones); the norm runs over the hidden dimension, as the formula
says, while the code's runs over tokens, which is the same for p = 2 alone (`token_norm` brings it back); a bias that
the layer already has stays; layer L counts from 0 and means the layer's output, which is the code's
hidden_states[L + 1].

Of the tokens, the first is left out by default (`target_tokens`): many subjects keep activations there that are a
hundred times larger than elsewhere and the same for every prompt. With it (`all`, as in the post), eight vectors of
SmolLM2-135M found that token and little else: the same objective to four digits on prompts they had never seen, and
next tokens no further from the untouched subject's than a random vector takes them.

LoRA form: theta is a change of the source layer's MLP output projection, (R / r) sum_k b_k a_k' with unit vectors a_k
and b_k. (The published adapters normalise A by its columns, which leaves nothing but signs at rank 1.)

A step of AdamW moves every number by about `learning_rate`, whatever R is. The published 1e-3 therefore turns a vector
by 1 to 5 % of its norm at the post's R and width, but by nothing to speak of where R is ten times that; the default
here goes with R.

A fit costs `steps` forward and backward passes through the layers between source and target, over `n` x `prompts` rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from experiments.directions import own_seed
from experiments.edit import Edit, LowRank, Site
from experiments.intervention import State
from experiments.unsupervised import CONTROLS, Found, Unsupervised, rounded

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.downstream import Arm, Downstream
    from experiments.engine import Engine
    from experiments.subject import Subject

TURN = 0.03  # of its norm that a vector moves by in a step, about


class Melbo(Unsupervised):
    """Vectors of one norm, each trained to change downstream activations as much as it can."""

    steps: int = Field(default=100, ge=1)
    """Optimiser steps (300 to 1200 in the post)."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Step size of AdamW, how far a step moves a number of the vector (1e-3 in the post, at R from 0.35 to 4); null is
    0.03 R / sqrt(d), which moves a vector by 3 % of its norm, as the post's step does there."""
    p: float = Field(default=2.0, ge=1)
    """Exponent of a token's change: large ones look at the token that changes most."""
    q: float | None = Field(default=None, gt=0)
    """Root taken of a prompt's sum over tokens; null is p."""
    orthogonal: bool = False
    """Keep the vectors orthogonal to each other."""
    token_norm: bool = False
    """Take norms over tokens instead of over the hidden dimension, as the published code does."""
    form: Literal["bias", "lora"] = "bias"
    """A vector added at the source, or a low-rank change of the source layer's MLP output projection."""
    rank: int = Field(default=1, ge=1)
    """Rank of the lora form."""

    @model_validator(mode="after")
    def _fits_together(self) -> Melbo:
        if self.form == "lora" and self.radius is None:
            raise ValueError("form lora needs a radius: the rule that finds one is about vectors; 0.35 is the post's")
        if self.form == "lora" and self.orthogonal:
            raise ValueError("form lora cannot be orthogonal: that is defined for vectors; use form bias")
        if self.form == "lora" and (self.site != "mlp_out" or self.positions != "all"):
            raise ValueError(
                f"form lora changes the weight behind mlp_out, for every token; site {self.site} and positions "
                f"{self.positions} would mean nothing: leave them out, or use form bias"
            )
        return self

    def search(self, engine: Engine, effect: Downstream, source: Site, seed: int) -> Found:
        from experiments.spheres import Sphere, ascend

        radius, facts = self.radius_of(effect, source, seed)
        starts = self.starts(engine.subject, source, radius, [own_seed(seed, i) for i in range(self.n)])
        norms = {name: radius if name == "vectors" else 1.0 for name in starts}
        leaves = {name: start.to(engine.subject.device).requires_grad_() for name, start in starts.items()}
        spheres = [Sphere(leaf, norms[name], self.step(leaf, norms[name])) for name, leaf in leaves.items()]

        def objective() -> Tensor:
            return self.climb(effect, self.arms(engine.subject, source, leaves, radius))

        curve = ascend(spheres, objective, self.steps, self.orthogonal)
        seeds = [own_seed(seed, CONTROLS + i) for i in range(self.controls)]
        vectors = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        facts = facts | {
            "objective": rounded(curve.mean(1).tolist()),
            "first": rounded(curve[0].tolist()),
        }
        if self.form == "lora":
            facts["module"] = projection(engine.subject, source.layer)
        return Found(vectors, self.starts(engine.subject, source, radius, seeds), facts)

    def climb(self, effect: Downstream, arms: list[Arm]) -> Tensor:
        """What each arm is worth, [n]; leaves the gradient of minus their sum in the arms' leaves."""
        import torch

        worth = torch.zeros(len(arms))
        for part in effect.changes(arms):
            values = [torch.stack([self.strength(change) for change in cell.changes]).sum() for cell in part]
            (-torch.stack(values).sum()).backward()
            for cell, value in zip(part, values, strict=True):
                worth[cell.arm] += value.detach().cpu()
        return worth

    def strength(self, change: Tensor) -> Tensor:
        """(sum_t |change_t|^p)^(1/q) of a change [tokens, width], a number."""
        norms = change.norm(dim=0 if self.token_norm else 1)
        return norms.pow(self.p).sum().pow(1 / (self.q or self.p))

    def starts(self, subject: Subject, source: Site, radius: float, seeds: list[int]) -> dict[str, Tensor]:
        """Random vectors on their spheres, by tensor name: `vectors` [n, d], or `a` [n, r, d_in] and `b` [n, r, d]."""
        from experiments.spheres import drawn

        if self.form == "bias":
            return {"vectors": drawn([subject.point(source).width], radius, seeds)}
        d_out, d_in = widths(subject, source.layer)
        return {
            "a": drawn([self.rank, d_in], 1.0, seeds),
            "b": drawn([self.rank, d_out], 1.0, [own_seed(seed, 1) for seed in seeds]),
        }

    def step(self, vectors: Tensor, norm: float) -> float:
        """AdamW's step size for `vectors` [..., d] of norm `norm`."""
        return self.learning_rate or TURN * norm / vectors.shape[-1] ** 0.5

    def arms(self, subject: Subject, source: Site, vectors: dict[str, Tensor], radius: float) -> list[Arm]:
        """The edits that put in each of `vectors`."""
        if self.form == "bias":
            return self.put(source)(vectors["vectors"])
        module = projection(subject, source.layer)
        pairs = zip(vectors["a"], vectors["b"], strict=True)
        return [(LowRank(module, a, (radius / self.rank) * b.T),) for a, b in pairs]

    def arm(self, state: State, index: int, control: bool, dose: float = 1.0) -> list[Edit]:
        if self.form == "bias":
            return super().arm(state, index, control, dose)
        kind = "random." if control else ""
        a, b = state.tensors[f"{kind}a"][index], state.tensors[f"{kind}b"][index]
        return [LowRank(state.facts["module"], a, (dose * state.facts["radius"] / self.rank) * b.T)]


def projection(subject: Subject, layer: int) -> str:
    """Dotted name of the MLP's output projection. Raises SubjectError where the architecture has none."""
    module = subject.point(Site("down", layer)).module
    return next(name for name, each in subject.model.named_modules() if each is module)


def widths(subject: Subject, layer: int) -> tuple[int, int]:
    """Width of what the MLP's output projection puts out, and of what it takes in."""
    module: Any = subject.point(Site("down", layer)).module
    out = subject.point(Site("down", layer)).width
    return out, module.weight.numel() // out
