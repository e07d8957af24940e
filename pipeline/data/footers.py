"""The footers of shards, kept compressed: as objects, those of a thousand shards would take 100 MB of each actor."""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

_CODEC = "zstd"


class FooterCache:
    """Keeps the footers used last, up to `max_bytes` of them compressed. Thread-safe: of calls that need a footer at
    once, one reads it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[str, tuple[bytes, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._reading: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def get(self, key: str, read: Callable[[], pq.FileMetaData]) -> pq.FileMetaData:
        """Return the footer of the shard `key`, from `read()` if it is not kept."""
        with self._lock:
            reading = self._reading[key]
        with reading:
            with self._lock:
                kept = self._kept.get(key)
                if kept is not None:
                    self._kept.move_to_end(key)
            if kept is not None:
                compressed, length = kept
                return pq.read_metadata(pa.BufferReader(pa.decompress(compressed, length, codec=_CODEC)))
            metadata = read()
            self._keep(key, metadata)
            return metadata

    def forget(self, key: str) -> None:
        """Drop the footer of a shard."""
        with self._lock:
            compressed, _ = self._kept.pop(key, (b"", 0))
            self._num_bytes -= len(compressed)

    def _keep(self, key: str, metadata: pq.FileMetaData) -> None:
        file = pa.BufferOutputStream()
        metadata.write_metadata_file(file)
        plain = file.getvalue()
        compressed = pa.compress(plain, codec=_CODEC, asbytes=True)
        with self._lock:
            self._kept[key] = compressed, plain.size
            self._num_bytes += len(compressed)
            while self._num_bytes > self._max_bytes and len(self._kept) > 1:
                _, (dropped, _) = self._kept.popitem(last=False)
                self._num_bytes -= len(dropped)
