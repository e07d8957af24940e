"""How far a large data set is looked into, where a person waits: a listing of some seconds, a few files of many images.

`build_manifest` takes a Bound and then returns the manifest of a part of the data. No storage and no Ray here.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa


class Bound:
    """Limits of one look, and afterwards how much of the data it has seen."""

    def __init__(
        self, *, seconds: float = 5.0, files: int = 8, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """A listing ends after `seconds`; `files` files of many images each, such as Parquet, are looked into."""
        self._seconds, self._files, self._clock = seconds, files, clock
        self.is_listed_whole = True
        self.num_listed = 0
        self.last_key = ""
        """The key at which the listing ended."""
        self.share_of_files = 1.0
        """Bytes of the files that are looked into, of all that were listed."""

    def cut(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield record batches with a column `key` until the time is over."""
        end = self._clock() + self._seconds
        for batch in batches:
            self.num_listed += batch.num_rows
            if batch.num_rows:
                self.last_key = batch["key"][-1].as_py()
            yield batch
            if self._clock() > end:
                self.is_listed_whole = False
                close = getattr(batches, "close", None)
                if close is not None:
                    close()  # ends the requests that are under way
                return

    def some(self, files: pa.Table) -> pa.Table:
        """Return some rows, evenly spread, of a table of files with a column `size`."""
        if files.num_rows <= self._files:
            return files
        chosen = files.take(np.linspace(0, files.num_rows - 1, self._files).astype(np.int64))
        sizes, all_sizes = chosen["size"].to_numpy().sum(), files["size"].to_numpy().sum()
        self.share_of_files = float(sizes / all_sizes) if all_sizes else self._files / files.num_rows
        return chosen
