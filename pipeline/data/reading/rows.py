"""Images that are rows of Parquet shards: whole row groups are read, in one request each, and the latest are kept."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.parquet.footers import FooterCache
from dinoray.pipeline.data.parquet.parquet import again_if_damaged, read_footer
from dinoray.pipeline.data.parquet.parquet_faults import CorruptShard
from dinoray.pipeline.data.parquet.parquet_rows import read_row_group
from dinoray.pipeline.data.parquet.spill import most_in_memory
from dinoray.pipeline.data.reading.fetched import BAD_IMAGE, Fetched, expected_etag, whole
from dinoray.pipeline.data.reading.image_reader import Begin, Read, read_groups
from dinoray.pipeline.data.recently_used import RecentlyUsed
from dinoray.pipeline.storage.addresses import is_s3
from dinoray.pipeline.storage.checks import NO_PAGE_CHECKSUMS, UNCHECKED
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.retry import LIST_AGAIN

_FOOTER_BYTES = 64 << 20
"""Bytes of footers that each process keeps, compressed: those of some 10,000 packed shards."""


class Rows:
    """One image per row of Parquet shards. Whole row groups are read and the latest are cached."""

    def __init__(self, config: DataConfig, manifest: Manifest, read: Read, access: Access = SIGNED) -> None:
        self._config, self._manifest, self._waiting, self._access = config, manifest, read, access
        # Arrays, not Python objects: there may be a million row groups, in each of many actors.
        self._groups = manifest.table.combine_chunks()
        self._num_rows, self._num_bytes = (
            self._groups[name].to_numpy() for name in ("num_rows", "num_bytes")
        )
        self._ends = np.cumsum(self._num_rows)
        self.num_images = int(self._ends[-1])
        shards = self._groups["key"].chunk(0).indices.to_numpy()
        first_of_shard = np.r_[True, shards[1:] != shards[:-1]]
        starts = self._ends - self._num_rows
        self._shard_starts = np.maximum.accumulate(np.where(first_of_shard, starts, 0))
        self.cache: RecentlyUsed[int, pa.Table] = RecentlyUsed(config.row_group_cache_bytes)
        self._footers = FooterCache(_FOOTER_BYTES)

    def key(self, index: int) -> str:
        return self._name(index, self._group_of(index))

    def arrivals(self, indices: Sequence[int], begin: Begin) -> Iterator[tuple[int, Fetched]]:
        return read_groups(
            [self._group_of(index) for index in indices],
            begin,
            cache=self.cache,
            num_bytes=lambda groups: self._num_bytes[groups].tolist(),
            read=self._whole,
            image=lambda place, group, table: self._row(indices[place], group, table),
        )

    def _whole(self, group: int) -> pa.Table:
        about = self._manifest.row_group(group)
        return again_if_damaged(lambda: self._read(about), forget=lambda: self._footers.forget(about["key"]))

    def _read(self, about: dict[str, Any]) -> pa.Table:
        uri, etag = self._manifest.uri(about["key"]), expected_etag(self._config, about["etag"])
        columns = (self._config.key_column, self._config.label_column)
        metadata = self._footers.get(
            about["key"],
            lambda: self._waiting(
                about["key"],
                lambda retry: (
                    read_footer(uri, about["size"], retry=retry, etag=etag, access=self._access).metadata
                ),
            ),
        )
        table = self._waiting(
            about["key"],
            lambda retry: read_row_group(
                uri,
                about["size"],
                about["row_group"],
                image_column=self._config.image_column,
                other_columns=[column for column in columns if column is not None],
                retry=retry,
                etag=etag,
                metadata=metadata,
                access=self._access,
                max_bytes=most_in_memory(self._config.row_group_cache_bytes),
            ),
        )
        if self._manifest.rows_per_group is None and is_s3(uri):
            UNCHECKED.add(uri, NO_PAGE_CHECKSUMS)
        if table.num_rows != about["num_rows"]:
            raise CorruptShard(f"{about['key']} changed after it was listed; {LIST_AGAIN}")
        return table

    def _row(self, index: int, group: int, table: pa.Table | DataError) -> Fetched:
        name = self._name(index, group)
        if isinstance(table, DataError):
            return Fetched(name, None, None, BAD_IMAGE[type(table)], str(table))
        row = index - int(self._ends[group] - self._num_rows[group])
        key, label = (
            table[column][row].as_py() if column is not None else None
            for column in (self._config.key_column, self._config.label_column)
        )
        if not label and "label" in self._groups.column_names:
            label = self._groups["label"][group].as_py()  # the label of the shard's folder
        data = table[self._config.image_column][row].as_py()
        return whole(name if key is None else key, data, label, self._config.max_object_bytes)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int, group: int) -> str:
        return f"{self._groups['key'][group].as_py()}#{index - int(self._shard_starts[group])}"
