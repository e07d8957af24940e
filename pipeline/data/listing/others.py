"""Other objects of a data set, one byte of which shows whether the store answers at all. No images and no Ray here."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.s3 import probe_object

_SPREAD = 8


class OtherObjects:
    """Objects, files or shards to compare one of them with: `table` has their key and size, relative to `root`."""

    def __init__(self, table: pa.Table, root: str, access: Access = SIGNED) -> None:
        self._table, self._root, self._access = table, root.rstrip("/"), access
        self._last_read: str | None = None

    def was_read(self, key: str) -> None:
        """Remember an object that has been read: it is the likeliest to be readable."""
        self._last_read = key

    def probes(self, key: str) -> Iterator[Callable[[], object]]:
        """Yield probes of other objects than `key`: the last that was read, then some from all over the list."""
        table = self._table
        rows = np.unique(np.linspace(0, table.num_rows - 1, _SPREAD).astype(int))
        spread = [
            row["key"] for row in table.select(["key", "size"]).take(rows).to_pylist() if row["size"] != 0
        ]
        last = [] if self._last_read is None else [self._last_read]
        for other in dict.fromkeys([*last, *spread]):
            if other != key:
                yield partial(_probe, f"{self._root}/{other}", self._access)


def _probe(uri: str, access: Access) -> None:
    if is_s3(uri):
        probe_object(*split_s3_uri(uri), access)
    else:
        with open(uri, "rb") as file:
            file.read(1)
