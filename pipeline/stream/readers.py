"""Readers of row groups that the augment actors of a run share: each row group of others' Parquet is read once.

An augment actor asks the reader of a row group (data/sharing.py) for encoded images, as it would ask its own source;
the readers ask the storage. They read the row groups of the next window ahead and keep those of the windows in use.
The order of images knows nothing of them: it is the same without readers and with any number of them.

Readers take no CPU of their own. A node that one is on does not count as idle, so they are started on the nodes with
GPUs, in turn, which stay as long as the run. Where none has any, the first is on the node of the augment actor that
needs it, the others on nodes with CPUs. The head of a cluster, where the driver runs, may be too small for them. A lost
one is started again.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dinoray.models.errors import DinorayError, ResourceError, one_line
from dinoray.pipeline.cluster.channel import RunChannel, actor_here
from dinoray.pipeline.data.manifests.manifest import DataConfig
from dinoray.pipeline.data.order import Order, Window
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.fetched import Fetched
from dinoray.pipeline.data.reading.group_reader import GroupReader
from dinoray.pipeline.data.reading.sharing import Sharing, StreamsApart, groups_ahead
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.checks import UNCHECKED
from dinoray.pipeline.storage.waiting import report_outages

_CALLS = 32
"""Concurrent calls of a reader; most of them wait for a row group that another call reads."""
_MOST_ROWS, _MOST_BYTES = 32, 16 << 20
"""Images of one call, and their expected bytes: the first of a block are cropped before the last are sent."""
_TRIES = 5
"""Readers in a row that may die under one call."""
_APART_SECONDS = 30.0
"""Longest wait for slower streams, one of which may have no actor for a while."""


class _Reply(NamedTuple):
    images: list[Fetched] | DinorayError
    """An error is a result: if it were raised, Ray would forward only its text, in a traceback."""
    cpu_seconds: float


class _Lent(NamedTuple):
    reader: ActorHandle
    born: int
    """When it was started, in nanoseconds: a newer one takes the place of one that is lost."""


@dataclass(frozen=True)
class Readers:
    """Picklable handle to the readers of a run. They end with its last handle, or with the driver that made it."""

    host: ActorHandle
    sharing: Sharing
    channel: RunChannel

    @classmethod
    def start(cls, sharing: Sharing, channel: RunChannel) -> "Readers":
        """Start what starts the readers, on this process's node."""
        return cls(actor_here(_Host, max_restarts=-1, max_task_retries=-1), sharing, channel)

    def close(self) -> None:
        """End the readers, also while a handle is kept somewhere."""
        ray.kill(self.host)


class _Host:
    """Starts readers where they are needed and owns them: they end with it. Keeps streams near one another."""

    def __init__(self) -> None:
        self._lent: dict[int, _Lent] = {}
        self._leg, self._apart = -1, StreamsApart(1)
        self._has_changed = asyncio.Condition()

    async def begin(self, layout: Layout, window: int) -> None:
        """Return once the stream of `layout` may begin the window at this position."""
        async with self._has_changed:
            if layout.first_step != self._leg:  # else those of a run that has gone back seem to be far ahead
                self._leg, self._apart = layout.first_step, StreamsApart(layout.num_streams)
            apart = self._apart
            may_begin = self._has_changed.wait_for(lambda: apart.may_begin(layout.stream, window))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(may_begin, _APART_SECONDS)
            apart.begin(layout.stream, window)
            self._has_changed.notify_all()

    async def reader(self, number: int, node: str, lost: int, *arguments: Any) -> _Lent:
        """Return a reader; a new one if there is none that is newer than the `lost` one.

        `node` is that of who asks. A restarted host knows nothing, so each call passes the `arguments` of _Reader.
        """
        held = self._lent.get(number)
        if held is None or held.born <= lost:
            if held is not None:
                ray.kill(held.reader)  # it may be alive but unreachable
            # The first augment actor asks for all of them.
            where = NodeAffinitySchedulingStrategy(reader_node(number, node, ray.nodes()), soft=True)
            actor = ray.remote(_Reader).options(num_cpus=0, scheduling_strategy=where, max_concurrency=_CALLS)
            reader = actor.remote(*arguments)
            held = self._lent[number] = _Lent(reader, time.time_ns())
        return held


def reader_node(number: int, asking: str, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Return the id of the node for a reader. `nodes` are as Ray lists them; `asking` is the id of who needs it."""
    able = [one for one in nodes if one["Alive"] and one["Resources"].get("CPU")]
    lasting = sorted(one["NodeID"] for one in able if one["Resources"].get("GPU"))
    if lasting:
        return str(lasting[number % len(lasting)])
    others = sorted(one["NodeID"] for one in able)
    return str(others[number % len(others)]) if number and others else asking


def note_unchecked(channel: RunChannel) -> None:
    """Send the number of this process's reads from S3 that nothing checked, if there are new ones."""
    if (found := UNCHECKED.take()) is not None:
        channel.note_unchecked(*found)


class _Reader:
    """A reader in a process of its own. Its calls run at once."""

    def __init__(self, source: "list[ray.ObjectRef]", channel: RunChannel, cache_bytes: int) -> None:
        self._channel = channel
        report_outages(channel.note_outage)
        self._reader = GroupReader(ray.get(source[0]), cache_bytes)

    def fetch(self, images: list[int]) -> _Reply:
        """Return the images, in that order, and the CPU time of reading since the last call."""
        try:
            found: list[Fetched] | DinorayError = self._reader.fetch(images)
        except DinorayError as error:
            found = error
        note_unchecked(self._channel)
        return _Reply(found, self._reader.take_cpu_seconds())

    def read_ahead(self, ahead: Window) -> None:
        """Read what is missing of these row groups, once."""
        self._reader.read_ahead(ahead)


class SharedImages:
    """The images of a source, as the readers give them: an augment actor's own handle to them. Thread-safe.

    Has the methods of Source that an Augmenter uses, and their results. `layout`: that of the stream which the images
    are for, if it may be one of several.
    """

    def __init__(
        self,
        readers: Readers,
        source: "ray.ObjectRef[Source]",
        order: Order,
        layout: Layout | None = None,
    ) -> None:
        self._readers, self._source_ref, self._order = readers, source, order
        self._layout = layout if layout is not None and layout.num_streams > 1 else None
        self._source: Source = ray.get(source)
        manifest = self._source.manifest
        sizes, num_bytes = manifest.group_sizes, manifest.group_bytes
        assert sizes is not None
        assert num_bytes is not None
        self._ends, self._bytes_per_image = np.cumsum(sizes), num_bytes / np.maximum(1, sizes)
        self._is_shared = num_bytes > 0  # image objects of a mix count no bytes: each actor reads its own
        self._node = ray.get_runtime_context().get_node_id()
        self._lent: dict[int, _Lent] = {}
        self._lock, self._cpu_seconds, self._window, self._begun = threading.Lock(), 0.0, -1, -1

    @property
    def config(self) -> DataConfig:
        """The settings of the source."""
        return self._source.config

    def expect(self, positions: NDArray[np.int64], stop: int) -> None:
        """Have the row groups of these positions and of the next window read ahead; the stream ends at `stop`.

        Waits for streams that are too far behind.
        """
        ahead = groups_ahead(self._order, int(positions[-1]), stop)
        if ahead is None:
            return
        if self._layout is not None and ahead.first > self._begun:
            ray.get(self._readers.host.begin.remote(self._layout, ahead.first))
        with self._lock:
            self._begun = max(self._begun, ahead.first)
            if ahead.first == self._window:
                return
            self._window = ahead.first
        readers = self._readers.sharing.reader_of(ahead.groups)
        for number in np.unique(readers).tolist():
            # Without waiting: if it fails, the groups are read once their images are needed.
            self._reader(number).reader.read_ahead.remote(
                ahead._replace(groups=ahead.groups[readers == number])
            )

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """As `Source.fetch`."""
        fetched = dict(self.arrivals(indices))
        return [fetched[place] for place in range(len(indices))]

    def arrivals(self, indices: Sequence[int]) -> Iterator[tuple[int, Fetched]]:
        """As `Source.arrivals`; expected bytes under way are limited by `data.fetch_buffer_bytes`."""
        wanted = np.asarray(indices, np.int64)
        groups = np.searchsorted(self._ends, self._source.in_manifest(wanted), side="right")
        shared = np.flatnonzero(self._is_shared[groups])
        readers = self._readers.sharing.reader_of(groups[shared])
        calls = deque(cut_in_calls(wanted[shared], readers, self._bytes_per_image[groups[shared]]))
        others = np.flatnonzero(~self._is_shared[groups])
        alone = self._source.arrivals(wanted[others].tolist()) if len(others) else iter(())
        pending: dict[ray.ObjectRef, _Call] = {}
        under_way = 0.0

        def begin_more() -> None:
            nonlocal under_way
            while calls and (not pending or under_way + calls[0].num_bytes <= self.config.fetch_buffer_bytes):
                call = calls.popleft()
                pending[self._begin(call)] = call
                under_way += call.num_bytes

        begin_more()

        def ended() -> Iterator[tuple[int, Fetched]]:
            nonlocal under_way
            yield from ((int(others[place]), image) for place, image in alone)
            while pending:
                (answer,), _ = ray.wait(list(pending), num_returns=1)
                call = pending.pop(answer)
                under_way -= call.num_bytes
                try:
                    reply: _Reply = ray.get(answer)
                except RayTaskError:
                    raise
                except RayError as error:
                    pending[self._begin_again(call, error)] = call
                    under_way += call.num_bytes
                    continue
                del answer  # else it keeps the reply in the object store while its images are cropped
                begin_more()
                if isinstance(reply.images, DinorayError):
                    raise reply.images
                with self._lock:
                    self._cpu_seconds += reply.cpu_seconds
                yield from zip(shared[call.places].tolist(), reply.images, strict=True)

        return ended()

    def take_cpu_seconds(self) -> float:
        """Return the readers' CPU time for this process since the last call, and its own, in seconds."""
        with self._lock:
            seconds, self._cpu_seconds = self._cpu_seconds, 0.0
        return seconds + self._source.take_cpu_seconds()

    def _begin(self, call: "_Call") -> ray.ObjectRef:
        call.lent = self._reader(call.reader)
        return call.lent.reader.fetch.remote(call.images)

    def _begin_again(self, call: "_Call", error: RayError) -> ray.ObjectRef:
        """Ask another reader after one has died."""
        call.tries += 1
        if call.tries >= _TRIES or call.lent is None:
            raise ResourceError(
                f"{call.tries} readers of {self._source.config.path} in a row died ({one_line(error)}); if memory "
                "ran out, give each node more of it or lower resources.augment_actors"
            )
        self._reader(call.reader, lost=call.lent.born)
        return self._begin(call)

    def _reader(self, number: int, lost: int = 0) -> _Lent:
        with self._lock:
            held = self._lent.get(number)
            if held is None or held.born <= lost:
                of_reader = ([self._source_ref], self._readers.channel, self._readers.sharing.cache_bytes)
                asked = self._readers.host.reader.remote(number, self._node, lost, *of_reader)
                held = self._lent[number] = ray.get(asked)
            return held


@dataclass
class _Call:
    """Images that one call asks a reader for, and their places in the request."""

    reader: int
    places: list[int]
    images: list[int]
    num_bytes: float = 0.0
    tries: int = 0
    lent: _Lent | None = None


def cut_in_calls(
    images: NDArray[np.int64], readers: NDArray[np.int64], num_bytes: NDArray[np.float64]
) -> list[_Call]:
    """Cut a request for `images` into calls of one reader each, in the order of their first places.

    All are [n]: indices of images, the numbers of their readers, and the expected bytes of each.
    """
    calls: list[_Call] = []
    latest: dict[int, _Call] = {}
    for place, (image, reader, size) in enumerate(
        zip(images.tolist(), readers.tolist(), num_bytes.tolist(), strict=True)
    ):
        call = latest.get(reader)
        if call is None or len(call.places) == _MOST_ROWS or call.num_bytes + size > _MOST_BYTES:
            call = latest[reader] = _Call(reader, [], [])
            calls.append(call)
        call.places.append(place)
        call.images.append(image)
        call.num_bytes += size
    return calls
