"""Count the nodes that are up, by kind, and add up their cost."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ray

from dinoray.pipeline.cluster.cost import CostConfig

Kind = Literal["head", "cpu", "gpu"]
"""head: the head node, with or without GPUs; cpu: other nodes without GPUs; gpu: other nodes with GPUs."""

_EVERY_SECONDS = 5.0
_HEAD, _MODEL = "node:__internal_head__", "accelerator_type:"


def count_nodes(nodes: Iterable[Mapping[str, Any]]) -> dict[Kind, int]:
    """Return the number of living nodes of each kind; `nodes` as `ray.nodes()` returns them."""
    kinds = Counter(_kind(node["Resources"]) for node in nodes if node["Alive"])
    return {kind: kinds[kind] for kind in ("head", "cpu", "gpu")}


def least_store_bytes(nodes: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the bytes of the smallest object store among living nodes with CPUs for tasks; None if there is none."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    stores = [
        int(has["object_store_memory"])
        for has in resources
        if "object_store_memory" in has and has.get("CPU")
    ]
    return min(stores, default=None)


def group_identical_nodes(
    nodes: Iterable[Mapping[str, Any]], *, machine_cpus: int | None = None
) -> list[dict[str, Any]]:
    """Group living nodes with identical resources: one row per group, with the GPU model if Ray reports it.

    `machine_cpus`: CPUs of this machine if the head is a local Ray, which may declare more logical CPUs.
    """
    sorts: Counter[tuple[tuple[str, Any], ...]] = Counter()
    for node in nodes:
        if node["Alive"]:
            has = node["Resources"]
            models = sorted(name.removeprefix(_MODEL) for name in has if name.startswith(_MODEL))
            # Memory for tasks plus memory for objects.
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
    """Return the cost per hour, in dollars, of the given number of nodes of each kind."""
    hourly = {"head": cost.head_hourly, "cpu": cost.cpu_hourly, "gpu": cost.gpu_hourly}
    return sum(hourly[kind] * count for kind, count in nodes.items())


class NodeWatch:
    """Counts nodes and adds up their cost during a run. Cost between two starts of a run is not counted."""

    def __init__(self, cost: CostConfig, *, dollars: float) -> None:
        """`dollars`: cost of the run before this start; see `spent`."""
        self._cost, self._dollars, self._since = cost, dollars, time.monotonic()
        self._nodes = count_nodes(ray.nodes())

    def read(self) -> dict[str, float]:
        """Return `nodes_head`, `nodes_cpu`, `nodes_gpu` and, if prices are set, `dollars` so far.

        Counts at most every few seconds, because each count is a request to Ray's head.
        """
        now = time.monotonic()
        if now - self._since >= _EVERY_SECONDS:
            # A node's cost counts from the reading that first saw it, so shorter lives are not counted.
            self._dollars += dollars_per_hour(self._cost, self._nodes) * (now - self._since) / 3600
            self._nodes, self._since = count_nodes(ray.nodes()), now
        found: dict[str, float] = {f"nodes_{kind}": count for kind, count in self._nodes.items()}
        if any(self._cost.model_dump().values()):
            found["dollars"] = round(self._dollars, 4)
        return found
