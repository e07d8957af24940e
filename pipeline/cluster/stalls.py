"""Find out why no images come: augment actors that do not run, that finish nothing, or that may not begin. No Ray here.

Ray Data waits silently for CPUs, for its budget of the object store, and for actors that are stopped. So the driver
compares how long train workers have waited with what the pools of augment actors say of themselves.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from dinoray.models.errors import ResourceError
from dinoray.pipeline.cluster.hangs import Sign

_LINE_SECONDS = 30.0
"""Time between two lines about the same wait."""
_FULL = 0.9
"""Share of the bytes that a stream may use from which on no block is begun, since that of the next would not fit."""


class Flow(NamedTuple):
    """What the pool of a stream does at one moment, or the sum of several."""

    running: int
    """Augment actors that run."""
    pending: int
    """Augment actors that wait for CPUs, or start."""
    in_work: int
    """Blocks that are given to actors."""
    made: int
    """Blocks that actors have made."""
    store_bytes: int
    """Bytes in the object store."""
    store_limit: int
    """Bytes that the stream may have there."""


class StallWatch:
    """Follows from its driver how long a run waits for images."""

    def __init__(
        self,
        stall_seconds: float,
        wait_minutes: float,
        give_up_after_seconds: float,
        *,
        flow: Callable[[], Flow | None],
        cpus: Callable[[], tuple[float, float]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`stall_seconds` and the two others are data.stall_seconds, resources.wait_for_nodes_minutes and
        storage.give_up_after_seconds; `flow`: of all streams; `cpus`: those that are free, and all of the cluster."""
        self._stall, self._minutes, self._store_seconds = stall_seconds, wait_minutes, give_up_after_seconds
        self._flow, self._cpus, self._now = flow, cpus, now
        self._made, self._made_at = 0, now()
        self._told: float | None = None

    def look(self, waiting: Sign | None) -> str | None:
        """Return a line if one is due; `waiting`: the sign of a worker that waits for images.

        Raises ResourceError after the longest wait. While actors work, that is longer by the time that storage may
        fail to answer.
        """
        now, flow = self._now(), self._flow()
        if flow and flow.made != self._made:
            self._made, self._made_at = flow.made, now
        seconds = min(waiting.seconds, now - self._made_at) if waiting else 0.0
        if waiting is None or seconds < self._stall:
            self._told = None
            return None
        why, remedy = self._why(flow)
        is_busy = flow is not None and flow.running and flow.in_work
        if seconds >= 60 * self._minutes + (self._store_seconds if is_busy else 0):
            raise ResourceError(
                f"resources.wait_for_nodes_minutes={self._minutes:g}: no images have come for {seconds:.0f} s ({why}); "
                f"{remedy}; the same command then goes on"
            )
        if self._told is not None and now - self._told < _LINE_SECONDS:
            return None
        self._told = now
        return f"warning: no images for {seconds:.0f} s at step {waiting.step + 1}: {why}"

    def _why(self, flow: Flow | None) -> tuple[str, str]:
        """Return what is known, and what helps."""
        free, there = self._cpus()
        cpus = f"{free:g} of {there:g} CPUs are free"
        add = "add CPU nodes, end what else uses CPUs, or ask for fewer by resources.augment_actors"
        if flow is None:
            return f"the stream has not begun, {cpus}", add
        if not flow.running:
            return f"0 of {flow.pending} augment actors run, {cpus}", add
        if flow.in_work:
            are = f"{flow.running} augment actors work at {flow.in_work} blocks and finish none"
            return are, "look at the nodes of the augment actors, which do not get on"
        store = f"{flow.store_bytes / 1e6:.0f} of {flow.store_limit / 1e6:.0f} MB of the object store"
        larger = (
            "give Ray more by `ray start --object-store-memory=BYTES`, or set train.global_batch_size lower"
        )
        if flow.store_bytes >= _FULL * flow.store_limit:
            return f"the object store is full: the stream uses {store} that it may use", larger
        return f"{flow.running} augment actors have no block to work at, the stream uses {store}", larger
