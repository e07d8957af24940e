"""One augmented stream for several training runs that take the same images, order, seed and crops.

A study of hyper-parameters trains several times on the same crops. What is at a position is a function of
(seed, order, crops) alone, so a block that one run asked for serves all: a server, which the study's driver starts,
keeps a pool of actors that crop, has each block made once and gives every run a reference to it. Blocks lie in the
object store and go from there to the runs; the server sees positions and references only.

Runs may be at different steps, come late, leave early and come again. Blocks are forgotten, those that were not
asked for the longest first, when they exceed a window of bytes; one that is asked for again is made again, to the
same bytes. Nobody waits for a slower run: one further behind than the window costs what it would have cost alone.
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

from models.errors import DinorayError, ResourceError, one_line
from pipeline.augment.augmenter import Augmenter
from pipeline.augment.config import crop_bytes
from pipeline.cluster.channel import actor_here
from pipeline.data.partition import Layout
from pipeline.stream.ray_data import StreamPlan, in_step, open_augmenter

_CALLS = 2
"""Calls under way in an actor: while one block is cropped, the next one's images are fetched."""

_TRIES = 4
"""Times that a block is made for a consumer which cannot get it, and for each lot of actors that died of it."""


class SharedStats(NamedTuple):
    """What the server did since it was started. Alone, the runs would have made each block that was given."""

    blocks_made: int
    blocks_given: int
    cpu_seconds: float
    """CPU time of fetching, decoding and cropping what was made."""


class SharedStream:
    """Handle to the server; picklable. The server ends with its last handle, or with the driver that made it."""

    def __init__(self, plan: StreamPlan, *, num_actors: int, window_bytes: int) -> None:
        self._num_actors, self._window_bytes = num_actors, window_bytes
        self._image_bytes = crop_bytes(plan.crops)
        # Started again the server knows no blocks, which are then made again, nor the plan: it comes with each call.
        self._plan = ray.put(plan)
        # On this node: it owns all blocks, and lost with another node they would all have to be made again.
        figures = (num_actors, plan.cpus_per_augment_actor, self._image_bytes, window_bytes)
        self._server = actor_here(_Server, *figures, max_restarts=-1, max_task_retries=-1)
        self._server.open.remote([self._plan])

    def close(self) -> None:
        """End the server and its actors. Whoever keeps a handle for good, as Tune does, keeps them too until then."""
        ray.kill(self._server)

    def stats(self) -> SharedStats:
        """Figures of what sharing saved."""
        return ray.get(self._server.stats.remote())

    def ask(self, positions: NDArray[np.int64]) -> "Coming":
        """Have a block made, if it is not there yet. Does not wait."""
        return Coming(self._server, self._plan, positions)

    def blocks_ahead(self, layout: Layout, pulled: int) -> int:
        """Blocks that a rank asks for beyond the one in hand: `pulled`, and so many more that no actor idles.

        At least one; else no more than the window holds, so that whoever comes next finds them there.
        """
        busy = -(-_CALLS * self._num_actors // layout.world_size)
        rows = layout.steps_per_block * layout.batch_size_per_worker * layout.world_size
        return max(1, min(busy + pulled, self._window_bytes // (rows * self._image_bytes) - 1))


def batches(
    stream: SharedStream, layout: Layout, *, rank: int, prefetch_batches: int
) -> Iterator[dict[str, Any]]:
    """One batch of columns per step for `rank`, as stream/ray_data.py gives them without sharing.

    Blocks of this many batches are sent to this node ahead of their turn; see also `in_step`.
    """
    if not layout.num_blocks:
        return
    # Runs that begin at different steps still ask for the same blocks.
    skipped = layout.first_step % layout.steps_per_block
    whole = replace(layout, first_step=layout.first_step - skipped)
    received = _received(stream, whole, rank=rank, pulled=-(-prefetch_batches // layout.steps_per_block))
    yield from in_step(islice(received, skipped, None), layout, rank=rank)


def _received(stream: SharedStream, layout: Layout, *, rank: int, pulled: int) -> Iterator[dict[str, Any]]:
    """The batches of `rank`, with blocks asked for ahead and the next `pulled` of them sent here."""
    coming = (stream.ask(layout.block(i)) for i in range(rank, layout.num_blocks, layout.world_size))
    asked = deque(islice(coming, stream.blocks_ahead(layout, pulled)))
    while asked:
        first = asked.popleft()
        asked.extend(islice(coming, 1))
        block = first.get()
        for row in range(0, len(block["position"]), layout.batch_size_per_worker):
            for following in islice(asked, pulled):
                following.pull()
            yield {name: column[row : row + layout.batch_size_per_worker] for name, column in block.items()}
        del first, block  # they would keep the block in the object store while the next is waited for


class Coming:
    """A block that a consumer asked for. It is kept in the object store, wherever it was made, as long as this is."""

    def __init__(self, server: ActorHandle, plan: ray.ObjectRef, positions: NDArray[np.int64]) -> None:
        self._server, self._question = server, ([plan], positions)
        self._answer = server.block.remote(*self._question)
        self._is_pulled = False

    def pull(self) -> None:
        """Have the block sent to this node, if it is made. Does not wait."""
        if self._is_pulled or not ray.wait([self._answer], timeout=0)[0]:
            return
        self._is_pulled = True
        with contextlib.suppress(RayError):  # which get() will meet in its turn
            found = ray.get(self._answer)
            if not isinstance(found, DinorayError):
                ray.wait(found, timeout=0)  # Ray goes on sending after this returned

    def get(self) -> dict[str, NDArray[Any]]:
        """Its columns, see Augmenter.block, as views of the object store. Raises what it could not be made for."""
        for attempt in range(_TRIES):
            found = ray.get(self._answer)
            if isinstance(found, DinorayError):
                raise found
            try:
                return ray.get(found[0])
            except RayError:  # it was made, and lost with the node that it was on
                if attempt + 1 == _TRIES:
                    raise
                self._answer = self._server.block.remote(*self._question, lost=found[0].hex())
        raise AssertionError("unreachable")


class SharedMultiCropActor:
    """Positions in, (CPU seconds, columns) out; an error that a person can mend is a result too."""

    def __init__(self, plan: StreamPlan) -> None:
        self._plan, self._lock = plan, threading.Lock()
        self._augmenter: Augmenter | None = None

    def prepare(self) -> None:
        """Get ready for the first block."""
        self._ready()

    def block(self, positions: NDArray[np.int64]) -> tuple[float | DinorayError, Any]:
        """Two results, of which the server looks at the first."""
        try:
            columns = self._ready().block(positions)
        except DinorayError as error:
            return error, None  # as it is: Ray would pass on its text alone, inside a traceback
        return float(columns["cpu_ms"].sum()) / 1000, columns

    def _ready(self) -> Augmenter:
        # Not in __init__: an error there would be the actor's death and not a result.
        with self._lock:
            if self._augmenter is None:
                self._augmenter = open_augmenter(self._plan)
            return self._augmenter


class _Server:
    """Knows which blocks there are, which are under way, and what each actor has to do."""

    def __init__(self, num_actors: int, cpus_per_actor: float, image_bytes: int, window_bytes: int) -> None:
        self._num_actors, self._cpus_per_actor = num_actors, cpus_per_actor
        self._image_bytes, self._window_bytes = image_bytes, window_bytes
        self._plan: ray.ObjectRef | None = None
        self._blocks: OrderedDict[bytes, asyncio.Task[Any]] = OrderedDict()
        self._calls: dict[ActorHandle, int] = {}  # under way, of each actor that is up
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
        self, plan: "list[ray.ObjectRef]", positions: NDArray[np.int64], lost: str | None = None
    ) -> "list[ray.ObjectRef] | DinorayError":
        """A reference to the block of these positions, in a list; returns when it is made.

        `lost` is the reference that was given before and leads nowhere.
        """
        await self.open(plan)
        key = positions.tobytes()
        made = self._blocks.get(key)
        if made is None or (lost is not None and made.done() and made.result().hex() == lost):
            made = self._blocks[key] = asyncio.ensure_future(self._make(key, positions))
        self._blocks.move_to_end(key)
        while len(self._blocks) > 1 and self._num_bytes() > self._window_bytes:
            self._blocks.popitem(last=False)
        found = await asyncio.shield(made)  # others wait for it too
        if isinstance(found, DinorayError):
            return found
        self._given += 1
        return [found]

    def _num_bytes(self) -> int:
        positions = sum(map(len, self._blocks)) // np.dtype(np.int64).itemsize
        return positions * self._image_bytes

    async def _make(self, key: bytes, positions: NDArray[np.int64]) -> "ray.ObjectRef | DinorayError":
        """Have an actor make the block, another if it dies of it. What fails is not remembered."""
        try:
            found = await self._made_by_an_actor(positions)
        except BaseException:
            self._blocks.pop(key, None)
            raise
        if isinstance(found, DinorayError):
            self._blocks.pop(key, None)
        return found

    async def _made_by_an_actor(self, positions: NDArray[np.int64]) -> "ray.ObjectRef | DinorayError":
        # Each actor may have died before, which is only noticed when it is called.
        tries = self._num_actors + _TRIES
        for _ in range(tries):
            async with self._least_busy() as actor:
                told, block = actor.block.options(num_returns=2).remote(positions)
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
        """The actor with the fewest calls under way, once one has less than it can take."""
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
        self._joining.add(joining)  # the loop itself keeps no task alive
        joining.add_done_callback(self._joining.discard)

    async def _join(self, actor: ActorHandle) -> None:
        """Give the actor work as soon as it is up: one that waits for a node must hold up no block."""
        with contextlib.suppress(RayError):  # which its first block will meet again, and be told of
            await actor.prepare.remote()
        async with self._has_changed:
            self._calls[actor] = 0
            self._has_changed.notify(_CALLS)

    def _replace(self, actor: ActorHandle) -> None:
        if self._calls.pop(actor, None) is not None:  # else another call has found it dead before
            with contextlib.suppress(RayError):
                ray.kill(actor)  # it may only be out of reach
            self._start_actor()
