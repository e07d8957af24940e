"""Fetch the bytes of images by index, many at once, from the addresses in the manifest.

Stands between the manifest and the decoder, inside every augmentation actor. A bad image becomes a status,
never an exception, so positions do not shift. A read waits while the storage does not answer; storage that
refuses every image ends the run at once. Returns encoded bytes; no decoding and no Ray here.
"""

import os
import posixpath
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.fetched import BAD_IMAGE, BAD_OBJECT, Fetched, Status, expected_etag, whole
from dinoray.pipeline.data.manifest import DataConfig, Manifest
from dinoray.pipeline.data.manifest_file import UNKNOWN_BYTES
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.others import OtherObjects
from dinoray.pipeline.data.recently_used import RecentlyUsed
from dinoray.pipeline.data.rows import Read, Rows
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import DEFAULTS, Access, StorageConfig
from dinoray.pipeline.storage.hedging import hedged
from dinoray.pipeline.storage.retry import (
    LIST_AGAIN,
    ChangedObject,
    DeniedObject,
    MissingObject,
    ObjectTooLarge,
    Retry,
)
from dinoray.pipeline.storage.s3 import read_object, s3_client
from dinoray.pipeline.storage.waiting import Patient

__all__ = ["DataConfig", "Fetched", "Source", "Status"]

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        reader = Rows if manifest.kind == "parquet" else _Objects
        self._reader: Rows | _Objects = reader(config, manifest, self.read, storage.access)

    def __reduce__(self) -> tuple[Any, ...]:
        return _source, (self.config, self.manifest, self.storage, self._selected)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self._reader.num_images if self._selected is None else len(self._selected)

    @property
    def has_labels(self) -> bool:
        """True if the settings or the detected values define labels."""
        return self.config.label_column is not None or self.config.label_from_parent is True

    def select(self, indices: NDArray[np.int64]) -> "Source":
        """Return a source of only the images at these indices."""
        chosen = indices if self._selected is None else self._selected[indices]
        return _source(self.config, self.manifest, self.storage, chosen)

    def with_cache(self, cache: RecentlyUsed[int, Any]) -> "Source":
        """Return a source of the same images that keeps its row groups in `cache`, as long as it is in this process."""
        source = _source(self.config, self.manifest, self.storage, self._selected)
        if isinstance(source._reader, Rows):
            source._reader.cache = cache
        return source

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
        """Return the name of an image without reading it: the object's key, or `shard#row` for Parquet.

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
        manifest = self.manifest
        # Row groups among which rows are shuffled: as many as fit the cache.
        window = 1
        if manifest.group_bytes is not None:
            window = max(1, int(self.config.row_group_cache_bytes // max(1, manifest.group_bytes.max())))
        return Order(
            self.num_images,
            seed=seed,
            group_sizes=manifest.group_sizes,
            window_groups=window,
            rows_per_group=manifest.rows_per_group,
        )

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
        return seconds

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


def _source(
    config: DataConfig, manifest: Manifest, storage: StorageConfig, selected: NDArray[np.int64] | None
) -> Source:
    return Source(config, manifest, storage, selected=selected)


class _Objects:
    """One image per object or file."""

    def __init__(self, config: DataConfig, manifest: Manifest, read: Read, access: Access) -> None:
        self._config, self._manifest, self._waiting, self._access = config, manifest, read, access
        columns = (manifest.table[name] for name in ("key", "size", "etag", "label"))
        self._keys, self._sizes, self._etags, self._labels = columns
        self.num_images = manifest.num_images
        self._read = self._read_s3 if is_s3(manifest.root) else self._read_file

    def key(self, index: int) -> str:
        return str(self._keys[index].as_py())

    def arrivals(self, indices: Sequence[int], begin: Any) -> Iterator[tuple[int, Fetched]]:
        limit = self._config.max_object_bytes
        listed = (self._sizes[index].as_py() for index in indices)
        sizes = [min(UNKNOWN_BYTES if size is None else size, limit) for size in listed]
        images: Iterator[tuple[int, Fetched]] = begin(self._one, indices, sizes)
        return images

    def _one(self, index: int) -> Fetched:
        key, label, limit = self.key(index), self._labels[index].as_py(), self._config.max_object_bytes
        size = self._sizes[index].as_py()
        if size is not None and size > limit:
            reason = f"{size} bytes, more than data.max_object_bytes={limit}"
            return Fetched(key, None, label, Status.TOO_LARGE, reason)
        try:
            data = self._waiting(key, lambda retry: self._read(index, limit, retry))
        except BAD_OBJECT as error:
            return Fetched(key, None, label, BAD_IMAGE[type(error)], str(error))
        return whole(key, data, label, limit)

    def _read_s3(self, index: int, limit: int, retry: Retry) -> bytes:
        bucket, _ = split_s3_uri(self._manifest.root)
        key = self.key(index)
        if self._manifest.uri(key) == key:
            bucket, key = split_s3_uri(key)
        etag = expected_etag(self._config, self._etags[index].as_py())
        return read_object(bucket, key, etag=etag, max_bytes=limit, retry=retry, access=self._access)

    def _read_file(self, index: int, limit: int, retry: Retry) -> bytes:
        key, listed = self.key(index), self._sizes[index].as_py()
        path = self._manifest.uri(key)
        if posixpath.isabs(key) or ".." in key.split("/"):
            raise MissingObject(f"{key!r} leads out of {self._manifest.root}")

        def read() -> bytes:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise ObjectTooLarge(f"{path} holds {size} bytes, more than {limit}")
                # Not by its time, which differs between copies on several nodes.
                if listed is not None and size != listed and self._config.if_overwritten == "bad":
                    raise ChangedObject(f"{path} has {size} bytes, not {listed} as listed; {LIST_AGAIN}")
                return file.read()

        try:
            return retry(read, what=path)
        except PermissionError as error:
            raise DeniedObject(f"{path}: {error.strerror}; make it readable") from error
        except OSError as error:
            raise MissingObject(f"{path}: {error.strerror or error}") from error
