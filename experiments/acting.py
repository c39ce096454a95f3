"""Edits on live modules: where each one acts, what it adds there, and which need the model to themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from experiments.edit import Add, Dense, Edit, LowRank, Project, Prompt, Scale

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.subject import Subject

Side = Literal["input", "output"]
Delta = Callable[["Tensor", Callable[[], "Tensor"]], "Tensor"]
"""(selected values [n, width], a function for the module's input there [n, d_in]) -> what is added, [n, width]."""


class EngineError(ValueError):
    """A request that cannot be computed: what is wrong, the value, what is allowed."""


@dataclass(frozen=True, eq=False)
class Station:
    """Where an edit acts: `part` of the last dimension of a module's input or output.

    `fork` is the first decoder layer whose states differ because of it: its own layer, or the one above when it changes
    the output of a whole decoder block.
    """

    module: nn.Module
    side: Side
    part: slice | Tensor | None
    fork: int


def linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by a weight matrix."""
    return isinstance(module, (nn.Linear, Conv1D))


def is_exclusive(subject: Subject, edit: Edit) -> bool:
    """Whether `edit` cannot be confined to some tokens of a pass, so that its rows get passes of their own.

    That is every weight edit outside the decoder layers' matrices: norms, biases, embeddings, the head.
    """
    if isinstance(edit, LowRank):
        return not 0 <= subject.layer(edit.module) < subject.n_layers
    if isinstance(edit, Dense):
        owner, _, leaf = edit.parameter.rpartition(".")
        inside = 0 <= subject.layer(edit.parameter) < subject.n_layers
        return not (inside and leaf == "weight" and linear(subject.model.get_submodule(owner)))
    return False


def station(subject: Subject, edit: Edit) -> Station:
    """Where a non-exclusive `edit` acts.

    Raises EngineError when its tensors do not fit, SubjectError when the subject has no such place.
    """
    if isinstance(edit, (LowRank, Dense)):
        name = edit.module if isinstance(edit, LowRank) else edit.parameter.rpartition(".")[0]
        layer = subject.layer(name)
        check_weight(subject, edit)
        return Station(subject.model.get_submodule(name), "output", None, layer)
    if isinstance(edit, Prompt):
        raise EngineError("a Prompt edit changes the text and has no place in a forward pass; render it first")
    point = subject.point(edit.site)
    if isinstance(edit, Project):
        name, shape, fits = "basis", edit.basis.shape, edit.basis.dim() == 2 and edit.basis.shape[1] == point.width
        wanted = f"[k, {point.width}]"
    else:
        name, shape, fits = "vector", edit.vector.shape, tuple(edit.vector.shape) == (point.width,)
        wanted = f"[{point.width}]"
    if not fits:
        raise EngineError(f"{type(edit).__name__} at {edit.site}: {name} has shape {list(shape)}, must be {wanted}")
    whole = point.module is subject.blocks[edit.site.layer] and point.side == "output"
    return Station(point.module, point.side, point.part, edit.site.layer + whole)


def check_weight(subject: Subject, edit: LowRank | Dense) -> None:
    """Raise EngineError unless the tensors of `edit` fit the module or parameter it names."""
    if isinstance(edit, Dense):
        shape = subject.model.get_parameter(edit.parameter).shape
        if edit.delta.shape != shape:
            raise EngineError(
                f"Dense on {edit.parameter}: delta has shape {list(edit.delta.shape)}, must be {list(shape)}"
            )
        return
    module = subject.model.get_submodule(edit.module)
    if not linear(module):
        raise EngineError(f"LowRank on {edit.module}: it is a {type(module).__name__}, must be a linear module")
    d_in, d_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
    a, b = edit.a.shape, edit.b.shape
    if not (len(a) == len(b) == 2 and a[1] == d_in and b[0] == d_out and a[0] == b[1]):
        raise EngineError(
            f"LowRank on {edit.module}: a has shape {list(a)} and b {list(b)}, must be [r, {d_in}] and [{d_out}, r]"
        )


def delta(edit: Edit, module: nn.Module, like: Tensor) -> Delta:
    """What `edit` adds, in the dtype and on the device of `like`; an exact LowRank is computed in its own dtype."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device=like.device, dtype=like.dtype)

    if isinstance(edit, Add):
        vector = cast(edit.vector)
        return lambda h, x: vector.expand_as(h)
    if isinstance(edit, Scale):
        scale = cast(edit.vector)
        return lambda h, x: h * scale
    if isinstance(edit, Project):
        basis, gain = cast(edit.basis), edit.gain
        return lambda h, x: gain * (h @ basis.T) @ basis
    if isinstance(edit, LowRank) and edit.exact:
        own_a, own_b = edit.a.to(like.device), edit.b.to(like.device)
        return lambda h, x: ((x().to(own_a.dtype) @ own_a.T) @ own_b.T).to(like.dtype)
    if isinstance(edit, LowRank):
        a, b = cast(edit.a), cast(edit.b)
        return lambda h, x: (x() @ a.T) @ b.T
    if isinstance(edit, Dense):
        change = cast(edit.delta)
        weight = change if isinstance(module, Conv1D) else change.T
        return lambda h, x: x() @ weight
    raise EngineError(f"{type(edit).__name__} has no place in a forward pass")


def accumulate(
    values: Tensor, inputs: Tensor, tokens: slice | Tensor, part: slice | Tensor | None, change: Delta
) -> None:
    """values[tokens, part] += change(values[tokens, part], inputs[tokens]), in place on `values` [T, width]."""

    def x() -> Tensor:
        return inputs[tokens]

    if isinstance(part, torch.Tensor):
        index = torch.arange(len(values), device=values.device)[tokens][:, None]
        values.index_put_((index, part), change(values[index, part], x), accumulate=True)
        return
    view = values if part is None else values[:, part]
    if isinstance(tokens, slice):
        target = view[tokens]
        target += change(target.clone() if torch.is_grad_enabled() else target, x)
    else:
        view.index_add_(0, tokens, change(view.index_select(0, tokens), x))


def in_order(lists: Iterable[Sequence[Edit]]) -> list[Edit]:
    """The edits of one place, weights first, otherwise in an order that keeps every list's own.

    Raises EngineError when two lists hold the same two edits in different orders, which no order keeps.
    """
    sorter: TopologicalSorter[Edit] = TopologicalSorter()
    for edits in lists:
        for edit in edits:
            sorter.add(edit)
        for before, after in pairwise(edits):
            sorter.add(after, before)
    try:
        ordered = list(sorter.static_order())
    except CycleError as error:
        raise EngineError(
            "rows of one call hold the same edits of one site in different orders; make separate Edit objects for them"
        ) from error
    return sorted(ordered, key=lambda edit: not isinstance(edit, (LowRank, Dense)))


@contextmanager
def alone(subject: Subject, edits: Sequence[Edit]) -> Iterator[None]:
    """The model with exclusive `edits` on all tokens. Parameters come back as the very same storage.

    Raises EngineError for tensors that do not fit, and for a Dense where gradients are enabled.
    """
    with ExitStack() as stack:
        for edit in edits:
            if isinstance(edit, LowRank):
                check_weight(subject, edit)
                module = subject.model.get_submodule(edit.module)
                stack.callback(module.register_forward_hook(_everywhere(edit, module)).remove)
            elif isinstance(edit, Dense):
                check_weight(subject, edit)
                if torch.is_grad_enabled():  # backward would meet the parameter as it was before
                    raise EngineError(f"a gradient cannot pass a Dense on {edit.parameter}; only decoder matrices can")
                parameter = subject.model.get_parameter(edit.parameter)
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = (parameter.data.float() + edit.delta.to(parameter.device).float()).to(parameter.dtype)
        yield


def _everywhere(edit: LowRank, module: nn.Module) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + delta(edit, module, output)(output, lambda: inputs[0])

    return hook
