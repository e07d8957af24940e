"""What a run waits for before its first step and after a loss: which nodes are missing, for how long, and what a loss
has cost. No Ray here: nodes are what `ray.nodes()` returns."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.resources import ResourcesConfig

Nodes = Iterable[Mapping[str, Any]]

BROKEN = "train workers lost their connection"
"""A loss of which only the consequence is known: workers that outlive another meet a broken connection."""

_LOOK_SECONDS = 1.0
_COUNT_SECONDS = 5.0
"""Time between two looks at the nodes of a run that trains."""
_LINE_SECONDS = 30.0
"""Time between two lines about the same nodes; and without a step before a run counts as waiting."""


class NodeType(NamedTuple):
    """A type of nodes that the cluster's autoscaler may start."""

    name: str
    resources: Mapping[str, float]
    most: int
    """Nodes of this type; -1: no limit."""


def which_bring(names: Iterable[str], types: Iterable[NodeType]) -> list[str]:
    """Return, for a person, which of `types` bring resources with these names; [] if there are no types."""
    lines, has_types = [], False
    for kind in types:
        has_types = True
        brought = [f"{kind.resources[name]:g} {name}s" for name in names if kind.resources.get(name)]
        if brought:
            limit = "" if kind.most < 0 else f", at most {kind.most} nodes"
            lines.append(f"node type {kind.name} brings {' and '.join(brought)} a node{limit}")
    if has_types and not lines:
        lines.append(f"no node type of this cluster brings {' or '.join(f'{name}s' for name in names)}")
    return lines


@dataclass(frozen=True)
class Demand:
    """Resources without which a run cannot train."""

    resources: ResourcesConfig
    use_gpu: bool
    num_streams: int = 1

    def missing(self, nodes: Nodes) -> tuple[str, list[str]]:
        """Return what living `nodes` lack, e.g. `have 1 of 2 GPUs`, and the names of these resources; empty if they
        lack nothing."""
        alive = [node["Resources"] for node in nodes if node["Alive"]]
        short = self._short({name: int(sum(node.get(name, 0) for node in alive)) for name in ("GPU", "CPU")})
        lacks = [f"{there} of {need} {name}s" for name, (there, need) in short.items()]
        workers, fit = self.resources.least_workers, sum(self._fit(node) for node in alive)
        if not lacks and fit < workers:
            each = f"{self.resources.cpus_per_train_worker:g} CPUs{' and a GPU' if self.use_gpu else ''} each"
            lacks, short = [f"nodes for {fit} of {workers} train workers with {each}"], self._short({})
        return (f"have {' and '.join(lacks)}", list(short)) if lacks else ("", [])

    def in_use(self, free: Mapping[str, float]) -> tuple[str, list[str]]:
        """Return what others use of what the run needs, e.g. `1 of 2 GPUs are free`, and the names of these resources;
        `free` is by name of resource."""
        short = self._short(free)
        lacks = [f"{there:g} of {need} {name}s" for name, (there, need) in short.items()]
        return (f"{' and '.join(lacks)} are free", list(short)) if lacks else ("", [])

    def _short(self, there: Mapping[str, float]) -> dict[str, tuple[float, int]]:
        """Return of which resources there are fewer than the run needs: how many there are, how many it needs."""
        workers, cpus = self.resources.least_workers, self.resources.least_cpus(self.num_streams)
        needs = {"GPU": workers if self.use_gpu else 0, "CPU": cpus}
        return {name: (there.get(name, 0), need) for name, need in needs.items() if there.get(name, 0) < need}

    def _fit(self, node: Mapping[str, Any]) -> int:
        """Return the number of train workers that an empty node has room for."""
        each = {"CPU": self.resources.cpus_per_train_worker, "GPU": float(self.use_gpu)}
        rooms = [node.get(name, 0) // amount for name, amount in each.items() if amount]
        return int(min(rooms, default=self.resources.least_workers))


@dataclass(frozen=True)
class Loss:
    """A loss of train workers: what happened, after which logged step, and when, in seconds of `now`."""

    what: str
    step: int
    at: float

    def resumed(self, step: int, now: float) -> str:
        """Return what a person reads when the run goes on from `step`."""
        return (
            f"{self.what} after step {self.step}: resuming from step {step} after {now - self.at:.0f} s, "
            f"{max(0, self.step - step)} steps repeated"
        )


class CapacityWatch:
    """Follows a run from its driver: tells what nodes it waits for, what became of a loss, and when to give up."""

    def __init__(
        self,
        demand: Demand,
        nodes: Callable[[], Nodes],
        free: Callable[[], Mapping[str, float]],
        *,
        node_types: Callable[[], Iterable[NodeType]] = tuple,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`nodes` and `free`: what Ray knows of those that stay, and `ray.available_resources`; `node_types`: those
        that the cluster's autoscaler may start."""
        self._node_types = node_types
        self._demand, self._nodes, self._free, self._now = demand, nodes, free, now
        self._limit = 60 * demand.resources.wait_for_nodes_minutes
        self._step, self._loss = 0, None  # type: int, Loss | None
        self._waits, self._is_placed = True, False
        self._began = self._looked = self._told = now()
        self._lacks_since: float | None = None
        self._addresses: dict[str, str] = {}

    def placed(self) -> None:
        """The train workers have started."""
        self._is_placed = True

    def trains(self, step: int) -> None:
        """A step was logged: nothing is waited for, until a while has passed without another."""
        if self._waits:
            self._looked -= _COUNT_SECONDS  # the nodes that it trains on are counted at the next look
        self._step, self._waits, self._lacks_since, self._loss = step, False, None, None
        self._began = self._now()

    def lost(self, what: str, step: int | None = None) -> None:
        """Train workers are lost after `step`, or the step that was logged last.

        Of several losses before the run goes on, the first is the cause of the others.
        """
        now = self._now()
        self._step = self._step if step is None else step
        self._loss, self._is_placed = self._loss or Loss(what, self._step, now), False
        if not self._waits:
            self._waits, self._began = True, now
            self._told = now - _LINE_SECONDS  # what is missing is told at once

    def resumed(self, step: int) -> str:
        """Return the line on a run that resumes from a checkpoint: why, if that is known, and what it cost."""
        loss, self._loss, self._step = self._loss, None, step
        if loss is None:
            return f"resuming from step {step}"
        if loss.what == BROKEN:
            there = _addresses(self._nodes())
            gone = sorted({self._addresses[node] for node in self._addresses.keys() - there.keys()})
            loss = replace(loss, what=f"node {', '.join(gone)} lost") if gone else loss
        return loss.resumed(step, self._now())

    def look(self) -> str | None:
        """Return a line if one is due. ResourceError once nodes have been missing for too long. Call often."""
        now = self._now()
        waits = self._waits or now - self._began >= _LINE_SECONDS
        if now - self._looked < (_LOOK_SECONDS if waits else _COUNT_SECONDS):
            return None
        self._looked = now
        nodes = list(self._nodes())
        if not waits:
            self._addresses = _addresses(nodes)
            return None
        lacks, names = self._demand.missing(nodes)
        # Right after a loss, what Ray has not yet cleared away counts as in use.
        if not lacks and not self._is_placed and now - self._began >= _LINE_SECONDS:
            lacks, names = self._demand.in_use(self._free())
        if not lacks:
            self._lacks_since = None
            return None
        since = self._lacks_since = now if self._lacks_since is None else self._lacks_since
        minutes = self._demand.resources.wait_for_nodes_minutes
        if now - since >= self._limit:
            raise ResourceError(
                f"resources.wait_for_nodes_minutes={minutes:g}: the run has waited for so long ({lacks}); add nodes, "
                "ask for less by resources.train_workers and resources.augment_actors, or set "
                "resources.wait_for_nodes_minutes higher; the same command then goes on"
            )
        if now - self._told < _LINE_SECONDS:
            return None
        self._told = now
        line = f"waiting for nodes: {lacks}, for {now - since:.0f} s of at most {minutes:g} min"
        return "; ".join([line, *which_bring(names, self._node_types())])


def _addresses(nodes: Nodes) -> dict[str, str]:
    """Return the address of each living node."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}
