"""Ascent on spheres: vectors of fixed norm, trained together, each for itself or orthogonal to those before it.

One step, for every vector theta of norm R (Mack and Turner 2024, "Mechanistically eliciting latent behaviors in
language models", code of the post): the gradient is made orthogonal to the earlier vectors (where they are to be
orthogonal) and to theta itself, AdamW takes a step, the result is made orthogonal again and brought back to norm R.
AdamW works on every number by itself, so that vectors trained as rows of one tensor take the very steps they would take
alone.

The post trains one vector after the other, orthogonal to the *finished* ones. Here all move at once, and "the ones
before" are taken as they are at that step (Gram-Schmidt in the order of their indices): in the end as orthogonal, on
another path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from experiments.contrast import FitError

if TYPE_CHECKING:
    from torch import Tensor

BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Sphere:
    """Vectors along the last dimension of `vectors`, a float32 leaf, each of norm `radius`; changed in place by AdamW
    with step size `rate`."""

    vectors: Tensor
    radius: float
    rate: float


def drawn(shape: Sequence[int], radius: float, seeds: Sequence[int]) -> Tensor:
    """[len(seeds), *shape] vectors of norm `radius` along the last dimension; `seeds[i]` alone decides the i-th."""
    found = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return to_sphere(torch.stack(found), radius) if found else torch.empty(0, *shape)


def to_sphere(vectors: Tensor, radius: float) -> Tensor:
    """`vectors` brought to norm `radius` along the last dimension."""
    wide = vectors.double()
    return (radius * wide / wide.norm(dim=-1, keepdim=True)).to(vectors.dtype)


def orthogonal(vectors: Tensor) -> Tensor:
    """Gram-Schmidt: [n, d] -> orthonormal rows [n, d], the i-th in the span of the first i + 1, on its vector's side.

    Raises FitError for more vectors than dimensions.
    """
    n, d = vectors.shape
    if n > d:
        raise FitError(f"{n} orthogonal vectors do not fit into {d} dimensions; ask for at most {d}")
    q, r = torch.linalg.qr(vectors.double().T)
    return (q * r.diagonal().sign()).T.to(vectors.dtype)


def ascend(
    spheres: Sequence[Sphere],
    objective: Callable[[], Tensor],
    steps: int,
    apart: bool = False,
) -> Tensor:
    """Raise `objective` by `steps` steps; its values before each, [steps, n].

    `objective()` returns what each of the n rows is worth, [n], and leaves the gradient of *minus* their sum in the
    vectors' `.grad`. `apart` keeps the vectors of a sphere [n, d] orthogonal. Raises FitError for a value or gradient
    that is not finite.
    """
    parameters = [sphere.vectors for sphere in spheres]
    groups = [{"params": [sphere.vectors], "lr": sphere.rate} for sphere in spheres]
    optimiser = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, amsgrad=True)
    if apart:
        for sphere in spheres:
            sphere.vectors.data.copy_(sphere.radius * orthogonal(sphere.vectors.data))
    curve = []
    for step in range(steps):
        optimiser.zero_grad()
        values = objective()
        finite = values.isfinite().all() and all(
            each.grad is not None and each.grad.isfinite().all() for each in parameters
        )
        if not finite:
            raise FitError(
                f"step {step + 1} of {steps}: the objective or its gradient is not finite; use a wider dtype (dtype: "
                "float32), or a smaller radius"
            )
        curve.append(values.detach().cpu())
        for sphere in spheres:
            _tangent(sphere, apart)
        optimiser.step()
        for sphere in spheres:
            moved = orthogonal(sphere.vectors.data) if apart else sphere.vectors.data
            sphere.vectors.data.copy_(to_sphere(moved, sphere.radius))
    return torch.stack(curve)


def _tangent(sphere: Sphere, apart: bool) -> None:
    """Take out of every gradient its part along the vector, and along those before it where they are kept `apart`."""
    gradient, units = sphere.vectors.grad, sphere.vectors.data / sphere.radius
    assert gradient is not None
    if apart:  # orthonormal rows: one product with all of them, of which the earlier ones and its own count
        gradient.sub_((gradient @ units.T).tril() @ units)
    else:
        gradient.sub_((gradient * units).sum(-1, keepdim=True) * units)
