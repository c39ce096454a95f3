"""What a worker asks of a machine, and whether any machine can give it. Knows Ray's words for resources, and no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class ClusterError(ValueError):
    """A cluster that cannot be reached, or that can never give what is asked."""


@dataclass(frozen=True)
class Ask:
    """What one worker is given. None leaves it to the node: a whole GPU if it has one, and an equal share of cores."""

    cpus: int | None = None
    gpus: float | None = None
    memory: int | None = None
    """Bytes set aside for one worker in Ray's bookkeeping."""

    def __post_init__(self) -> None:
        if self.gpus is not None and self.gpus > 0:
            share = self.gpus if self.gpus >= 1 else 1 / self.gpus
            if abs(share - round(share)) > 1e-6:
                raise ClusterError(
                    f"resources.gpu: {self.gpus}; allowed: whole numbers, or one GPU divided evenly (0.5, 0.25, 0.2): "
                    "Ray cannot place other fractions reliably"
                )

    def layout(self, resources: Mapping[str, float]) -> list[dict[str, float]]:
        """What each worker on a node with `resources` gets; [] when not even one fits."""
        cores, cards = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
        gpus = self.gpus if self.gpus is not None else float(cards >= 1)
        limits = [cores // self.cpus if self.cpus else cores]
        if gpus:
            limits.append(int(cards / gpus + 1e-6))
        elif self.cpus is None:
            limits.append(1)  # one resident subject with all cores is faster than two with half of them
        if self.memory:
            limits.append(int(resources.get("memory", 0) // self.memory))
        count = min(limits)
        if count < 1:
            return []
        worker = {"num_cpus": float(self.cpus or cores // count), "num_gpus": gpus}
        if self.memory:
            worker["memory"] = float(self.memory)
        return [worker] * count


def check(ask: Ask, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse what no node of the cluster can ever give; Ray itself would wait for it forever. Raises ClusterError."""
    if any(ask.layout(resources) for resources in nodes):
        return
    has = "; ".join(
        f"CPU {r.get('CPU', 0):g}, GPU {r.get('GPU', 0):g}, memory {r.get('memory', 0) / 2**30:.1f} GiB" for r in nodes
    )
    wants = ", ".join(
        f"{name} {value:g}"
        for name, value in (("CPU", ask.cpus), ("GPU", ask.gpus), ("memory GiB", ask.memory and ask.memory / 2**30))
        if value
    )
    raise ClusterError(
        f"no node of the cluster can hold one worker with {wants or 'CPU 1'}; the nodes have: {has or 'nothing'}; "
        "ask for less under `resources` in the spec"
    )
