"""Fetch the bytes of images by index, many at once, from the addresses in the manifest.

Stands between the manifest and the decoder, inside every augmentation actor. A bad image becomes a status,
never an exception, so positions do not shift. A read waits while the storage does not answer; storage that
refuses every image ends the run at once. Returns encoded bytes; no decoding and no Ray here.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.listing.others import OtherObjects
from dinoray.pipeline.data.manifests.kinds import KindName
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.manifests.manifest_file import DETECTABLE
from dinoray.pipeline.data.mixture import MixedOrder
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.fetched import Fetched, Status
from dinoray.pipeline.data.reading.image_reader import ImageReader
from dinoray.pipeline.data.reading.mixed_images import MixedImages
from dinoray.pipeline.data.reading.objects import Objects
from dinoray.pipeline.data.reading.rows import Rows
from dinoray.pipeline.data.reading.tar_members import TarMembers
from dinoray.pipeline.data.recently_used import RecentlyUsed
from dinoray.pipeline.storage.addresses import is_s3
from dinoray.pipeline.storage.config import DEFAULTS, StorageConfig
from dinoray.pipeline.storage.hedging import hedged
from dinoray.pipeline.storage.retry import Retry
from dinoray.pipeline.storage.s3 import s3_client
from dinoray.pipeline.storage.waiting import Patient

__all__ = ["DataConfig", "Fetched", "Source", "Status"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_READERS: Final[dict[KindName, Callable[..., ImageReader]]] = {
    "images": Objects,
    "parquet": Rows,
    "tar": TarMembers,
}


class Source:
    """The images of a manifest, or only the `selected` images, by index in [0, num_images).

    A pickle contains only the arguments: threads, connections and cached rows stay in the process.
    """

    def __init__(
        self,
        config: DataConfig,
        manifest: Manifest,
        storage: StorageConfig = DEFAULTS,
        *,
        selected: NDArray[np.int64] | None = None,
    ) -> None:
        self.config = config = manifest.settle(config)
        self.manifest, self.storage, self._selected = manifest, storage, selected
        self._pool = ThreadPoolExecutor(config.fetch_concurrency, "fetch")  # no thread before its first task
        self._lock, self._cpu_seconds = threading.Lock(), 0.0
        hedge = storage.hedge_after_seconds if is_s3(manifest.root) else None
        self._once: dict[str, Any] = {} if hedge is None else {"once": partial(hedged, after_seconds=hedge)}
        self._others, self._call = (
            OtherObjects(manifest.table, manifest.root, storage.access),
            threading.local(),
        )
        self.parts = tuple(_part(config, one, storage, len(manifest.sources)) for one in manifest.sources)
        """The sources of a mix; none of a single source."""
        self.firsts: list[int] = np.cumsum([0, *(part.num_images for part in self.parts[:-1])]).tolist()
        """The number of the first image of each part: they are numbered one part after the other."""
        self._reader: ImageReader = (
            MixedImages(self.parts, manifest)
            if self.parts
            else _READERS[manifest.kind](config, manifest, self.read, storage.access)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _source, (self.config, self.manifest, self.storage, self._selected)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self._reader.num_images if self._selected is None else len(self._selected)

    @property
    def has_labels(self) -> bool:
        """True if the settings or the detected values define labels, of a mix those of a source."""
        if self.parts:
            return any(part.has_labels for part in self.parts)
        return self.config.label_column is not None or self.config.label_from_parent is True

    def select(self, indices: NDArray[np.int64]) -> "Source":
        """Return a source of only the images at these indices."""
        chosen = indices if self._selected is None else self._selected[indices]
        return _source(self.config, self.manifest, self.storage, chosen)

    def with_cache(self, cache: RecentlyUsed[int, Any]) -> "Source":
        """Return a source of the same images that keeps its groups in `cache`, as long as it is in this process."""
        source = _source(self.config, self.manifest, self.storage, self._selected)
        source.keep_in(cache)
        return source

    def keep_in(self, cache: Any) -> None:
        """Keep groups in `cache`, as long as this source is in this process."""
        self._reader.cache = cache

    def read(self, key: str, operation: Callable[[Retry], Result]) -> Result:
        """Return `operation(retry)`, which reads the object or shard `key`; its `retry` waits for the storage.

        Raises an error of BAD_IMAGE, Unreachable, or DataError if the store refuses all objects.
        """
        is_over: threading.Event = getattr(self._call, "is_over", None) or threading.Event()
        retry = Patient(
            self.storage.give_up_after_seconds,
            others=lambda: self._others.probes(key),
            is_wanted=lambda: not is_over.is_set(),
            sleep=is_over.wait,
            **self._once,
        )
        result = operation(retry)
        self._others.was_read(key)
        return result

    def key(self, index: int) -> str:
        """Return the name of an image without reading it: the object's key, or `shard#row` or `shard#member`.

        With a `key_column`, `Fetched.key` is the column's value instead, which requires a read.
        """
        return self._reader.key(int(self.in_manifest([index])[0]))

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """Fetch the images at `indices`, in that order, with up to `fetch_concurrency` requests in flight.

        An image that is missing, empty, too large or refused is returned with its status. So is an image all
        of whose requests fail while those for others succeed. Raises DataError with the object's name at once
        if the bucket is missing or all images are refused, and Unreachable if the storage does not answer for
        `storage.give_up_after_seconds`.
        """
        fetched = dict(self.arrivals(indices))
        return [fetched[place] for place in range(len(indices))]

    def arrivals(self, indices: Sequence[int]) -> Iterator[tuple[int, Fetched]]:
        """As `fetch`, but yield (place in `indices`, image) on arrival; requests start before it returns."""
        if is_s3(self.manifest.root):
            s3_client(self.storage.access)  # made here once, so that the threads do not all make one
        return self._reader.arrivals(self.in_manifest(indices).tolist(), self._begin)

    def order(self, seed: int) -> Order:
        """Return the order of these images with this seed."""
        cache_bytes = self.config.row_group_cache_bytes
        if not self.parts:
            return self._order(seed, cache_bytes, rows_per_group=self.manifest.rows_per_group)
        weights, ends = self.manifest.weights, self.manifest.group_ends
        shares = [weight / sum(weights) for weight in weights]
        # A block has a few images of each row group, also of a packed set, whose groups are thus shuffled in windows.
        orders = [
            part._order(seed + number, int(cache_bytes * share))
            for number, (part, share) in enumerate(zip(self.parts, shares, strict=True))
        ]
        return MixedOrder(orders, weights, np.diff(ends, prepend=0).tolist(), seed=seed)

    def _order(self, seed: int, cache_bytes: int, *, rows_per_group: int | None = None) -> Order:
        manifest = self.manifest
        # Groups among which images are shuffled: as many as fit the cache.
        window = 1
        if manifest.group_bytes is not None:
            window = max(1, int(cache_bytes // max(1, manifest.group_bytes.max())))
        return Order(
            self.num_images,
            seed=seed,
            group_sizes=manifest.group_sizes,
            window_groups=window,
            rows_per_group=rows_per_group,
        )

    def divided(self, rows: NDArray[np.int64]) -> "list[tuple[Source, NDArray[np.int64]]]":
        """Return the sources that rows of the manifest [n] belong to, each with the rows of its own manifest."""
        if not self.parts:
            return [(self, rows)]
        numbers = np.searchsorted(self.firsts, rows, side="right") - 1
        return [(part, rows[numbers == n] - self.firsts[n]) for n, part in enumerate(self.parts)]

    def in_manifest(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the manifest's indices [n] of these images; the manifest may have more images."""
        own = np.asarray(indices, np.int64)
        wrong = own[(own < 0) | (own >= self.num_images)]  # a negative index must not count from the end
        if len(wrong):
            raise IndexError(f"image {wrong[0]} of {self.num_images}")
        return own if self._selected is None else self._selected[own]

    def take_cpu_seconds(self) -> float:
        """Return the CPU time spent on fetching since the last call, in seconds."""
        with self._lock:
            seconds, self._cpu_seconds = self._cpu_seconds, 0.0
        return seconds + sum(part.take_cpu_seconds() for part in self.parts)

    def _begin(
        self, work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (place, result of `work`) as calls end; the first exception cancels all other calls.

        Calls begin ahead of the consumer while their results, of about `sizes` bytes, fit the buffer. The memory of a
        block thus has a limit, however large its images are.
        """
        is_over = threading.Event()

        def timed(item: Item) -> Result:
            begin = time.thread_time()
            self._call.is_over = is_over
            try:
                return work(item)
            finally:
                with self._lock:
                    self._cpu_seconds += time.thread_time() - begin

        waiting = deque(range(len(items)))
        places: dict[Future[Result], int] = {}
        done: SimpleQueue[Future[Result]] = SimpleQueue()

        def begin_more(num_bytes: int) -> int:
            """Begin the calls that fit beside `num_bytes`, at least one if none is under way; return the new sum."""
            while waiting and (not places or num_bytes + sizes[waiting[0]] <= self.config.fetch_buffer_bytes):
                place = waiting.popleft()
                num_bytes += sizes[place]
                future = self._pool.submit(timed, items[place])
                places[future] = place
                future.add_done_callback(done.put)
            return num_bytes

        num_bytes = begin_more(0)

        def ended(num_bytes: int) -> Iterator[tuple[int, Result]]:
            try:
                while places:
                    future = done.get()
                    place = places.pop(future)
                    yield place, future.result()
                    num_bytes = begin_more(num_bytes - sizes[place])
            finally:
                is_over.set()  # those that wait for the storage end too
                waiting.clear()
                for future in places:
                    future.cancel()

        return ended(num_bytes)


def _part(config: DataConfig, manifest: Manifest, storage: StorageConfig, num_sources: int) -> Source:
    """Return one source of a mix, which has its share of the memory for images that are fetched ahead."""
    listed = {name: manifest.listed_as[name] for name in ("path", *DETECTABLE)}
    ahead = max(1, config.fetch_buffer_bytes // num_sources)
    own = config.model_copy(update={**listed, "mix": {}, "fetch_buffer_bytes": ahead})
    return Source(own, manifest, storage)


def _source(
    config: DataConfig, manifest: Manifest, storage: StorageConfig, selected: NDArray[np.int64] | None
) -> Source:
    return Source(config, manifest, storage, selected=selected)
