"""What follows a run from its driver: nodes that are missing, workers that hang, and images that do not come."""

import time
from collections.abc import Iterator

import ray

from dinoray.pipeline.cluster.capacity import CapacityWatch, Demand, NodeType
from dinoray.pipeline.cluster.channel import Event, RunChannel
from dinoray.pipeline.cluster.hangs import SIGN_SECONDS, HangWatch
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox
from dinoray.pipeline.cluster.stalls import StallWatch
from dinoray.pipeline.ray_private.nodes import node_types, staying_nodes
from dinoray.pipeline.worker.config import Config
from dinoray.pipeline.worker.signs import SIGNS, end_worker


class Watches:
    """All of them for one run."""

    def __init__(self, config: Config, channel: RunChannel, *, use_gpu: bool, is_shared: bool) -> None:
        """`is_shared`: the images come from a stream that other runs take part in, and may wait for these."""
        resources = config.resources
        self._channel, self._looked = channel, time.monotonic()
        self._capacity = CapacityWatch(
            Demand(resources, use_gpu, config.data.streams),
            staying_nodes,
            ray.available_resources,
            node_types=lambda: [NodeType(*kind) for kind in node_types()],
        )
        self._hangs = HangWatch(resources.hang_seconds)
        self._stalls: StallWatch | None = None
        if not is_shared:
            self._stalls = StallWatch(
                config.data.stall_seconds,
                resources.wait_for_nodes_minutes,
                config.storage.give_up_after_seconds,
                flow=PoolMailbox(channel).flow,
                cpus=lambda: (ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)),
            )

    def look(self) -> Iterator[str]:
        """Yield lines for a person that are due, and end a worker that hangs. Call twice a second.

        Raises ResourceError once the run has waited for too long.
        """
        if (line := self._capacity.look()) is not None:
            yield line
        if time.monotonic() - self._looked < SIGN_SECONDS:
            return
        self._looked = time.monotonic()
        found = self._hangs.look(self._channel.get(SIGNS) or {})
        yield from found.lines
        if found.to_end is not None:
            end_worker(found.to_end)
        if self._stalls and (line := self._stalls.look(self._hangs.waits_for_images())) is not None:
            yield line

    def hear(self, event: Event) -> str | None:
        """Take note of an event of the run; return a line on it, if there is one."""
        facts = event.facts
        if event.kind == "lost":
            self._hangs.forget()
            self._capacity.lost(facts["text"], facts.get("step"))
        elif event.kind == "resumed":
            return self._capacity.resumed(facts["step"])
        elif event.kind == "step":
            self._capacity.trains(facts["step"])
        elif event.kind == "placed":
            self._hangs.placed(facts["num_workers"])
            self._capacity.placed()
        return None
