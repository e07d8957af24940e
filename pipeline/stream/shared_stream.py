"""One augmented stream for several training runs that use the same images, order, seed and crops.

The crops at a position are a function of (seed, order, crops) alone, so all trials of a study can use a block
that one trial requested. The study's driver starts a server with a pool of augment actors. The server has
each block made once and gives every run a reference to it. Runs read blocks from the object store; the server
handles only positions and references.

Runs may be at different steps, start late, end early and start again. When blocks exceed a window of bytes,
the least recently requested are dropped, and made again, with the same bytes, if requested again. No run
waits for a slower run: a run that is behind by more than the window costs as much as it would alone.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from dinoray.models.errors import DinorayError, ResourceError, one_line
from dinoray.pipeline.augment.config import crop_bytes
from dinoray.pipeline.cluster.channel import actor_here
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.stream.ray_data import BlockMaker, StreamPlan, in_step

_CALLS = 2
"""Concurrent calls per actor: one call fetches images while the other crops the block before."""

_TRIES = 4
"""Tries to deliver a block to a consumer; tries to make a block, in addition to one per actor."""


class SharedStats(NamedTuple):
    """Counts since the server started. Without sharing, each block that was given would have been made."""

    blocks_made: int
    blocks_given: int
    cpu_seconds: float
    """CPU time of fetching, decoding and cropping the blocks that were made."""


class SharedStream:
    """Picklable handle to the server, which ends with its last handle or with the driver that made it."""

    def __init__(self, plan: StreamPlan, *, num_actors: int, window_bytes: int) -> None:
        self._num_actors, self._window_bytes = num_actors, window_bytes
        self._image_bytes = crop_bytes(plan.crops)
        # A restarted server has no blocks (they are made again) and no plan, so each call passes the plan.
        self._plan = ray.put(plan)
        # On this node: the server owns all blocks, so losing it with another node would lose them all.
        figures = (num_actors, plan.cpus_per_augment_actor, self._image_bytes, window_bytes)
        self._server = actor_here(_Server, *figures, max_restarts=-1, max_task_retries=-1)
        self._server.open.remote([self._plan])

    def close(self) -> None:
        """End the server and its actors. Otherwise a handle that is kept, as Tune does, keeps them alive."""
        ray.kill(self._server)

    def stats(self) -> SharedStats:
        """Return the server's counts."""
        return ray.get(self._server.stats.remote())

    def request(self, positions: NDArray[np.int64], *, stop: int) -> "PendingBlock":
        """Request the block of `positions`, which is made if it does not exist yet. Does not wait.

        The run's positions end at `stop`.
        """
        return PendingBlock(self._server, self._plan, positions, stop)

    def blocks_ahead(self, layout: Layout, pulled: int) -> int:
        """Return how many blocks a rank requests in advance: `pulled`, plus its share of all actors' calls.

        At least one; otherwise at most what the window holds, so that the next run still finds the blocks.
        """
        busy = -(-_CALLS * self._num_actors // layout.world_size)
        rows = layout.steps_per_block * layout.batch_size_per_worker * layout.world_size
        return max(1, min(busy + pulled, self._window_bytes // (rows * self._image_bytes) - 1))


def batches(
    stream: SharedStream, layout: Layout, *, rank: int, prefetch_batches: int
) -> Iterator[dict[str, Any]]:
    """Yield one batch of columns per step for `rank`, as stream/ray_data.py does without sharing.

    Blocks that hold the next `prefetch_batches` batches are sent to this node in advance. See also `in_step`.
    """
    if not layout.num_blocks:
        return
    # Start at a block boundary, so that runs that begin at different steps request the same blocks.
    skipped = layout.first_step % layout.steps_per_block
    whole = replace(layout, first_step=layout.first_step - skipped)
    received = _received(stream, whole, rank=rank, pulled=-(-prefetch_batches // layout.steps_per_block))
    yield from in_step(islice(received, skipped, None), layout, rank=rank)


def _received(stream: SharedStream, layout: Layout, *, rank: int, pulled: int) -> Iterator[dict[str, Any]]:
    """Yield the batches of `rank`; request blocks in advance and have the next `pulled` sent here."""
    numbers = range(rank, layout.num_blocks, layout.world_size)
    pending = (stream.request(layout.block(number), stop=layout.stop) for number in numbers)
    asked = deque(islice(pending, stream.blocks_ahead(layout, pulled)))
    while asked:
        first = asked.popleft()
        asked.extend(islice(pending, 1))
        block = first.get()
        for row in range(0, len(block["position"]), layout.batch_size_per_worker):
            for following in islice(asked, pulled):
                following.prefetch()
            yield {name: column[row : row + layout.batch_size_per_worker] for name, column in block.items()}
        del first, block  # otherwise they keep the block in the object store while the next one is awaited


class PendingBlock:
    """A requested block. It stays in the object store as long as this object exists."""

    def __init__(
        self, server: ActorHandle, plan: ray.ObjectRef, positions: NDArray[np.int64], stop: int
    ) -> None:
        self._server, self._question = server, ([plan], positions, stop)
        self._answer = server.block.remote(*self._question)
        self._is_pulled = False

    def prefetch(self) -> None:
        """Have the block sent to this node, if it is already made. Does not wait."""
        if self._is_pulled or not ray.wait([self._answer], timeout=0)[0]:
            return
        self._is_pulled = True
        with contextlib.suppress(RayError):  # get() meets the same error and handles it
            found = ray.get(self._answer)
            if not isinstance(found, DinorayError):
                ray.wait(found, timeout=0)  # Ray keeps transferring after this call returns

    def get(self) -> dict[str, NDArray[Any]]:
        """Return Augmenter.block's columns as views of the object store. Raises the error of making them."""
        for attempt in range(_TRIES):
            found = ray.get(self._answer)
            if isinstance(found, DinorayError):
                raise found
            try:
                return ray.get(found[0])
            except RayError:  # the block was made, but its node was lost
                if attempt + 1 == _TRIES:
                    raise
                self._answer = self._server.block.remote(*self._question, lost=found[0].hex())
        raise AssertionError("unreachable")


class SharedMultiCropActor:
    """Map positions to (CPU seconds, columns). A DinorayError is returned as a result, not raised."""

    def __init__(self, plan: StreamPlan) -> None:
        self._plan, self._lock = plan, threading.Lock()
        self._blocks: BlockMaker | None = None

    def prepare(self) -> None:
        """Open the augmenter before the first block."""
        self._ready()

    def block(self, positions: NDArray[np.int64], stop: int) -> tuple[float | DinorayError, Any]:
        """Return CPU seconds or an error, and the columns. The server reads only the first result."""
        try:
            columns = self._ready().block(positions, stop=stop)
        except DinorayError as error:
            return error, None  # if it were raised, Ray would forward only its text, in a traceback
        return float(columns["cpu_ms"].sum()) / 1000, columns

    def _ready(self) -> BlockMaker:
        # Not in __init__: an error there would kill the actor instead of becoming a result.
        with self._lock:
            if self._blocks is None:
                self._blocks = BlockMaker(self._plan)
            return self._blocks


class _Server:
    """Tracks the existing blocks, the blocks in progress and the calls of each actor."""

    def __init__(self, num_actors: int, cpus_per_actor: float, image_bytes: int, window_bytes: int) -> None:
        self._num_actors, self._cpus_per_actor = num_actors, cpus_per_actor
        self._image_bytes, self._window_bytes = image_bytes, window_bytes
        self._plan: ray.ObjectRef | None = None
        self._blocks: OrderedDict[bytes, asyncio.Task[Any]] = OrderedDict()
        self._calls: dict[ActorHandle, int] = {}  # calls in progress of each actor that is up
        self._has_changed = asyncio.Condition()
        self._joining: set[asyncio.Task[None]] = set()
        self._made, self._given, self._cpu_seconds = 0, 0, 0.0

    async def open(self, plan: "list[ray.ObjectRef]") -> None:
        if self._plan is None:
            (self._plan,) = plan
            for _ in range(self._num_actors):
                self._start_actor()

    async def stats(self) -> SharedStats:
        return SharedStats(self._made, self._given, self._cpu_seconds)

    async def block(
        self,
        plan: "list[ray.ObjectRef]",
        positions: NDArray[np.int64],
        stop: int,
        lost: str | None = None,
    ) -> "list[ray.ObjectRef] | DinorayError":
        """Return a list with a reference to the block of `positions`, once the block is made.

        `lost`: the reference that was returned before and whose object no longer exists.
        """
        await self.open(plan)
        key = positions.tobytes()
        made = self._blocks.get(key)
        if made is None or (lost is not None and made.done() and made.result().hex() == lost):
            made = self._blocks[key] = asyncio.ensure_future(self._make(key, positions, stop))
        self._blocks.move_to_end(key)
        while len(self._blocks) > 1 and self._num_bytes() > self._window_bytes:
            self._blocks.popitem(last=False)
        found = await asyncio.shield(made)  # other consumers may await the same task
        if isinstance(found, DinorayError):
            return found
        self._given += 1
        return [found]

    def _num_bytes(self) -> int:
        positions = sum(map(len, self._blocks)) // np.dtype(np.int64).itemsize
        return positions * self._image_bytes

    async def _make(
        self, key: bytes, positions: NDArray[np.int64], stop: int
    ) -> "ray.ObjectRef | DinorayError":
        """Have an actor make the block, and another actor if the first one dies. Failures are not kept."""
        try:
            found = await self._made_by_an_actor(positions, stop)
        except BaseException:
            self._blocks.pop(key, None)
            raise
        if isinstance(found, DinorayError):
            self._blocks.pop(key, None)
        return found

    async def _made_by_an_actor(
        self, positions: NDArray[np.int64], stop: int
    ) -> "ray.ObjectRef | DinorayError":
        # Each actor may have died earlier; its death is only noticed when it is called.
        tries = self._num_actors + _TRIES
        for _ in range(tries):
            async with self._least_busy() as actor:
                told, block = actor.block.options(num_returns=2).remote(positions, stop)
                try:
                    result = await told
                except RayTaskError:
                    raise
                except RayError as error:
                    death = one_line(error)
                    self._replace(actor)
                    continue
            if isinstance(result, DinorayError):
                return result
            self._made += 1
            self._cpu_seconds += result
            return block
        return ResourceError(
            f"{tries} augment actors in a row died at positions {positions[0]} to {positions[-1]} ({death}); "
            "if memory ran out, give each more of it or lower resources.augment_actors"
        )

    @contextlib.asynccontextmanager
    async def _least_busy(self) -> AsyncIterator[ActorHandle]:
        """Yield the actor with the fewest calls in progress, once an actor has room for a call."""
        async with self._has_changed:
            await self._has_changed.wait_for(lambda: min(self._calls.values(), default=_CALLS) < _CALLS)
            actor = min(self._calls, key=self._calls.__getitem__)
            self._calls[actor] += 1
        try:
            yield actor
        finally:
            async with self._has_changed:
                if actor in self._calls:
                    self._calls[actor] -= 1
                self._has_changed.notify()

    def _start_actor(self) -> None:
        actor_class = ray.remote(SharedMultiCropActor)
        options = {"num_cpus": self._cpus_per_actor, "max_concurrency": _CALLS}
        actor = actor_class.options(**options).remote(self._plan)
        joining = asyncio.ensure_future(self._join(actor))
        self._joining.add(joining)  # the event loop holds only weak references to tasks
        joining.add_done_callback(self._joining.discard)

    async def _join(self, actor: ActorHandle) -> None:
        """Add the actor once it is up: an actor that waits for a node must not delay a block."""
        with contextlib.suppress(RayError):  # its first block meets the same error and reports it
            await actor.prepare.remote()
        async with self._has_changed:
            self._calls[actor] = 0
            self._has_changed.notify(_CALLS)

    def _replace(self, actor: ActorHandle) -> None:
        if self._calls.pop(actor, None) is not None:  # otherwise another call has already replaced it
            with contextlib.suppress(RayError):
                ray.kill(actor)  # it may be alive but unreachable
            self._start_actor()
