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

from dinoray.pipeline.data.columns import (
    Leaf,
    MisfitShard,
    as_text,
    class_names,
    has_column,
    image_leaf,
    text_leaf,
)
from dinoray.pipeline.data.parquet_faults import (
    FAULTS,
    CorruptShard,
    UnsupportedShard,
    check_codec,
    unreadable,
)
from dinoray.pipeline.data.spill import collect
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.retry import LIST_AGAIN, Retry, retrying
from dinoray.pipeline.storage.s3 import ObjectFile

__all__ = ["CorruptShard", "UnsupportedShard"]

Result = TypeVar("Result")

_MOST_DAMAGES = 4
"""Kinds of damage to the same bytes after which they are given up."""
_BATCH_ROWS = 64
"""Rows that are decoded at once: a dictionary of a few images may stand for millions of rows."""
_MOST_BYTES = 1 << 40
_BUFFER_BYTES = 16 << 20
"""Bytes of each request for a row group that is too large for memory."""


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
        with _open_shard(uri, num_bytes, retry, access, etag) as file:
            shard = _parquet(file)
            shard.schema_arrow.names  # noqa: B018 (raises if a name is not UTF-8)
            return PartFooter(uri, shard.schema_arrow, shard.metadata)

    return _retried(read, uri, retry)


def row_groups(footer: PartFooter, *, image_column: str, other_columns: Sequence[str]) -> list[RowGroup]:
    """Return the row groups of one shard that hold rows.

    Raises MisfitShard if `image_column` is missing or holds no bytes, or another column is nested or there twice; a
    missing one is null. UnsupportedShard if a column is compressed in a way that pyarrow here cannot read.
    """
    uri, schema, metadata = footer
    leaves = [image_leaf(schema, image_column, uri), *_text_leaves(schema, other_columns, uri).values()]
    groups = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = _chunks(group, leaves)
        for chunk in chunks:
            check_codec(uri, chunk.compression)
        if group.num_rows:
            groups.append(RowGroup(index, group.num_rows, sum(map(_plain_bytes, chunks))))
    return groups


def _text_leaves(schema: pa.Schema, columns: Sequence[str], uri: str) -> dict[str, Leaf]:
    return {column: text_leaf(schema, column, uri) for column in columns if has_column(schema, column)}


def _chunks(group: pq.RowGroupMetaData, leaves: Sequence[Leaf]) -> list[pq.ColumnChunkMetaData]:
    wanted = {leaf.name for leaf in leaves}
    chunks = (group.column(number) for number in range(group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema in wanted]


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
    for chunk in _chunks(metadata, [text_leaf(schema, column, uri)]):
        found = chunk.statistics
        if found is None:
            continue
        num_nulls = found.null_count if found.has_null_count else None
        if num_nulls == metadata.num_rows:
            return ColumnFacts(frozenset(), num_nulls)
        ends = frozenset((found.min, found.max)) if found.has_min_max else None
        if class_names(schema, column) is None or ends is None:
            return ColumnFacts(ends, num_nulls)
        # A negative number of a class is written for no label.
        if found.max < 0:
            return ColumnFacts(frozenset(), metadata.num_rows)
        return ColumnFacts(ends, None if found.min < 0 else num_nulls)
    return ColumnFacts(None, None)


def read_row_group(
    uri: str,
    num_bytes: int,
    group: int,
    *,
    image_column: str,
    other_columns: Sequence[str],
    retry: Retry = retrying,
    etag: str | None = None,
    metadata: pq.FileMetaData | None = None,
    access: Access = SIGNED,
    max_bytes: int = _MOST_BYTES,
) -> pa.Table:
    """Read columns of one row group: `image_column` as plain binary of any kind, the others as text.

    With `metadata` from the shard's footer, the footer is not read again. An object on S3 must have the ETag
    `etag`, if one is given. Rows of more than `max_bytes` are kept in a temporary file. Raises the errors of `retry`
    from the store, CorruptShard if the bytes cannot be parsed, and ResourceError if there is no room for them.
    """

    def read() -> pa.Table:
        with _open_shard(uri, num_bytes, retry, access, etag) as file:
            footer = metadata or _parquet(file).metadata
            schema = footer.schema.to_arrow_schema()
            image = _of_listed(lambda: image_leaf(schema, image_column, uri))
            texts = _of_listed(lambda: _text_leaves(schema, other_columns, uri))
            names = {column: class_names(schema, column) for column in other_columns}

            def converted(batch: pa.RecordBatch) -> pa.RecordBatch:
                columns = {image_column: image.of(batch)}
                for column in other_columns:
                    leaf = texts.get(column)
                    nothing = pa.nulls(batch.num_rows, pa.string())
                    columns[column] = as_text(leaf.of(batch), names[column]) if leaf else nothing
                return pa.RecordBatch.from_pydict(columns)

            batches = _batches(file, footer, group, [image, *texts.values()], max_bytes)
            return collect(map(converted, batches), max_bytes=max_bytes, what=uri)

    return _retried(read, uri, retry)


def read_column(
    uri: str,
    num_bytes: int,
    group: int,
    *,
    column: str,
    retry: Retry = retrying,
    access: Access = SIGNED,
) -> list[str | None]:
    """Read one column of one row group as text, null if there is none; raises as `read_row_group`."""

    def read() -> list[str | None]:
        with _open_shard(uri, num_bytes, retry, access) as file:
            footer = _parquet(file).metadata
            schema = footer.schema.to_arrow_schema()
            if not has_column(schema, column):
                return [None] * footer.row_group(group).num_rows
            leaf, names = _of_listed(lambda: text_leaf(schema, column, uri)), class_names(schema, column)
            batches = _batches(file, footer, group, [leaf], _MOST_BYTES)
            return [text for batch in batches for text in as_text(leaf.of(batch), names).to_pylist()]

    return _retried(read, uri, retry)


def first_bytes(
    footer: PartFooter, num_bytes: int, column: str, *, retry: Retry, access: Access
) -> bytes | None:
    """Read the first value that is not empty, of the first row group with rows, of a column of bytes."""

    def read() -> bytes | None:
        uri, schema, metadata = footer
        leaf = image_leaf(schema, column, uri)
        numbers = range(metadata.num_row_groups)
        first = next((number for number in numbers if metadata.row_group(number).num_rows), None)
        if first is None:
            return None
        with _open_shard(uri, num_bytes, retry, access) as file:
            batches = _batches(file, metadata, first, [leaf], 0)
            values = (value.as_py() for batch in batches for value in leaf.of(batch))
            return next((value for value in values if value), None)

    return _retried(read, footer.uri, retry)


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


def _retried(read: Callable[[], Result], uri: str, retry: Retry) -> Result:
    """Call `read`, with `retry` if that is a file's: requests to S3 have it in ObjectFile."""
    return read() if is_s3(uri) else retry(read, what=uri)


def _of_listed(find: Callable[[], Result]) -> Result:
    """Return `find()`; what does not fit was other when the shard was listed."""
    try:
        return find()
    except MisfitShard as error:
        raise CorruptShard(str(error)) from error


def _batches(
    file: Any, footer: pq.FileMetaData, group: int, leaves: Sequence[Leaf], max_bytes: int
) -> Iterator[pa.RecordBatch]:
    """Yield some rows of the row group at a time; what is larger than `max_bytes` is requested as it is needed."""
    if group >= footer.num_row_groups:
        raise CorruptShard(f"row group {group} is gone, the file has {footer.num_row_groups}; {LIST_AGAIN}")
    chunks = _chunks(footer.row_group(group), leaves)
    is_small = sum(chunk.total_compressed_size for chunk in chunks) <= max_bytes
    # pre_buffer joins the column chunks of a row group into few large reads.
    shard = _parquet(file, footer, pre_buffer=is_small, buffer_size=0 if is_small else _BUFFER_BYTES)
    names = [leaf.name for leaf in leaves]
    yield from shard.iter_batches(_BATCH_ROWS, row_groups=[group], columns=names, use_threads=False)


def _parquet(file: Any, metadata: pq.FileMetaData | None = None, **options: Any) -> pq.ParquetFile:
    return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, **options)


@contextmanager
def _open_shard(
    uri: str, num_bytes: int, retry: Retry, access: Access, etag: str | None = None
) -> Iterator[Any]:
    file = None
    try:
        if is_s3(uri):
            file = ObjectFile(*split_s3_uri(uri), num_bytes, retry=retry, etag=etag, access=access)
        else:
            file = pa.OSFile(uri)
        with file:
            try:
                yield file
            except FAULTS as error:
                raise unreadable(uri, file, error) from error
    except FAULTS as error:
        raise unreadable(uri, file, error) from error
