"""The nodes that are up, by kind, and what they have cost so far."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ray

from pipeline.cluster.cost import CostConfig

Kind = Literal["head", "cpu", "gpu"]
"""The head, whatever it has; of the other nodes those without GPUs, and those with."""

_EVERY_SECONDS = 5.0
_HEAD, _MODEL = "node:__internal_head__", "accelerator_type:"


def count_nodes(nodes: Iterable[Mapping[str, Any]]) -> dict[Kind, int]:
    """How many of `ray.nodes()` are alive, of each kind."""
    kinds = Counter(_kind(node["Resources"]) for node in nodes if node["Alive"])
    return {kind: kinds[kind] for kind in ("head", "cpu", "gpu")}


def node_sorts(
    nodes: Iterable[Mapping[str, Any]], *, machine_cpus: int | None = None
) -> list[dict[str, Any]]:
    """The same nodes by what they have: a row for each sort, with the model of its GPUs where Ray knows it.

    `machine_cpus`: CPUs of this machine where the head is a local Ray, which may have more logical CPUs than that.
    """
    sorts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for node in nodes:
        if node["Alive"]:
            has = node["Resources"]
            models = sorted(name.removeprefix(_MODEL) for name in has if name.startswith(_MODEL))
            # What tasks may have, and what objects may.
            memory = (has.get("memory", 0) + has.get("object_store_memory", 0)) / 2**30
            is_local = machine_cpus is not None and _kind(has) == "head"
            row = {
                "kind": _kind(has),
                "CPUs": machine_cpus if is_local else has.get("CPU", 0),
                "GPUs": has.get("GPU", 0),
                "GPU model": ", ".join(models),
                "GiB": round(memory),
            }
            sorts[tuple(row.items())] += 1
    return [{"nodes": count, **dict(sort)} for sort, count in sorts.items()]


def _kind(resources: Mapping[str, Any]) -> Kind:
    return "head" if _HEAD in resources else "gpu" if resources.get("GPU") else "cpu"


def dollars_per_hour(cost: CostConfig, nodes: Mapping[Kind, int]) -> float:
    """What so many nodes of each kind cost an hour."""
    hourly = {"head": cost.head_hourly, "cpu": cost.cpu_hourly, "gpu": cost.gpu_hourly}
    return sum(hourly[kind] * count for kind, count in nodes.items())


class NodeWatch:
    """Counts nodes, and adds up their cost while a run runs. What they cost while it does not is not seen."""

    def __init__(self, cost: CostConfig, *, dollars: float) -> None:
        """`dollars`: what the run has come to before; see `spent`."""
        self._cost, self._dollars, self._since = cost, dollars, time.monotonic()
        self._nodes = count_nodes(ray.nodes())

    def read(self) -> dict[str, float]:
        """`nodes_head`, `nodes_cpu`, `nodes_gpu`, and where prices are known `dollars` so far.

        Counted every few seconds at most: it asks Ray's head.
        """
        now = time.monotonic()
        if now - self._since >= _EVERY_SECONDS:
            # A node is paid for from when it was seen: one that came and went between readings is not.
            self._dollars += dollars_per_hour(self._cost, self._nodes) * (now - self._since) / 3600
            self._nodes, self._since = count_nodes(ray.nodes()), now
        found: dict[str, float] = {f"nodes_{kind}": count for kind, count in self._nodes.items()}
        if any(self._cost.model_dump().values()):
            found["dollars"] = round(self._dollars, 4)
        return found
