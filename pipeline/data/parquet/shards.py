"""The Parquet shards of a data set as their footers are read: patiently, and those that cannot be used noted.

Stands between parquet.py and the tables of the manifest. No Ray here.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.data.listing.ignored import some_names
from dinoray.pipeline.data.listing.others import OtherObjects
from dinoray.pipeline.data.parquet.columns import MisfitShard
from dinoray.pipeline.data.parquet.parquet import PartFooter, again_if_damaged, read_footer
from dinoray.pipeline.data.parquet.parquet_faults import UNREADABLE
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.progress import counting
from dinoray.pipeline.storage.retry import Retry
from dinoray.pipeline.storage.waiting import Patient

Result = TypeVar("Result")

_FIRST, _SPREAD = 4, 8
"""Shards of which the first with images shows the columns of all: the first few, then some from all over the list."""


class ShardFiles:
    """Reads footers of `shards`, a table of key, size and etag, and notes what is left out. Thread-safe."""

    def __init__(self, shards: pa.Table, root: str, storage: StorageConfig) -> None:
        self.shards, self.storage = shards, storage
        self._root, self._others = root.rstrip("/"), OtherObjects(shards, root, storage.access)
        self._left_out: dict[str, DinorayError] = {}
        self._candidates: dict[str, PartFooter] = {}

    @property
    def damaged(self) -> list[str]:
        """Return the keys of the shards that cannot be read."""
        return sorted(key for key, error in self._left_out.items() if not isinstance(error, MisfitShard))

    @property
    def misfits(self) -> list[str]:
        """Return the keys of the shards that lack a column of the others."""
        return sorted(key for key, error in self._left_out.items() if isinstance(error, MisfitShard))

    def uri(self, key: str) -> str:
        """Return the address of a shard."""
        return f"{self._root}/{key}"

    def retry(self, key: str) -> Retry:
        """Return the retries of a shard, which wait for the storage."""
        return Patient(self.storage.give_up_after_seconds, others=lambda: self._others.probes(key))

    def footer(self, shard: dict[str, Any]) -> PartFooter | None:
        """Read a footer; None if that shard cannot be read."""
        key = shard["key"]
        if key in self._left_out:
            return None
        if key in self._candidates:
            return self._candidates[key]
        try:
            return again_if_damaged(
                lambda: read_footer(
                    self.uri(key), shard["size"], retry=self.retry(key), access=self.storage.access
                )
            )
        except UNREADABLE as error:
            self.leave_out(key, error)
            return None

    def leave_out(self, key: str, error: DinorayError) -> None:
        """Note a shard that is not used."""
        self._left_out[key] = error

    def candidates(self) -> Iterator[tuple[dict[str, Any], PartFooter]]:
        """Yield some shards that can be read, with their footers, which are read once."""
        number = self.shards.num_rows
        spread = np.linspace(0, number - 1, _SPREAD).astype(int).tolist()
        rows = list(dict.fromkeys([*range(min(_FIRST, number)), *spread]))
        for shard in self.shards.take(rows).to_pylist():
            footer = self.footer(shard)
            if footer is not None:
                self._candidates[shard["key"]] = footer
                yield shard, footer

    def each(
        self,
        work: Callable[[dict[str, Any]], Result],
        *,
        concurrency: int,
        what: str,
        shards: pa.Table | None = None,
    ) -> list[Result]:
        """Return the result of `work` for each shard, `concurrency` at a time; the first error ends it."""
        rows = (self.shards if shards is None else shards).to_pylist()

        def counted(row: dict[str, Any]) -> Result:
            result = work(row)
            count.add(1)
            return result

        with counting(what, "files", len(rows)) as count, ThreadPoolExecutor(concurrency) as pool:
            try:
                return list(pool.map(counted, rows))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def check(self, path: str) -> None:
        """Raise the error of the first shard that is left out, if most are."""
        if len(self._left_out) > self.shards.num_rows / 2:
            raise self.too_many(path)

    def too_many(self, path: str) -> DinorayError:
        """Return the error for a data set most of whose shards cannot be used, with the reason for the first."""
        damaged, misfits = self.damaged, self.misfits
        if len(misfits) >= len(damaged):
            return self._left_out[misfits[0]]
        return DataError(
            f"{len(damaged)} of {self.shards.num_rows} Parquet shards under {path} cannot be read, the first of them: "
            f"{self._left_out[damaged[0]]}"
        )

    def notes(self) -> list[str]:
        """Return a phrase that counts and names the shards without the columns of the others."""
        misfits = self.misfits
        if not misfits:
            return []
        what = "Parquet file" if len(misfits) == 1 else "Parquet files"
        why = self._left_out[misfits[0]]
        return [f"{len(misfits)} {what} with other columns left out: {some_names(misfits)} ({why})"]
