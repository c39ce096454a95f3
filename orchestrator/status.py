"""What a plan would do now, node by node, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from experiments.problem import shown
from orchestrator.artifact import slug
from orchestrator.identity import SHORT, canonical
from orchestrator.plan import collector_paused

if TYPE_CHECKING:
    from orchestrator.artifact import Store
    from orchestrator.plan import Graph, Node

State = Literal["have", "run", "blocked", "failed before"]
MOST_COMPARED = 20
"""Records of one label that are read to find the nearest one."""
MOST_DIFFERENCES = 3
_ABSENT = object()


@dataclass(frozen=True)
class NodeStatus:
    """What would happen to a node, and the reason in words."""

    node: Node
    state: State
    why: str

    def __str__(self) -> str:
        return f"{self.state}: {self.why}"


def status(plan: Graph, store: Store) -> list[NodeStatus]:
    """The state of every node, in the plan's order. Raises StoreError at a record that was changed by hand."""
    with collector_paused():
        return list(_Look(plan, store).all())


class _Look:
    """One listing of the store, and what was read of it."""

    def __init__(self, plan: Graph, store: Store) -> None:
        self.plan = plan
        self.store = store
        self.have = store.keys()
        self.failed = store.failed()
        self.in_plan = {node.short for node in plan.nodes.values()}
        self._labels: dict[tuple[str, str], list[str]] | None = None
        self._records: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def all(self) -> Iterator[NodeStatus]:
        for node in self.plan.nodes.values():
            if node.short in self.have:
                when = self.store.modified(node.key)
                yield NodeStatus(node, "have", f"record of {when:%Y-%m-%d %H:%M}" if when else f"record {node.short}")
            elif missing := [key for key in node.inputs.values() if key[:SHORT] not in self.have]:
                yield NodeStatus(node, "blocked", self._waits(missing))
            elif node.short in self.failed:
                yield NodeStatus(node, "failed before", self._failure(node))
            else:
                yield NodeStatus(node, "run", self._reason(node))

    def _waits(self, missing: list[str]) -> str:
        first = self.plan.nodes[missing[0]]
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        failed = ", which failed before" if first.short in self.failed else ""
        return f"waits for {first.stage} {first.short}{failed}{more}"

    def _failure(self, node: Node) -> str:
        failure = self.store.failure(node.key)
        if failure is None:
            return "will be tried again"
        times = f" ({failure['attempts']} attempts)" if failure["attempts"] > 1 else ""
        return f"{failure['reason']}{times}, will be tried again"

    def _reason(self, node: Node) -> str:
        """What changed since the record of this stage and label that is most like `node` and not of this plan."""
        differences = [(differences_of(record, node), record) for record in self._alike(node)]
        if not differences:
            return "no record"
        changes, record = min(differences, key=lambda pair: len(pair[0]))
        told = ", ".join(changes[:MOST_DIFFERENCES])
        more = f" and {len(changes) - MOST_DIFFERENCES} more" if len(changes) > MOST_DIFFERENCES else ""
        return f"changed since {record['key'][:SHORT]}: {told}{more}"

    def _alike(self, node: Node) -> list[dict[str, Any]]:
        if self._labels is None:
            self._labels = self.store.by_label()
        bucket = (node.stage, slug(node.label))
        if bucket not in self._records:
            others = [short for short in self._labels.get(bucket, ()) if short not in self.in_plan]
            self._records[bucket] = [self.store.record(short) for short in others[:MOST_COMPARED]]
        return self._records[bucket]


def differences_of(record: Mapping[str, Any], node: Node) -> list[str]:
    """`seed 0 -> 1` for everything in which `node` differs from a record."""
    before = {"version": record["version"], **dict(_leaves(record["params"])), **_inputs(record["inputs"])}
    after = {"version": node.version, **dict(_leaves(node.params)), **_inputs(node.inputs)}
    return [
        f"{name} {_told(before.get(name, _ABSENT))} -> {_told(after.get(name, _ABSENT))}"
        for name in dict.fromkeys([*before, *after])
        if name not in before or name not in after or canonical(before[name]) != canonical(after[name])
    ]


def _inputs(inputs: Mapping[str, str]) -> dict[str, str]:
    return {f"input {role}": key[:SHORT] for role, key in inputs.items()}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _told(value: Any) -> str:
    return "(absent)" if value is _ABSENT else shown(value)
