"""A reader of row groups for many askers: reads ahead, and keeps the row groups of the windows in use.

Stands between the source and those who crop (stream/readers.py), who ask for images of any block in any order. No Ray
here.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinoray.models.errors import DinorayError
from dinoray.pipeline.data.order import Window
from dinoray.pipeline.data.reading.fetched import Fetched
from dinoray.pipeline.data.reading.sharing import WindowCache
from dinoray.pipeline.data.reading.source import Source

_AHEAD_BYTES = 64 << 20
"""Bytes of row groups that are read ahead at once."""


class GroupReader:
    """Reads the images of a Parquet source. Thread-safe: of calls that need a row group at once, one reads it."""

    def __init__(self, source: Source, cache_bytes: int) -> None:
        sizes, num_bytes = source.manifest.group_sizes, source.manifest.group_bytes
        assert sizes is not None
        assert num_bytes is not None
        self._cache: WindowCache[Any] = WindowCache(cache_bytes, sizes)
        self._source = source.with_cache(self._cache)
        self._starts, self._bytes = np.cumsum(sizes) - sizes, num_bytes

    def fetch(self, images: Sequence[int]) -> list[Fetched]:
        """As `Source.fetch`."""
        found = self._source.fetch(images)
        self._cache.give(self._source.in_manifest(images))
        return found

    def read_ahead(self, ahead: Window) -> None:
        """Read what is missing of these row groups, unless that was done lately. Raises nothing for the storage."""
        if not self._cache.begin(ahead):
            return
        waiting = deque(ahead.groups.tolist())
        while waiting:
            some, num_bytes = [waiting.popleft()], 0
            while waiting and (num_bytes := num_bytes + int(self._bytes[some[-1]])) < _AHEAD_BYTES:
                some.append(waiting.popleft())
            try:
                self._source.fetch(self._starts[some].tolist())  # one row of each; the others come with it
            except DinorayError:
                return  # who needs the images meets the same error

    def take_cpu_seconds(self) -> float:
        """As `Source.take_cpu_seconds`."""
        return self._source.take_cpu_seconds()
