"""Read Parquet shards of images: their footers, and one row group at a time.

Stands between storage and two readers: the manifest (footers, read once) and the source (row groups, on
demand). A shard on S3 is read in ranged GETs through the project's client, so it has the same retries and
errors as any object. Decodes no image; no Ray here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.pipeline.data.parquet.columns import (
    Leaf,
    class_names,
    has_column,
    image_leaf,
    text_leaf,
)
from dinoray.pipeline.data.parquet.parquet_faults import (
    DECRYPT,
    FAULTS,
    CorruptShard,
    UnsupportedShard,
    check_codec,
    unreadable,
)
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.retry import Retry, retrying
from dinoray.pipeline.storage.s3 import ObjectFile

Result = TypeVar("Result")

_END_BYTES = 8
"""At the end of a shard: the length of the footer, and four letters."""
_SIGNATURE_BYTES = 28
"""That follow a footer which is not encrypted itself, in files with encrypted columns."""
_MOST_DAMAGES = 4
"""Kinds of damage to the same bytes after which they are given up."""


class RowGroup(NamedTuple):
    """One row group, from the footer; `num_bytes` is the uncompressed size of the wanted columns."""

    row_group: int
    num_rows: int
    num_bytes: int


class PartFooter(NamedTuple):
    """The footer of one shard: its columns, and its row groups with sizes and statistics."""

    uri: str
    schema: pa.Schema
    metadata: pq.FileMetaData


def read_footer(
    uri: str,
    num_bytes: int,
    *,
    retry: Retry = retrying,
    etag: str | None = None,
    access: Access = SIGNED,
) -> PartFooter:
    """Read the footer of one shard: one ranged GET on S3. Raises CorruptShard if it is not a Parquet file."""

    def read() -> PartFooter:
        with open_shard(uri, num_bytes, retry, access, etag) as file:
            metadata = footer_of(file, uri)
            schema = metadata.schema.to_arrow_schema()
            schema.names  # noqa: B018 (raises if a name is not UTF-8)
            return PartFooter(uri, schema, metadata)

    return retried(read, uri, retry)


def row_groups(footer: PartFooter, *, image_column: str, other_columns: Sequence[str]) -> list[RowGroup]:
    """Return the row groups of one shard that hold rows.

    Raises MisfitShard if `image_column` is missing or holds no bytes, or another column is nested or there twice; a
    missing one is null. UnsupportedShard if a column is compressed in a way that pyarrow here cannot read.
    """
    uri, schema, metadata = footer
    leaves = [image_leaf(schema, image_column, uri), *text_leaves(schema, other_columns, uri).values()]
    groups = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = chunks_of(group, leaves)
        for chunk in chunks:
            check_codec(uri, chunk.compression)
        if group.num_rows:
            groups.append(RowGroup(index, group.num_rows, sum(map(_plain_bytes, chunks))))
    return groups


def text_leaves(schema: pa.Schema, columns: Sequence[str], uri: str) -> dict[str, Leaf]:
    """Return the leaves of those columns that a shard has. Raises MisfitShard if one holds no text."""
    return {column: text_leaf(schema, column, uri) for column in columns if has_column(schema, column)}


def chunks_of(group: pq.RowGroupMetaData, leaves: Sequence[Leaf]) -> list[pq.ColumnChunkMetaData]:
    """Return what a footer says of these leaves in a row group. Raises CorruptShard if its names are no text."""
    wanted = {leaf.name for leaf in leaves}
    chunks = (group.column(number) for number in range(group.num_columns))
    try:
        return [chunk for chunk in chunks if chunk.path_in_schema in wanted]
    except UnicodeDecodeError as error:
        raise CorruptShard(
            f"a footer has no readable names of columns: {error}; write the file again"
        ) from error


def _plain_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    """Return the bytes of a column in a row group; some writers note only those of the file."""
    return max(0, chunk.total_uncompressed_size, chunk.total_compressed_size)


class ColumnFacts(NamedTuple):
    """Statistics of a column in one row group: its least and greatest value, and its number of nulls."""

    ends: frozenset[Any] | None
    """None if the values are unknown."""
    num_nulls: int | None
    """None if the number is unknown."""


def column_facts(footer: PartFooter, group: int, column: str) -> ColumnFacts:
    """Return the statistics of a column that is not nested."""
    uri, schema, metadata = footer[0], footer[1], footer[2].row_group(group)
    if not has_column(schema, column):
        return ColumnFacts(frozenset(), metadata.num_rows)
    for chunk in chunks_of(metadata, [text_leaf(schema, column, uri)]):
        found = chunk.statistics
        if found is None:
            continue
        num_nulls = found.null_count if found.has_null_count else None
        if num_nulls == metadata.num_rows:
            return ColumnFacts(frozenset(), num_nulls)
        try:
            ends = frozenset((found.min, found.max)) if found.has_min_max else None
        except UnicodeDecodeError:  # some writers cut texts within a letter
            ends = None
        if class_names(schema, column) is None or ends is None:
            return ColumnFacts(ends, num_nulls)
        # A negative number of a class is written for no label.
        if found.max < 0:
            return ColumnFacts(frozenset(), metadata.num_rows)
        return ColumnFacts(ends, None if found.min < 0 else num_nulls)
    return ColumnFacts(None, None)


def again_if_damaged(read: Callable[[], Result], *, forget: Callable[[], object] = lambda: None) -> Result:
    """Return `read()`. Bytes may be damaged on their way: CorruptShard counts once another attempt has found the same.

    `forget` is called before another attempt.
    """
    seen: set[str] = set()
    while True:
        try:
            return read()
        except CorruptShard as error:
            if isinstance(error, UnsupportedShard) or str(error) in seen or len(seen) == _MOST_DAMAGES:
                raise
            seen.add(str(error))
            forget()


def retried(read: Callable[[], Result], uri: str, retry: Retry) -> Result:
    """Call `read`, with `retry` if that is a file's: requests to S3 have it in ObjectFile."""
    return read() if is_s3(uri) else retry(read, what=uri)


class _ShardOnS3(ObjectFile):
    """An object that remembers its end, which is read with the footer."""

    end = b""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        if self.tell() == self._num_bytes:
            self.end = data[-_END_BYTES:]
        return data


def footer_of(file: Any, uri: str) -> pq.FileMetaData:
    """Read the footer of an open shard. Raises UnsupportedShard where asking for columns would end the process."""
    metadata = parquet_file(file).metadata
    if isinstance(file, _ShardOnS3):
        end = file.end
    else:
        file.seek(file.size() - _END_BYTES)
        end = file.read(_END_BYTES)
    if int.from_bytes(end[:4], "little") - metadata.serialized_size == _SIGNATURE_BYTES:
        raise UnsupportedShard(f"{uri} is encrypted; {DECRYPT}")
    return metadata


def parquet_file(file: Any, metadata: pq.FileMetaData | None = None, **options: Any) -> pq.ParquetFile:
    """Open a file whose pages are checked as they are read; with `metadata`, its footer is not read."""
    return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, **options)


@contextmanager
def open_shard(
    uri: str, num_bytes: int, retry: Retry, access: Access, etag: str | None = None
) -> Iterator[Any]:
    """Open a shard for reading. Errors within the block are raised as what they say of the shard, or of its storage."""
    file = None
    try:
        if is_s3(uri):
            file = _ShardOnS3(*split_s3_uri(uri), num_bytes, retry=retry, etag=etag, access=access)
        else:
            file = pa.OSFile(uri)
        with file:
            try:
                yield file
            except FAULTS as error:
                raise unreadable(uri, file, error) from error
    except FAULTS as error:
        raise unreadable(uri, file, error) from error
