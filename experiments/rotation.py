"""Rotations of a weight's singular directions, and changes of its singular values, that a dose turns back and forth.

With W = U S V' + W_res over the r largest singular values, and a dose c,
    W(c) = W + U (R_u(c) S(c) R_v(c)' - S) V'
    R(c) = (I - cA/2)^-1 (I + cA/2), A skew: a Cayley transform, orthogonal, with R(0) = I and R(-c) = R(c)'
    S(c) = S exp(c l), S (1 + c tanh l) or S + c l
The whole is written as what is added to W, without differences of nearly equal numbers, so that dose 0 is W exactly.
A direction of A with eigenvalue i w turns by 2 atan(c w / 2): bounding the *spectral* norm of A bounds every rotation
(a tanh on A's elements does not: 64 of them add up to angles far beyond the bound).

After InnerPiSSA (wassname 2025) and AntiPaSTO (arXiv 2601.07473), whose `mult`, `add` and `add2` are `exp`, `tanh` and
`add` here. The weights of both tuner and method are [d_out, d_in], U [d_out, r], V [d_in, r]. Needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rotate = Literal["v", "u", "both", "none"]
Scaling = Literal["exp", "tanh", "add", "none"]


class RotationError(ValueError):
    """Sizes that do not fit a weight: which, its value, what is allowed."""


@dataclass(frozen=True)
class Shape:
    """What is trained of a weight's singular part."""

    rank: int
    rotate: Rotate
    scaling: Scaling
    max_angle: float
    """Degrees that no direction exceeds at dose 1."""
    block: int | None = None
    """Singular directions that turn among themselves; None is all of them."""

    def __post_init__(self) -> None:
        if not 0 < self.max_angle < 180:
            raise RotationError(f"max_angle {self.max_angle}: must be more than 0 and less than 180 degrees")
        if self.rotate == self.scaling == "none":
            raise RotationError("rotate and scaling are both none: nothing would be trained; set one of them")
        if self.rotate != "none" and (self.size < 2 or self.rank % self.size):
            raise RotationError(f"blocks of {self.size} of {self.rank} directions: must divide them, and be at least 2")

    @property
    def size(self) -> int:
        """Directions of a block."""
        return self.block or self.rank

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name."""
        turning = (self.rank // self.size, self.size, self.size)
        found: dict[str, tuple[int, ...]] = {}
        if self.rotate in ("u", "both"):
            found["theta_u"] = turning
        if self.rotate in ("v", "both"):
            found["theta_v"] = turning
        return found | ({"lambda": (self.rank,)} if self.scaling != "none" else {})

    def bounded(self, theta: Tensor) -> Tensor:
        """Skew generators A [blocks, size, size] of parameters `theta`, their spectral norms within the bound."""
        skew = theta - theta.mT
        most = 2 * math.tan(math.radians(self.max_angle) / 2)
        norm = torch.linalg.matrix_norm(skew, ord=2, keepdim=True).clamp_min(1e-12)
        return skew * (most * torch.tanh(norm / most) / norm)

    def turned(self, theta: Tensor, dose: float) -> Tensor:
        """R(dose) - I, [rank, rank]."""
        half = dose / 2 * self.bounded(theta)
        identity = torch.eye(self.size, dtype=half.dtype, device=half.device)
        return torch.block_diag(*torch.linalg.solve(identity - half, 2 * half))

    def core(self, values: Tensor, parameters: Mapping[str, Tensor], dose: float) -> Tensor:
        """R_u S(dose) R_v' - S, [rank, rank], for singular values [rank]."""
        added = self.rescaled(values, parameters, dose)
        inner, change = torch.diag(values + added), torch.diag(added)
        if "theta_u" in parameters:
            turned = self.turned(parameters["theta_u"], dose) @ inner
            inner, change = inner + turned, change + turned
        if "theta_v" in parameters:
            change = change + inner @ self.turned(parameters["theta_v"], dose).T
        return change

    def rescaled(self, values: Tensor, parameters: Mapping[str, Tensor], dose: float) -> Tensor:
        """S(dose) - S, [rank]."""
        if self.scaling == "none":
            return torch.zeros_like(values)
        way = parameters["lambda"]
        if self.scaling == "add":
            return dose * way
        return values * (torch.expm1(dose * way) if self.scaling == "exp" else dose * torch.tanh(way))

    def angle(self, parameters: Mapping[str, Tensor], dose: float = 1.0) -> float:
        """The largest angle, in degrees, by which a direction is turned at `dose`."""
        turned = [self.bounded(parameters[name].detach()) for name in ("theta_u", "theta_v") if name in parameters]
        norms = [float(torch.linalg.matrix_norm(each, ord=2).max()) for each in turned]
        return max((math.degrees(2 * math.atan(abs(dose) * norm / 2)) for norm in norms), default=0.0)


def singular_basis(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_out, rank], S [rank] and V [d_in, rank] of the largest singular values of `weight`, float32.

    The sign of each pair is settled (the largest entry of a column of U is positive), so that the same weight has the
    same basis wherever it is computed. Raises RotationError for a rank the weight does not have.
    """
    if not 1 <= rank <= min(weight.shape):
        most = min(weight.shape)
        raise RotationError(f"rank {rank}: a weight of {list(weight.shape)} has {most} singular directions")
    u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    u, s, v = u[:, :rank], s[:rank], v[:rank].T
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    return (u * signs).contiguous(), s.contiguous(), (v * signs).contiguous()


def initial(shape: Shape, std: float, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Small random parameters, float32 on the CPU: normal with `std`, cut at twice that. Zero would be a saddle of
    losses that treat both signs of the dose alike."""
    return {
        name: torch.nn.init.trunc_normal_(torch.empty(size), std=std, a=-2 * std, b=2 * std, generator=generator)
        for name, size in shape.sizes().items()
    }
