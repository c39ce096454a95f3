"""Somebody else's vector or adapter, read from a file: nothing is learned, everything is checked.

A steering vector in safetensors, a control vector in GGUF (repeng, llama.cpp) or a LoRA folder of PEFT. Which layer a
number means and what dose 1 is differ between the programs that write such files; a file that does not say must be
told (docs/exchange.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.depth import Depths, shown
from experiments.edit import Add, Edit, LowRank, Project, Scale, Site, SiteName
from experiments.exchange import (
    Contents,
    ExchangeError,
    LayerMap,
    Operation,
    Placed,
    ScaleConvention,
    agreed,
    contents,
    placed,
    vectors,
)
from experiments.intervention import Intervention, Needs, Positions, State

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.engine import Engine
    from experiments.outline import Outline
    from experiments.subject import Subject


class Adopted(Intervention):
    """A vector or adapter from a file that another program, or `orch export`, wrote."""

    needs: ClassVar[tuple[Needs, ...]] = ()

    path: Path
    """A .safetensors or .gguf file of vectors, or a PEFT LoRA folder; its content, not its place, is its identity."""
    operation: Operation | None = None
    """What is done with a vector: `add` it, `ablate` its direction, `scale` by 1 + it; null is what the file says."""
    site: SiteName | None = None
    """Where it belongs; null is what the file says."""
    layer_map: LayerMap | None = None
    """What its numbers count: `blocks` from 0, or `hidden_states`, whose 0 is the embedding; null: the file says."""
    scale_convention: ScaleConvention | None = None
    """What dose 1 is: the vector as `stored`, or of length 1 (`unit`); null is what the file says."""
    layer: Depths | None = None
    """The layers of which the vectors are used; null is all that the file has."""
    positions: Positions | None = None
    """Where vectors act: `all`, `prompt`, `response` or `last:N`; null is what the file says, else `all`."""

    def fit(self, engine: Engine, data: Sequence[Any], seed: int) -> State:
        """Vectors named by their sites, or `MODULE.a` and `MODULE.b`; facts: what the file says.

        Raises ExchangeError, SubjectError or EngineError for what cannot be read or does not fit the subject.
        """
        found = contents(self.path)
        facts = {"kind": found.kind, "about": dict(found.about)}
        if found.kind == "peft":
            return self._adapter(engine.subject, found, facts)
        said = self._facts(found)
        places = placed(found, said, self.layer, engine.subject.n_layers)
        tensors = vectors(found, said, places)
        for site, tensor in tensors.items():
            width = engine.subject.point(site).width
            self._fits(site, tensor.shape[-1], width)
        positions = self.positions or said.pop("positions", "all")
        state = {str(site): tensor for site, tensor in tensors.items()}
        return State(state, {**facts, **said, "positions": positions})

    def _facts(self, found: Contents) -> dict[str, str]:
        given = {name: getattr(self, name) for name in ("operation", "site", "layer_map", "scale_convention")}
        return agreed(found, given)

    def _adapter(self, subject: Subject, found: Contents, facts: dict[str, Any]) -> State:
        from experiments import adapter_folder
        from experiments.acting import check_weight

        self._refuse_vector_settings()
        tensors: dict[str, Tensor] = {}
        for module, (a, b) in adapter_folder.read(found).items():
            subject.layer(module)
            check_weight(subject, LowRank(module, a, b))
            tensors |= {f"{module}.a": a, f"{module}.b": b}
        return State(tensors, {**facts, **found.facts})

    def _refuse_vector_settings(self) -> None:
        on = [name for name in type(self).model_fields if name != "path" and getattr(self, name) is not None]
        if on:
            raise ExchangeError(f"{self.path} is an adapter, which knows its modules; leave out {', '.join(on)}")

    def edits(self, state: State, dose: float) -> list[Edit]:
        if dose == 0:
            return []
        if state.facts["operation"] == "low_rank":
            names = [name.removesuffix(".a") for name in state.tensors if name.endswith(".a")]
            return [LowRank(name, state.tensors[f"{name}.a"], dose * state.tensors[f"{name}.b"]) for name in names]
        positions = state.facts["positions"]
        at = [(Site.parse(name), tensor) for name, tensor in state.tensors.items()]
        if state.facts["operation"] == "ablate":
            return [Project(site, basis, -dose, positions) for site, basis in at]
        kind = Scale if state.facts["operation"] == "scale" else Add
        return [kind(site, dose * vector, positions) for site, vector in at]

    def _fits(self, site: Site, found: int, width: int) -> None:
        if found != width:
            raise ExchangeError(
                f"{self.path}: the vector of {site} has width {found}, the subject has {width} there; it was made for "
                "another model; take a file made for this one"
            )

    def misplaced(self, outline: Outline) -> dict[str, str]:
        """Also reads the file but for its numbers. An adapter's modules are looked at when it is fitted."""
        problems = super().misplaced(outline)
        if problems:
            return problems
        try:
            found = contents(self.path)
            if found.kind == "peft":
                self._refuse_vector_settings()
                return {}
            places: list[Placed] = placed(found, self._facts(found), self.layer, outline.n_layers)
            lacking = sorted({each.site.name for each in places} - set(outline.sites))
            if lacking:
                has = ", ".join(sorted(outline.sites))
                raise ExchangeError(f"{self.path} is for {lacking[0]!r}; the subject's sites are {has}")
            for name, _, site in places:
                self._fits(site, found.shapes[name][-1], outline.widths.get(site.name, found.shapes[name][-1]))
        except ValueError as error:
            return {"path": str(error)}
        return {}

    def label(self) -> str:
        return f"adopted {self.path.stem}" + ("" if self.layer is None else f" {shown(self.layer)}")
