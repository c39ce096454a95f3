"""Edits as parameters: what each adds to weights and biases, so that a plain forward pass does what the edit did.

Writing x for a linear module's input and y = W x + b for its output, everything below is exact:

    Add at y       b += v                       Scale at y     rows of W and b times 1 + v
    Project at y   W += g B'B W, b += g B'B b   LowRank, Dense W += b a, parameter += delta
    an edit x -> M x + v of what a norm hands to its readers: W <- W M, b += W v in each of them
    Add at resid   into the bias of what writes the layer's last summand, the MLP's output projection

A projection of the residual stream is exact only where everything else in the stream is orthogonal to it already: see
`_project_stream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers.pytorch_utils import Conv1D

from experiments.acting import check_weight, is_exclusive, linear, station
from experiments.edit import Activation, Add, Dense, Edit, LowRank, Project, Prompt, Scale, Site, SiteName

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.subject import Subject

READERS: dict[str, tuple[SiteName, ...]] = {"attn_in": ("q", "k", "v"), "mlp_in": ("gate", "up")}
"""The projections that read what a norm hands on."""
ORTHOGONAL = 1e-5
"""A matrix is orthogonal to a basis when what it writes along the basis is at most this share of what it writes."""


class BakeError(ValueError):
    """Edits that no plain checkpoint can hold: which, why, and what to do instead."""


class Draft:
    """The parameters that edits change, in float32 on the CPU, by name. Biases that the model lacks begin at zero."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.changed: dict[str, Tensor] = {}
        self.new: set[str] = set()
        """Biases the model does not have."""
        self.untied = False
        """Whether the head must get a matrix of its own, where it shares the embedding's."""
        model = subject.model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._first = {id(parameter): name for name, parameter in model.named_parameters()}

    def name(self, module: nn.Module) -> str:
        """Dotted name of a module."""
        return self._names[id(module)]

    def parameter(self, name: str) -> Tensor:
        """The parameter as it will be, to be changed in place; a tied one under its first name."""
        parameter = self.subject.model.get_parameter(name)
        first = self._first[id(parameter)]
        if first not in self.changed:
            self.changed[first] = parameter.detach().cpu().float().clone()
        return self.changed[first]

    def weight(self, module: str) -> Tensor:
        """[d_out, d_in] of a linear module, to be changed in place. A head that is tied to the embedding is untied."""
        name = f"{module}.weight"
        made = self.changed.get(name)
        if made is None:
            made = self.parameter(name)
            if name not in self.changed:
                self.untied = True
                made = self.changed[name] = made.clone()
        return made.T if isinstance(self.subject.model.get_submodule(module), Conv1D) else made

    def bias(self, module: str) -> Tensor:
        """[d_out] of a linear module, to be changed in place."""
        name = f"{module}.bias"
        if name in self.changed:
            return self.changed[name]
        if self.has_bias(module):
            return self.parameter(name)
        self.new.add(name)
        self.changed[name] = torch.zeros(len(self.weight(module)))
        return self.changed[name]

    def has_bias(self, module: str) -> bool:
        """Whether it has one, or has been given one."""
        return f"{module}.bias" in self.changed or self.subject.model.get_submodule(module).bias is not None


def fold(subject: Subject, edits: Sequence[Edit]) -> Draft:
    """All `edits` but Prompt as changed parameters.

    Raises BakeError for those that no parameters do, EngineError and SubjectError for those that do not fit.
    """
    draft = Draft(subject)
    inside = [edit for edit in edits if not isinstance(edit, Prompt)]
    for edit in inside:
        _check(subject, edit)
    for edit in inside:
        if isinstance(edit, Dense):
            draft.parameter(edit.parameter).add_(_plain(edit.delta))
    for edit in inside:
        if isinstance(edit, LowRank):
            draft.weight(edit.module).add_(_plain(edit.b) @ _plain(edit.a))
    activations = [edit for edit in inside if isinstance(edit, Activation)]
    for edit in reversed([edit for edit in activations if edit.site.name in READERS]):
        _fold_input(draft, edit)  # the last of them is next to the readers
    for edit in activations:
        if edit.site.name != "resid" and edit.site.name not in READERS:
            _fold_output(draft, edit)
    for edit in sorted((each for each in activations if each.site.name == "resid"), key=lambda each: each.site.layer):
        _fold_stream(draft, edit)
    return draft


def _check(subject: Subject, edit: Edit) -> None:
    """Raise what is wrong with one edit by itself."""
    if isinstance(edit, LowRank | Dense):
        check_weight(subject, edit)
    if not is_exclusive(subject, edit):
        station(subject, edit)
    positions = getattr(edit, "positions", "all")
    if positions != "all":
        raise BakeError(
            f"{_named(edit)} acts on positions {positions!r}, and the weights of a checkpoint act on every token; fit "
            "it again with positions: all, or keep the trial as it is"
        )


def _named(edit: Edit) -> str:
    return f"{type(edit).__name__} at {getattr(edit, 'site', '')}"


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float()


def _fold_output(draft: Draft, edit: Activation) -> None:
    """An edit of what a linear module puts out, or of the part of it that is q, k or v."""
    point = draft.subject.point(edit.site)
    if not linear(point.module):
        raise BakeError(
            f"{_named(edit)}: {type(point.module).__name__} makes this activation, not a linear module; act on the "
            "sites o and down in front of it, or train `lora` and merge that"
        )
    name = draft.name(point.module)
    rows: slice | Tensor = slice(None) if point.part is None else point.part
    rows = rows.cpu() if isinstance(rows, torch.Tensor) else rows
    _change_rows(draft, name, rows, edit)


def _change_rows(draft: Draft, module: str, rows: slice | Tensor, edit: Activation) -> None:
    if isinstance(edit, Add):
        draft.bias(module)[rows] += _plain(edit.vector)
        return
    matrices = [draft.weight(module)] + ([draft.bias(module)[:, None]] if draft.has_bias(module) else [])
    for matrix in matrices:
        if isinstance(edit, Scale):
            matrix[rows] = matrix[rows] * (1 + _plain(edit.vector))[:, None]
        else:
            basis = _plain(edit.basis)
            matrix[rows] = matrix[rows] + edit.gain * basis.T @ (basis @ matrix[rows])


def _fold_input(draft: Draft, edit: Activation) -> None:
    """An edit of what a norm hands on, in every projection that reads it."""
    subject = draft.subject
    places = subject.architecture.family.places
    readers = {
        draft.name(subject.point(Site(name, edit.site.layer)).module): None
        for name in READERS[edit.site.name]
        if name in places
    }
    for module in readers:
        weight = draft.weight(module)
        if isinstance(edit, Add):
            draft.bias(module).add_(weight @ _plain(edit.vector))
        elif isinstance(edit, Scale):
            weight.mul_(1 + _plain(edit.vector))
        else:
            basis = _plain(edit.basis)
            weight.add_(edit.gain * (weight @ basis.T) @ basis)


def _fold_stream(draft: Draft, edit: Activation) -> None:
    """An edit of the residual stream behind a layer, in the last module that writes to it."""
    writer = draft.subject.point(Site("mlp_out", edit.site.layer)).module
    if not linear(writer):
        raise BakeError(
            f"{_named(edit)}: the layer's last write comes from a {type(writer).__name__}, which has no bias that "
            "could hold it; export it instead (`orch export` to a control vector, which llama.cpp adds as it runs), or "
            "train `lora` and merge that"
        )
    if isinstance(edit, Scale):
        raise BakeError(
            f"{_named(edit)}: the residual stream is a sum of what many modules write, and later norms read all of it; "
            "scaling it is no change of one weight; use the sites attn_out and mlp_out"
        )
    if isinstance(edit, Project):
        _project_stream(draft, edit)
    _change_rows(draft, draft.name(writer), slice(None), edit)


def _project_stream(draft: Draft, edit: Project) -> None:
    """Raise BakeError unless nothing else in the stream at `edit.site` lies along its basis.

    Then (I + g B'B)(rest + mlp) = rest + (I + g B'B) mlp, and the last writer alone can hold it.
    """
    subject, basis = draft.subject, _plain(edit.basis)
    embeddings = [f"{name}.weight" for name in subject.architecture.family.below]
    matrices = {name: _now(draft, name).T for name in embeddings}
    for layer in range(edit.site.layer + 1):
        for site in ("attn_out", "mlp_out") if layer < edit.site.layer else ("attn_out",):
            module = draft.name(subject.point(Site(site, layer)).module)
            if linear(subject.model.get_submodule(module)):
                matrix = _now(draft, f"{module}.weight")
                flip = isinstance(subject.model.get_submodule(module), Conv1D)
                matrices[module] = matrix.T if flip else matrix
                if draft.has_bias(module):
                    matrices[f"{module}.bias"] = _now(draft, f"{module}.bias")[:, None]
    for name, matrix in matrices.items():
        if (basis @ matrix).norm() > ORTHOGONAL * matrix.norm():
            raise BakeError(
                f"{_named(edit)}: {name} writes along the direction too, and layers below have read that before it is "
                "taken out; no change of weights does the same. Ablate at the sites attn_out and mlp_out of all layers "
                "(that is what orthogonalised weights do), or keep the trial as it is"
            )


def _now(draft: Draft, name: str) -> Tensor:
    """A parameter as it stands in the draft, without taking it into it."""
    if name in draft.changed:
        return draft.changed[name]
    return draft.subject.model.get_parameter(name).detach().cpu().float()
