"""What the trainer and the pools of augment actors tell each other, over the run's channel. Each stream has a pool."""

from collections.abc import Mapping
from typing import NamedTuple

import ray

from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.pool_size import Actors, PoolSize, TrainerReading
from dinoray.pipeline.cluster.stalls import Flow

_READING, _ACTORS, _WORK, _PLAN = "trainer reading", "actors by stream", "work by stream", "plan of pools"
_FLOW = "flow by stream"


class PoolPlan(NamedTuple):
    """Number of actors of all pools together, and by which work it is divided among them (`share_actors`)."""

    size: PoolSize
    work: tuple[float, ...]


class PoolMailbox:
    """Readings from the trainer to the pools, the actors of the pools, and the plan for all of them; picklable."""

    def __init__(self, channel: RunChannel) -> None:
        self._channel = channel

    def begin(self) -> PoolPlan | None:
        """Forget the actors of earlier pools; return the plan that was last sent, with which new ones continue."""
        self._channel.put(_ACTORS, {})
        self._channel.put(_FLOW, {})
        plan: PoolPlan | None = self._channel.get(_PLAN)
        return plan

    def send_reading(self, reading: TrainerReading) -> None:
        """Add to the trainer's readings that were not collected yet."""
        self._channel.add(_READING, reading)

    def collect_reading(self) -> "ray.ObjectRef[TrainerReading | None]":
        """Take the sum of the readings; the future result is None if there are none."""
        return self._channel.collect(_READING)

    def send_actors(self, stream: int, actors: Actors) -> None:
        """Replace the actors of a stream's pool."""
        self._channel.merge(_ACTORS, {stream: actors})

    def actors(self) -> "ray.ObjectRef[Mapping[int, Actors]]":
        """Return the actors of each stream's pool that has sent them, as a future result."""
        return self._channel.look_up(_ACTORS)

    def send_flow(self, stream: int, flow: Flow) -> None:
        """Replace what a stream's blocks and bytes are."""
        self._channel.merge(_FLOW, {stream: flow})

    def flow(self) -> Flow | None:
        """Return the sum over the streams that have sent theirs; None before the first has."""
        flows: Mapping[int, Flow] = self._channel.get(_FLOW) or {}
        return Flow(*map(sum, zip(*flows.values(), strict=True))) if flows else None

    def send_work(self, stream: int, cpu_ms: float) -> None:
        """Replace the CPU time per image of a stream, as its train workers see it."""
        self._channel.merge(_WORK, {stream: cpu_ms})

    def work(self) -> "ray.ObjectRef[Mapping[int, float] | None]":
        """Return the CPU time per image of each stream that has sent it, as a future result."""
        return self._channel.look_up(_WORK)

    def send_plan(self, plan: PoolPlan) -> None:
        """Replace the plan for all pools."""
        self._channel.put(_PLAN, plan)

    def plan(self) -> "ray.ObjectRef[PoolPlan | None]":
        """Return the plan that was last sent, as a future result."""
        return self._channel.look_up(_PLAN)

    def metrics(self) -> dict[str, float]:
        """Return `augment_actors` (running) and `augment_target` of all pools; empty before they have sent them."""
        actors: Mapping[int, Actors] | None = self._channel.get(_ACTORS)
        plan: PoolPlan | None = self._channel.get(_PLAN)
        if not actors or plan is None:
            return {}
        running = sum(of_stream.running for of_stream in actors.values())
        return {"augment_actors": running, "augment_target": plan.size.target}
