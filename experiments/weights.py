"""The weight matrices of a subject's decoder layers: which they are, and how a change of them is kept.

A change is kept by name: `MODULE.a` [r, d_in] and `MODULE.b` [d_out, r] for b a added to a module's matrix, otherwise
under the parameter's own name and in its own shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.depth import Depths, layers
from experiments.edit import Dense, Edit, LowRank
from experiments.plugin import nearest
from experiments.training import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.subject import Subject

EXACT = 1e-6
"""Largest norm of what two factors leave out of a change, relative to its norm."""
WIDEST = 512
"""Largest rank that is looked for."""


def linear_modules(
    subject: Subject, targets: Sequence[str] | None = None, depths: Depths = "all"
) -> dict[str, nn.Module]:
    """Linear modules of the decoder layers by dotted name, those that `targets` and `depths` leave.

    Raises TrainingError for a target no module has as its last name, DepthError for a layer that does not
    exist.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {
        name: module
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and 0 <= subject.layer(name) < subject.n_layers
    }
    if problem := lacking(targets or (), {name.rpartition(".")[2] for name in found}):
        raise TrainingError(f"targets {problem}")
    wanted = layers(depths, subject.n_layers)
    return {
        name: module
        for name, module in found.items()
        if (targets is None or name.rpartition(".")[2] in targets) and subject.layer(name) in wanted
    }


def lacking(targets: Sequence[str], known: Collection[str]) -> str | None:
    """What is wrong with `targets` where the linear modules of a decoder layer have the last names `known`."""
    missing = [target for target in targets if target not in known]
    if not missing:
        return None
    allowed = sorted(known)
    near = nearest(missing[0], allowed)
    return f"{missing}: no such linear modules in this subject; allowed: {', '.join(allowed)}{near}"


def transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [d_in, d_out], as GPT-2's is."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def matrix_shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear module."""
    rows, columns = module.weight.shape
    return (columns, rows) if transposed(module) else (rows, columns)


def factored(change: Tensor) -> tuple[Tensor, Tensor] | None:
    """(a [r, d_in], b [d_out, r]) float32 with b a = `change` (float64) to `EXACT`, with r as small as it goes.

    None where no factors are smaller than the matrix, or r would exceed `WIDEST`. A range finder (Halko et al. 2011,
    algorithm 4.1) with more and more columns.
    """
    import torch

    d_out, d_in = change.shape
    most = min((d_out * d_in - 1) // (d_out + d_in), WIDEST)
    size, generator = change.norm(), torch.Generator().manual_seed(0)
    columns = 0
    while size > 0 and columns < most:
        columns = min(max(16, 4 * columns), most)
        noise = torch.randn(d_in, columns, generator=generator, dtype=change.dtype).to(change.device)
        basis = torch.linalg.qr(change @ noise).Q
        inside = basis.T @ change
        if (change - basis @ inside).norm() > EXACT * size / 2:
            continue
        u, s, v = torch.linalg.svd(inside, full_matrices=False)
        rank = int((s > EXACT * size / 10).sum())
        root = s[:rank].sqrt()
        a, b = (root[:, None] * v[:rank]).float(), (basis @ u[:, :rank] * root).float()
        if (change - b.double() @ a.double()).norm() <= EXACT * size:
            return a, b
    return None


def weight_edits(tensors: Mapping[str, Tensor], dose: float) -> list[Edit]:
    """`dose` times the changes that `tensors` keep; [] at dose 0."""
    if dose == 0:
        return []
    found: list[Edit] = []
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "a":
            found.append(LowRank(module, tensor, dose * tensors[f"{module}.b"]))
        elif leaf != "b":
            found.append(Dense(name, dose * tensor))
    return found
