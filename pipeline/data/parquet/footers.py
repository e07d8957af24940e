"""The footers of shards, kept compressed: as objects, those of a thousand shards would take 100 MB of each actor."""

from collections.abc import Callable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.pipeline.data.recently_used import RecentlyUsed

_CODEC = "zstd"


class _Compressed(NamedTuple):
    data: bytes
    num_bytes: int
    """Bytes before compression."""

    @property
    def nbytes(self) -> int:
        return len(self.data)


class FooterCache:
    """Keeps the footers used last, up to `max_bytes` of them compressed. Thread-safe: of calls that need a footer at
    once, one reads it."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: RecentlyUsed[str, _Compressed] = RecentlyUsed(max_bytes)

    def get(self, key: str, read: Callable[[], pq.FileMetaData]) -> pq.FileMetaData:
        """Return the footer of the shard `key`, from `read()` if it is not kept."""
        kept = self._kept.get_or_read(key, lambda: _compressed(read()))
        return pq.read_metadata(pa.BufferReader(pa.decompress(kept.data, kept.num_bytes, codec=_CODEC)))

    def forget(self, key: str) -> None:
        """Drop the footer of a shard."""
        self._kept.forget(key)


def _compressed(metadata: pq.FileMetaData) -> _Compressed:
    file = pa.BufferOutputStream()
    metadata.write_metadata_file(file)
    plain = file.getvalue()
    return _Compressed(pa.compress(plain, codec=_CODEC, asbytes=True), plain.size)
