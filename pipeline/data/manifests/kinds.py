"""What the rows of a manifest's table are, for each kind of source; asked wherever kinds differ. No files here.

    images    a row per image, which is an object or file of its own
    parquet   a row per row group, which is read as a whole
    tar       a row per image, which is a member of a tar file; a chunk of neighbours is read as a whole
    mixture   a row per source, whose images stand in a manifest of its own

A row group and a chunk are both a group: the order shuffles groups in windows, and readers read a group at a time.
"""

from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

KindName = Literal["images", "parquet", "tar", "mixture"]


class Kind:
    """Image objects. The other kinds differ in what they override."""

    file = "image"
    """One object of the source, for a person; likewise `group`."""
    group = ""
    texts_once: tuple[str, ...] = ()
    """Text columns with few values in many rows, which are kept as a dictionary."""
    has_columns = False
    """True if each object has columns, named by settings of `data`, of which a label is read with its image."""

    def groups(self, table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return the images and the bytes of each group, both int64 [num_groups]; None if nothing is read in groups."""
        return None

    def objects(self, table: pa.Table) -> pa.Table:
        """Return key, size and ETag (and more) of each object that has images."""
        return table


class _Parquet(Kind):
    file, group = "Parquet file", "row group"
    texts_once = ("key", "etag", "label")  # a million row groups are of far fewer shards
    has_columns = True

    def groups(self, table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        return table["num_rows"].to_numpy(), table["num_bytes"].to_numpy()

    def objects(self, table: pa.Table) -> pa.Table:
        return _once_each(table)


class _Tar(Kind):
    file, group = "tar file", "chunk"
    texts_once = ("key", "etag", "label")

    def groups(self, table: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        firsts = first_of_groups(table)
        sizes = np.diff(np.r_[firsts, table.num_rows])
        offsets, ends = table["offset"].to_numpy(), table["offset"].to_numpy() + table["num_bytes"].to_numpy()
        return sizes, ends[firsts + sizes - 1] - offsets[firsts]

    def objects(self, table: pa.Table) -> pa.Table:
        return _once_each(table)


class _Mixture(Kind):
    file, group = "source", "row group or chunk"


KINDS: dict[KindName, Kind] = {"images": Kind(), "parquet": _Parquet(), "tar": _Tar(), "mixture": _Mixture()}


def first_of_groups(table: pa.Table) -> NDArray[np.int64]:
    """Return the first row of each chunk of tar files: int64 [num_groups]."""
    chunks = table["chunk"].to_numpy()
    return np.flatnonzero(np.r_[True, chunks[1:] != chunks[:-1]][: len(chunks)])


def with_texts_once(table: pa.Table, columns: tuple[str, ...]) -> pa.Table:
    """Return the table with dictionaries for these columns, so that equal texts of neighbouring rows are kept once."""
    for number, column in enumerate(table.schema):
        if column.name in columns and not pa.types.is_dictionary(column.type):
            texts = table.column(number).combine_chunks().dictionary_encode()
            table = table.set_column(number, column.name, texts)
    return table


def plain(table: pa.Table) -> pa.Table:
    """Return the table without dictionaries."""
    for number, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            table = table.set_column(number, column.name, table.column(number).cast(column.type.value_type))
    return table


def _once_each(table: pa.Table) -> pa.Table:
    """Return key, size and ETag of each object, for a table with many rows for each object, one after the other."""
    table = table.select(["key", "size", "etag"])
    if not table.num_rows:
        return plain(table)
    objects = table["key"].combine_chunks().indices.to_numpy()
    return plain(table.filter(np.r_[True, objects[1:] != objects[:-1]]))
