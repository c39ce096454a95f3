"""An independent way to compute what an edit does: plain transformers, one row at a time, hooks or merged weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from experiments.edit import Add, Dense, Edit, LowRank, Project, Scale

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Row
    from experiments.subject import Subject


def acting(positions: str, row: Row, n: int) -> Tensor:
    """[n] bool: which tokens of the row (and what is generated behind it) an activation edit acts on."""
    at = torch.arange(n)
    if positions == "all":
        return at >= 0
    if positions == "prompt":
        return at < row.n_prompt
    if positions == "response":
        return at >= row.n_prompt
    last = int(positions.removeprefix("last:"))
    return (at >= row.n_prompt - last) & (at < row.n_prompt)


def changed(edit: Any, h: Tensor) -> Tensor:
    """What the edit makes of values [..., width]."""
    if isinstance(edit, Add):
        return h + edit.vector
    if isinstance(edit, Scale):
        return h * (1 + edit.vector)
    assert isinstance(edit, Project)
    return h + edit.gain * (h @ edit.basis.T @ edit.basis)


def merged(subject: Subject, edits: tuple[Edit, ...]) -> Any:
    """A copy of the model, attending eagerly, with weight edits in its weights."""
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for edit in edits:
            if isinstance(edit, LowRank):
                module = model.get_submodule(edit.module)
                change = edit.b @ edit.a
                module.weight += change.T if isinstance(module, Conv1D) else change
            elif isinstance(edit, Dense):
                model.get_parameter(edit.parameter).add_(edit.delta)
    return model


@contextmanager
def hooked(subject: Subject, model: Any, row: Row) -> Iterator[None]:
    """Activation edits of the row on `model`, by one hook each, in order."""
    names = {id(module): name for name, module in subject.model.named_modules()}
    with ExitStack() as stack:
        for edit in row.edits:
            if not isinstance(edit, (LowRank, Dense)):
                point = subject.point(edit.site)
                module = model.get_submodule(names[id(point.module)])

                def hook(_: Any, __: Any, output: Any, edit: Any = edit, part: Any = point.part) -> Any:
                    h = (output[0] if isinstance(output, tuple) else output).clone()
                    where = slice(None) if part is None else part
                    new = changed(edit, h[..., where])
                    mask = acting(edit.positions, row, h.shape[1])[None, :, None]
                    new = torch.where(mask, new, h[..., where])
                    if part is None:
                        h = new
                    else:
                        h[..., where] = new
                    return (h, *output[1:]) if isinstance(output, tuple) else h

                stack.callback(module.register_forward_hook(hook).remove)
        yield


def logits(subject: Subject, row: Row) -> Tensor:
    """[len(tokens), vocabulary] of one row alone."""
    model = merged(subject, row.edits)
    with hooked(subject, model, row), torch.no_grad():
        return model(torch.tensor([row.tokens]), use_cache=False).logits[0].float()


def hidden(subject: Subject, row: Row, module: Any) -> Tensor:
    """[len(tokens), d]: output of `module` (of the subject's own model), read in a pass of one row alone."""
    names = {id(each): name for name, each in subject.model.named_modules()}
    model = merged(subject, row.edits)
    seen: list[Tensor] = []
    with hooked(subject, model, row), torch.no_grad():
        target = model.get_submodule(names[id(module)])
        handle = target.register_forward_hook(
            lambda _, __, output: seen.append((output[0] if isinstance(output, tuple) else output)[0])
        )
        model(torch.tensor([row.tokens]), use_cache=False)
        handle.remove()
    return seen[0]


def right_padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and labels [n, longest], prompts and padding labelled -100: a batch as people train on."""
    width = max(len(each.tokens) for each in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for index, each in enumerate(rows):
        n = len(each.tokens)
        tokens[index, :n] = torch.tensor(each.tokens)
        mask[index, :n] = 1
        labels[index, each.n_prompt : n] = tokens[index, each.n_prompt : n]
    return tokens, mask, labels
