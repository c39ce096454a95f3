"""One packed forward pass: transformers' own model code, with forks and edits put in by hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.acting import Delta, EngineError, Station, accumulate, delta, in_order
from experiments.attention import Attends, Packed, Rule, in_force
from experiments.packing import Row, Trie, levels, reach

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.edit import Edit
    from experiments.packing import Ints
    from experiments.subject import Subject

Action = tuple["slice | Tensor", "slice | Tensor | None", Delta]
"""Tokens, part of the last dimension, and what is added there."""
Actions = Mapping[tuple["nn.Module", str], Sequence[Action]]
"""What is done at every module's input or output, in order."""


@dataclass(frozen=True, eq=False)
class Read:
    """What is wanted of a pass at a station: the flat indices [n] of tokens there, and where to put the values."""

    station: Station
    index: Tensor
    keep: Callable[[Tensor], None]
    """Receives [n, width]."""


@dataclass(frozen=True, eq=False)
class Level:
    """A trie on the device. `parent` [T] points into the one below, `origin` into the lowest; None for the lowest."""

    fork: int
    parent: Tensor | None
    origin: Tensor | None
    attends: Attends


@dataclass
class Pack:
    """Rows laid out, and the stations of their edits."""

    subject: Subject
    rows: Sequence[Row]
    stations: Mapping[Edit, Station]
    reads: list[Read] = field(default_factory=list)
    last_layer: int | None = None
    """Stop behind this layer; None runs them all."""

    @cached_property
    def tries(self) -> list[Trie]:
        """From the bottom up."""
        forks = {edit: station.fork for edit, station in self.stations.items()}
        return levels(self.rows, forks)

    def trie(self, fork: int) -> Trie:
        """The trie in force at the input of layer `fork`."""
        return [trie for trie in self.tries if trie.fork <= fork][-1]

    def levels(self) -> list[Level]:
        """The tries on the device."""
        found: list[Level] = []
        device = self.subject.device
        for trie in self.tries:
            parent = torch.from_numpy(trie.parent).to(device) if found else None
            below = found[-1].origin if found else None
            origin = parent if below is None else below[parent]
            found.append(Level(trie.fork, parent, origin, Packed(trie, device)))
        return found

    def ranges(self, fork: int, spans: Sequence[tuple[int, int]]) -> Ints:
        """Flat indices, one row after the other, of positions `spans[r]` of every row in the trie at `fork`."""
        paths = self.trie(fork).paths
        return np.concatenate([path[start:stop] for path, (start, stop) in zip(paths, spans, strict=True)])

    def actions(self) -> Actions:
        """What the edits do in this pass."""
        known: dict[Any, slice | Tensor | None] = {}

        def tokens_of(edit: Edit, holders: list[int]) -> slice | Tensor | None:
            key = self.stations[edit].fork, tuple(holders), getattr(edit, "positions", "all")
            if key not in known:
                paths = self.trie(self.stations[edit].fork).paths
                parts = [paths[index][slice(*reach(edit, self.rows[index]))] for index in holders]
                known[key] = as_tokens(np.unique(np.concatenate(parts)), self.subject.device)
            return known[key]

        return place_edits(self.subject, self.rows, self.stations, tokens_of)


def place_edits(
    subject: Subject,
    rows: Sequence[Row],
    stations: Mapping[Edit, Station],
    tokens_of: Callable[[Edit, list[int]], slice | Tensor | None],
) -> Actions:
    """What the edits of `stations` do, given the tokens that an edit acts on by the rows that hold it."""
    holders: dict[Edit, list[int]] = defaultdict(list)
    arms: dict[tuple[Edit, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        arms[row.edits].append(index)
    lists: dict[tuple[nn.Module, str], dict[tuple[Edit, ...], list[Edit]]] = defaultdict(lambda: defaultdict(list))
    for edits, members in arms.items():
        for edit in edits:
            if edit in stations:
                holders[edit] += members
                lists[stations[edit].module, stations[edit].side][edits].append(edit)
    found: dict[tuple[nn.Module, str], list[Action]] = defaultdict(list)
    like = torch.empty(0, dtype=subject.dtype, device=subject.device)
    for place, of_arms in lists.items():
        for edit in in_order(of_arms.values()):
            tokens = tokens_of(edit, sorted(holders[edit]))
            if tokens is not None:
                found[place].append((tokens, stations[edit].part, delta(edit, place[0], like)))
    return found


def as_tokens(flat: Ints, device: torch.device) -> slice | Tensor | None:
    """Sorted flat indices as a slice where they have no gap, as an index otherwise; None where there are none."""
    if not len(flat):
        return None
    if flat[-1] - flat[0] + 1 == len(flat):
        return slice(int(flat[0]), int(flat[-1]) + 1)
    return torch.from_numpy(flat).to(device)


def run(pack: Pack, wanted: Ints | None = None, levels: Sequence[Level] | None = None) -> Tensor:
    """Last hidden states [k, d], after the final norm, of tokens `wanted` [k] of the topmost trie (None: of all).

    [0, d] when the pass stops before. `levels` replace the pack's own.
    """
    subject, trie = pack.subject, pack.tries[0]
    ids, depth = (torch.from_numpy(part).to(subject.device)[None] for part in (trie.tokens, trie.depth))
    index = None if wanted is None else torch.from_numpy(wanted).to(subject.device)
    return execute(
        subject, levels or pack.levels(), pack.actions(), ids, depth, index, reads=pack.reads, last=pack.last_layer
    )


def execute(
    subject: Subject,
    levels: Sequence[Level],
    actions: Actions,
    ids: Tensor,
    depth: Tensor,
    wanted: Tensor | None = None,
    *,
    reads: Sequence[Read] = (),
    last: int | None = None,
) -> Tensor:
    """Run the subject's body on tokens `ids` [1, T] at positions `depth` [1, T] with everything hooked in.

    Returns the normed states [k, d] of the tokens `wanted`, or [0, d] after layer `last`.
    """
    flow = _Flow(levels, ids.shape[1], wanted)
    with ExitStack() as stack:
        for layer, block in enumerate(subject.blocks):
            for handle in flow.attach(block, layer):
                stack.callback(handle.remove)
        for (module, side), todo in actions.items():
            stack.callback(_attach_edits(module, side, todo).remove)
        for read in reads:
            stack.callback(_attach_read(read).remove)
        ends = subject.blocks[-1 if last is None else last]
        stack.callback(ends.register_forward_hook(_stop if last is not None else flow.narrow).remove)
        for child in subject.body.children():
            stack.callback(child.register_forward_hook(flow.end).remove)
        stack.enter_context(in_force(subject.model.config, flow))
        try:
            subject.body(input_ids=ids, position_ids=depth, use_cache=False)
        except _End as end:
            return torch.empty(0, subject.d_model, device=ids.device) if end.states is None else end.states[0]
    raise EngineError(f"{type(subject.body).__name__} has no final norm among its children; its layout is not known")


class _End(Exception):
    """Ends a pass: all that was wanted has been computed."""

    def __init__(self, states: Tensor | None = None) -> None:
        super().__init__("the pass is over")
        self.states = states


def _stop(*_: Any) -> None:
    raise _End


class _Flow:
    """Which level is in force while the layers run, and the forks between them."""

    def __init__(self, levels: Sequence[Level], lowest: int, wanted: Tensor | None) -> None:
        self.levels = {level.fork: level for level in levels}
        self.now = levels[0]
        self.lowest = lowest
        self.wanted = wanted
        self.narrowed = False
        self._moved: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        return self.now.attends(layer, query, key, value, rule)

    def attach(self, block: nn.Module, layer: int) -> list[Any]:
        """Hook a decoder block: tensors that go with the tokens follow the level, and the output forks to the next."""
        handles = []
        if any(0 < fork <= layer for fork in self.levels):
            handles.append(block.register_forward_pre_hook(self._follow, with_kwargs=True))
        if layer + 1 in self.levels:
            level = self.levels[layer + 1]
            handles.append(block.register_forward_hook(lambda _, __, output: self._fork(level, output)))
        return handles

    def narrow(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Hook of the last block: only the wanted tokens go on."""
        self.narrowed = True
        return output if self.wanted is None else _with_states(output, _states(output).index_select(1, self.wanted))

    def end(self, _: nn.Module, __: Any, output: Any) -> None:
        """Hook of the body's other modules: the one behind the last block is the final norm, and its output is all."""
        if self.narrowed:
            raise _End(output)

    def _fork(self, level: Level, output: Any) -> Any:
        self.now = level
        assert level.parent is not None
        return _with_states(output, _states(output).index_select(1, level.parent))

    def _follow(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = "hidden_states" in kwargs
        moved = {name: value if name == "hidden_states" else self._move(value) for name, value in kwargs.items()}
        rest = args if named else args[1:]
        return (() if named else args[:1]) + tuple(self._move(value) for value in rest), moved

    def _move(self, value: Any) -> Any:
        """`value` of the lowest level's tokens -> of this level's. What does not belong to tokens stays as it is."""
        if isinstance(value, tuple):
            return tuple(self._move(each) for each in value)
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[:2] != (1, self.lowest):
            return value
        key = (self.now.fork, id(value))
        if key not in self._moved:  # holds `value` too, so that its id stays its own
            assert self.now.origin is not None
            self._moved[key] = value, value.index_select(1, self.now.origin)
        return self._moved[key][1]


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_states(output: Any, states: Tensor) -> Any:
    return (states, *output[1:]) if isinstance(output, tuple) else states


def _attach_edits(module: nn.Module, side: str, todo: Sequence[Action]) -> Any:
    def act(values: Tensor, inputs: Tensor) -> Tensor:
        edited = values.clone() if side == "input" or torch.is_grad_enabled() else values
        for tokens, part, change in todo:
            accumulate(edited[0], inputs[0], tokens, part, change)
        return edited

    if side == "input":
        return module.register_forward_pre_hook(lambda _, args: (act(args[0], args[0]), *args[1:]))
    return module.register_forward_hook(
        lambda _, args, output: _with_states(output, act(_states(output), args[0] if args else _states(output)))
    )


def _attach_read(read: Read) -> Any:
    def look(values: Tensor) -> None:
        part = slice(None) if read.station.part is None else read.station.part
        read.keep(values[0].index_select(0, read.index)[:, part])

    module = read.station.module
    if read.station.side == "input":
        return module.register_forward_pre_hook(lambda _, args: look(args[0]))
    return module.register_forward_hook(lambda _, __, output: look(_states(output)))
