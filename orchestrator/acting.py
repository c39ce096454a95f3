"""What a fitted intervention does at the dose of a node, and whether it did it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.stage import STATE, StageError

if TYPE_CHECKING:
    from experiments.edit import Edit
    from orchestrator.artifact import Store
    from orchestrator.plan import Node


def dose_of(node: Node, store: Store) -> float:
    """The dose in the method's own terms: a calibrated one is a multiple of its unit."""
    dose: float = node.params["dose"]
    unit = node.inputs.get("unit")
    return dose if unit is None else dose * store.record(unit)["outputs"]["unit"]


def edits_of(node: Node, store: Store) -> tuple[Edit, ...]:
    """The edits of the node's method at its dose; () where it has none.

    Raises StageError where a dose of a method makes no edit.
    """
    from experiments import intervention

    if node.runtime["method"] is None:
        return ()
    method = intervention.method(node.runtime["method"]).model_validate(node.runtime["settings"])
    state = intervention.State.load(store.folder(node.inputs["state"]) / STATE)
    dose = dose_of(node, store)
    edits = tuple(method.edits(state, dose))
    if not edits and method.dose_kind != "on_off":  # a sign of an on/off method may be the subject's own context
        raise StageError(
            f"{node.label} dose {dose:g}: no edit is made, so that it would be the untouched subject; use another dose"
        )
    return edits


def acts(edit: Edit) -> bool:
    """Whether an edit changes a forward pass; a Prompt changes the text before it."""
    from experiments.edit import Prompt

    return not isinstance(edit, Prompt)


def counts(label: str, edits: Sequence[Edit], fired: Mapping[Edit, int]) -> list[int]:
    """Tokens each edit acted on, in their order; of a Prompt, the tokens that it changed.

    Raises StageError for one that never did: its dose would be the base in disguise.
    """
    from experiments.edit import Prompt

    idle = [edit for edit in edits if not fired.get(edit)]
    if not idle:
        return [fired[edit] for edit in edits]
    edit = idle[0]
    told = f"{label}: {len(idle)} of {len(edits)} edits acted on no token"
    if isinstance(edit, Prompt):
        raise StageError(f"{told}: the system prompt {edit.system!r} is the one that is in force without it")
    where = getattr(edit, "site", None) or getattr(edit, "module", None) or getattr(edit, "parameter", "")
    raise StageError(
        f"{told}, as {type(edit).__name__} at {where} with positions {getattr(edit, 'positions', 'all')!r}; choose "
        "positions that this eval has"
    )
