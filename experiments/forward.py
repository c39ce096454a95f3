"""One packed forward pass: transformers' own model code, with forks and edits put in by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from experiments.acting import EngineError, accumulate
from experiments.attention import Rule, in_force

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from experiments.pack import Action, Actions, Level, Pack, Read
    from experiments.packing import Ints
    from experiments.subject import Subject


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
        read_late = any(read.station.fork >= len(subject.blocks) - 1 for read in reads)
        if wanted is not None and last is None and not read_late:
            above = levels[-1].parent if levels[-1].fork == subject.n_layers else None
            size = [level.size for level in levels if level.fork < subject.n_layers][-1]
            for handle in _narrow_mlp(subject.blocks[-1], size, above, wanted, actions):
                stack.callback(handle.remove)
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


def _narrow_mlp(
    block: nn.Module, size: int, parent: Tensor | None, wanted: Tensor, actions: Actions
) -> list[RemovableHandle]:
    """Let the last block's MLP see only the wanted ones of `size` tokens, since nothing attends to the others any more.

    `wanted` points behind the fork `parent`, if there is one after the block. Only where the MLP is a module of that
    name without edits inside.
    """
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, torch.nn.Module) or {module for module, _ in actions} & set(mlp.modules()):
        return []
    index = wanted if parent is None else parent[wanted].unique()

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].index_select(1, index), *args[1:]

    def behind(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(1, size, output.shape[-1]).index_copy(1, index, output)

    return [mlp.register_forward_pre_hook(before), mlp.register_forward_hook(behind)]
