"""Fetch the bytes of images by index, many at once, from the addresses in the manifest.

Stands between the manifest and the decoder, inside every augmentation actor. A bad image becomes a status,
never an exception, so positions do not shift; storage that denies access ends the run at once. Returns
encoded bytes; no decoding, no order and no Ray here.
"""

import os
import posixpath
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifest import DataConfig, Manifest
from dinoray.pipeline.data.parquet import CorruptShard, RowGroupCache, read_footer, read_row_group
from dinoray.pipeline.storage.files import ChangedObject, MissingObject, ObjectTooLarge, Unreachable
from dinoray.pipeline.storage.retry import LIST_AGAIN, retrying
from dinoray.pipeline.storage.s3 import is_s3, read_object, s3_client, split_s3_uri

__all__ = ["DataConfig", "Fetched", "Source", "Status"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Status(IntEnum):
    """Result of reading one image: a small number that is sent with it to the trainer."""

    OK = 0
    MISSING = 1
    CORRUPT = 2
    UNREACHABLE = 3
    TOO_LARGE = 4


class Fetched(NamedTuple):
    """One fetched image. Unless `status` is OK, `data` is None and `reason` is the reason."""

    key: str
    data: bytes | None
    label: str | None
    status: Status
    reason: str


class Source:
    """The images of a manifest, or only the `selected` images, by index in [0, num_images).

    A pickle contains only the arguments: threads, connections and cached rows stay in the process.
    """

    def __init__(
        self, config: DataConfig, manifest: Manifest, selected: NDArray[np.int64] | None = None
    ) -> None:
        self.config = config = manifest.settle(config)
        self.manifest, self._selected = manifest, selected
        self._pool = ThreadPoolExecutor(config.fetch_concurrency, "fetch")  # no thread before its first task
        self._lock, self._cpu_seconds = threading.Lock(), 0.0
        reader = _Rows if manifest.kind == "parquet" else _Objects
        self._reader: _Rows | _Objects = reader(config, manifest)

    def __reduce__(self) -> tuple[type["Source"], tuple[Any, ...]]:
        return Source, (self.config, self.manifest, self._selected)

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
        return Source(self.config, self.manifest, chosen)

    def key(self, index: int) -> str:
        """Return the name of an image without reading it: the object's key, or `shard#row` for Parquet.

        With a `key_column`, `Fetched.key` is the column's value instead, which requires a read.
        """
        return self._reader.key(int(self.in_manifest([index])[0]))

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """Fetch the images at `indices`, in that order, with up to `fetch_concurrency` requests in flight.

        An image that is missing, empty, too large or unreachable after all attempts is returned with its
        status. Raises DataError with the object's name at once if the bucket is missing or denies access.
        """
        fetched = dict(self.arrivals(indices))
        return [fetched[place] for place in range(len(indices))]

    def arrivals(self, indices: Sequence[int]) -> Iterator[tuple[int, Fetched]]:
        """As `fetch`, but yield (place in `indices`, image) on arrival; requests start before it returns."""
        if is_s3(self.manifest.root):
            s3_client()  # made here once, so that the threads do not all make one
        return self._reader.arrivals(self.in_manifest(indices).tolist(), self._begin)

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

    def _begin(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        """Yield (place, result of `work`) as calls end; the first exception cancels calls not yet begun."""

        def timed(item: Item) -> Result:
            begin = time.thread_time()
            try:
                return work(item)
            finally:
                with self._lock:
                    self._cpu_seconds += time.thread_time() - begin

        places = {self._pool.submit(timed, item): place for place, item in enumerate(items)}

        def ended() -> Iterator[tuple[int, Result]]:
            try:
                for future in as_completed(places):
                    yield places[future], future.result()
            finally:
                for future in places:
                    future.cancel()

        return ended()


class _Objects:
    """One image per object or file."""

    def __init__(self, config: DataConfig, manifest: Manifest) -> None:
        self._config = config
        self._manifest = manifest
        columns = (manifest.table[name] for name in ("key", "size", "etag", "label"))
        self._keys, self._sizes, self._etags, self._labels = columns
        self.num_images = manifest.num_images
        self._read = self._read_s3 if is_s3(manifest.root) else self._read_file

    def key(self, index: int) -> str:
        return str(self._keys[index].as_py())

    def arrivals(self, indices: Sequence[int], begin: Any) -> Iterator[tuple[int, Fetched]]:
        images: Iterator[tuple[int, Fetched]] = begin(self._one, indices)
        return images

    def _one(self, index: int) -> Fetched:
        key, label, limit = self.key(index), self._labels[index].as_py(), self._config.max_object_bytes
        if self._sizes[index].as_py() > limit:
            reason = f"{self._sizes[index].as_py()} bytes, more than data.max_object_bytes={limit}"
            return Fetched(key, None, label, Status.TOO_LARGE, reason)
        try:
            data = self._read(index, limit)
        except tuple(_BAD_IMAGE) as error:
            return Fetched(key, None, label, _BAD_IMAGE[type(error)], str(error))
        return _whole(key, data, label, limit)

    def _read_s3(self, index: int, limit: int) -> bytes:
        bucket, _ = split_s3_uri(self._manifest.root)
        etag = _expected_etag(self._config, self._etags[index].as_py())
        return read_object(
            bucket, self.key(index), etag=etag, max_bytes=limit, attempts=self._config.fetch_attempts
        )

    def _read_file(self, index: int, limit: int) -> bytes:
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
                if size != listed and self._config.on_change == "bad":
                    raise ChangedObject(f"{path} has {size} bytes, not {listed} as listed; {LIST_AGAIN}")
                return file.read()

        try:
            return retrying(read, what=path, attempts=self._config.fetch_attempts)
        except OSError as error:
            raise MissingObject(f"{path}: {error.strerror or error}") from error


def _expected_etag(config: DataConfig, listed: str | None) -> str | None:
    """Return the ETag that an object must have to be read, None for any."""
    return listed if listed and config.on_change == "bad" else None


_FOOTERS = 256
"""Footers of shards that each process keeps."""
_MOST_DAMAGES = 4
"""Kinds of damage to one row group after which it is given up."""


class _Rows:
    """One image per row of Parquet shards. Whole row groups are read and the latest are cached."""

    def __init__(self, config: DataConfig, manifest: Manifest) -> None:
        self._config = config
        self._manifest = manifest
        # Arrays, not Python objects: there may be a million row groups, in each of many actors.
        self._groups = manifest.table.combine_chunks()
        self._num_rows, self._num_bytes = (
            self._groups[name].to_numpy() for name in ("num_rows", "num_bytes")
        )
        self._ends = np.cumsum(self._num_rows)
        self.num_images = int(self._ends[-1])
        shards = self._groups["key"].chunk(0)
        first_of_shard = np.r_[True, pc.not_equal(shards[1:], shards[:-1]).to_numpy(zero_copy_only=False)]
        starts = self._ends - self._num_rows
        self._shard_starts = np.maximum.accumulate(np.where(first_of_shard, starts, 0))
        self._cache = RowGroupCache(config.row_group_cache_bytes)
        self._footer = lru_cache(_FOOTERS)(self._read_footer)
        self._reading: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._reading_lock = threading.Lock()

    def key(self, index: int) -> str:
        return self._name(index, self._group_of(index))

    def arrivals(self, indices: Sequence[int], begin: Any) -> Iterator[tuple[int, Fetched]]:
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(self._group_of(index), []).append(place)
        waves = list(self._waves(places))
        first = begin(self._table, waves[0]) if waves else iter(())

        def rows() -> Iterator[tuple[int, Fetched]]:
            for number, wave in enumerate(waves):
                for which, table in first if number == 0 else begin(self._table, wave):
                    for place in places[wave[which]]:
                        yield place, self._row(indices[place], wave[which], table)

        return rows()

    def _waves(self, groups: Iterable[int]) -> Iterator[list[int]]:
        """Yield the distinct groups in portions that fit the cache, so memory stays near twice its size."""
        wave: list[int] = []
        num_bytes = 0
        for group in dict.fromkeys(groups):
            num_bytes += int(self._num_bytes[group])
            if wave and num_bytes > self._config.row_group_cache_bytes:
                yield wave
                wave, num_bytes = [], int(self._num_bytes[group])
            wave.append(group)
        if wave:
            yield wave

    def _table(self, group: int) -> pa.Table | DataError:
        """Return the rows of a group, from the cache or the shard, or the error that all its images share."""
        with self._reading_lock:
            reading = self._reading[group]
        try:
            with reading:  # who asks meanwhile waits, and does not read it too
                table = self._cache.get(group)
                return self._read_again_if_damaged(group) if table is None else table
        finally:
            with self._reading_lock:
                self._reading.pop(group, None)

    def _read_again_if_damaged(self, group: int) -> pa.Table | DataError:
        """As `_read`. Bytes may be damaged on their way: damage counts once another attempt has found the same."""
        seen: set[str] = set()
        while True:
            found = self._read(group)
            if not isinstance(found, CorruptShard) or str(found) in seen or len(seen) == _MOST_DAMAGES:
                return found
            seen.add(str(found))
            self._footer.cache_clear()  # it may be what is damaged

    def _read(self, group: int) -> pa.Table | DataError:
        (about,) = self._groups.slice(group, 1).to_pylist()
        uri = self._manifest.uri(about["key"])
        columns = (self._config.key_column, self._config.label_column)
        try:
            table = read_row_group(
                uri,
                about["size"],
                about["row_group"],
                image_column=self._config.image_column,
                other_columns=[column for column in columns if column is not None],
                attempts=self._config.fetch_attempts,
                etag=_expected_etag(self._config, about["etag"]),
                metadata=self._footer(uri, about["size"], about["etag"]),
            )
        except tuple(_BAD_IMAGE) as error:
            return error
        if table.num_rows != about["num_rows"]:
            return CorruptShard(f"{about['key']} changed after it was listed")
        self._cache.put(group, table)
        return table

    def _read_footer(self, uri: str, num_bytes: int, etag: str) -> pq.FileMetaData:
        expected = _expected_etag(self._config, etag)
        return read_footer(uri, num_bytes, attempts=self._config.fetch_attempts, etag=expected).metadata

    def _row(self, index: int, group: int, table: pa.Table | DataError) -> Fetched:
        name = self._name(index, group)
        if isinstance(table, DataError):
            return Fetched(name, None, None, _BAD_IMAGE[type(table)], str(table))
        row = index - int(self._ends[group] - self._num_rows[group])
        key, label = (
            table[column][row].as_py() if column is not None else None
            for column in (self._config.key_column, self._config.label_column)
        )
        if not label and "label" in self._groups.column_names:
            label = self._groups["label"][group].as_py()  # the label of the shard's folder
        data = table[self._config.image_column][row].as_py()
        return _whole(name if key is None else key, data, label, self._config.max_object_bytes)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int, group: int) -> str:
        return f"{self._groups['key'][group].as_py()}#{index - int(self._shard_starts[group])}"


_BAD_IMAGE: dict[type[DataError], Status] = {
    MissingObject: Status.MISSING,
    Unreachable: Status.UNREACHABLE,
    ObjectTooLarge: Status.TOO_LARGE,
    ChangedObject: Status.CORRUPT,
    CorruptShard: Status.CORRUPT,
}


def _whole(key: str, data: bytes | None, label: str | None, limit: int) -> Fetched:
    """Return a read image: OK unless it has no bytes or more than `limit` bytes."""
    if not data:
        return Fetched(key, None, label, Status.CORRUPT, "null" if data is None else "0 bytes")
    if len(data) > limit:
        reason = f"{len(data)} bytes, more than data.max_object_bytes={limit}"
        return Fetched(key, None, label, Status.TOO_LARGE, reason)
    return Fetched(key, data, label, Status.OK, "")
