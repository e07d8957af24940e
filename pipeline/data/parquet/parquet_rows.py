"""Read rows of Parquet shards, a row group at a time: images as bytes, other columns as text.

Stands between parquet.py, which opens shards, and the source. Decodes no image; no Ray here.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.pipeline.data.parquet.columns import Leaf, MisfitShard, as_text, class_names, image_leaf
from dinoray.pipeline.data.parquet.parquet import (
    PartFooter,
    chunks_of,
    footer_of,
    open_shard,
    parquet_file,
    retried,
    text_leaves,
)
from dinoray.pipeline.data.parquet.parquet_faults import CorruptShard
from dinoray.pipeline.data.parquet.spill import collect
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.retry import LIST_AGAIN, Retry, retrying

Result = TypeVar("Result")

_BATCH_ROWS, _TEXT_ROWS = 64, 16_384
"""Rows that are decoded at once, of images and of texts: a dictionary of a few may stand for millions of rows."""
_MOST_BYTES = 1 << 40
_SMALL_BYTES = 64 << 10
"""Bytes per row by the footer, below which a dictionary may stand for more."""
_BUFFER_BYTES = 16 << 20
"""Bytes of each request for a row group that is too large for memory."""


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
        with open_shard(uri, num_bytes, retry, access, etag) as file:
            footer = metadata or footer_of(file, uri)
            schema = footer.schema.to_arrow_schema()
            image = _of_listed(lambda: image_leaf(schema, image_column, uri))
            texts = _of_listed(lambda: text_leaves(schema, other_columns, uri))
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

    return retried(read, uri, retry)


def read_column(
    uri: str, num_bytes: int, group: int, *, column: str, retry: Retry = retrying, access: Access = SIGNED
) -> list[str | None]:
    """Read one column of one row group as text, null if there is none; raises as `read_row_group`."""
    texts: list[str | None] = read_texts(uri, num_bytes, [column], group=group, retry=retry, access=access)[
        column
    ].to_pylist()
    return texts


def read_texts(
    uri: str,
    num_bytes: int,
    columns: Sequence[str],
    *,
    group: int | None = None,
    retry: Retry = retrying,
    access: Access = SIGNED,
) -> pa.Table:
    """Read columns of a row group, or of all, as text, null where there is none; raises as `read_row_group`."""

    def read() -> pa.Table:
        with open_shard(uri, num_bytes, retry, access) as file:
            footer = footer_of(file, uri)
            schema = footer.schema.to_arrow_schema()
            leaves = _of_listed(lambda: text_leaves(schema, columns, uri))
            names = {column: class_names(schema, column) for column in columns}
            groups = range(footer.num_row_groups) if group is None else [group]
            if not leaves:
                return _nulls(columns, sum(footer.row_group(number).num_rows for number in groups))
            parts = [_nulls(columns, 0)]
            for number in groups:
                for batch in _batches(file, footer, number, [*leaves.values()], _MOST_BYTES, _TEXT_ROWS):
                    texts = _nulls(columns, batch.num_rows)
                    for place, column in enumerate(columns):
                        if column in leaves:
                            text = as_text(leaves[column].of(batch), names[column])
                            texts = texts.set_column(place, column, text)
                    parts.append(texts)
            return pa.concat_tables(parts)

    return retried(read, uri, retry)


def _nulls(columns: Sequence[str], num_rows: int) -> pa.Table:
    return pa.table({column: pa.nulls(num_rows, pa.string()) for column in columns})


def first_bytes(
    footer: PartFooter, num_bytes: int, column: str, *, retry: Retry, access: Access
) -> bytes | None:
    """Read the first value that is not empty, of the first row group with rows, of a column of bytes."""

    def read(batches: Iterator[pa.Array]) -> bytes | None:
        values = (value.as_py() for batch in batches for value in batch)
        return next((value for value in values if value), None)

    return _first(read, footer, num_bytes, column, retry, access)


def growth(footer: PartFooter, num_bytes: int, column: str, *, retry: Retry, access: Access) -> float:
    """Return how many times as large as its footer says a column of bytes is in memory, by its first rows; or 1.

    A footer counts each image of a dictionary once. Reads rows only where they may be small for that reason.
    """
    leaf = image_leaf(footer.schema, column, footer.uri)
    groups = (footer.metadata.row_group(number) for number in range(footer.metadata.num_row_groups))
    group = next((group for group in groups if group.num_rows), None)
    chunks = [] if group is None else chunks_of(group, [leaf])
    noted = sum(chunk.total_uncompressed_size for chunk in chunks) / (group.num_rows if group else 1)
    if noted > _SMALL_BYTES or not any("DICTIONARY" in name for chunk in chunks for name in chunk.encodings):
        return 1.0

    def read(batches: Iterator[pa.Array]) -> float:
        found = [len(value or b"") for batch in islice(batches, 1) for value in batch.to_pylist()]
        return sum(found) / max(1, len(found)) / max(1.0, noted)

    return max(1.0, _first(read, footer, num_bytes, column, retry, access) or 1.0)


def _first(
    read: Callable[[Iterator[pa.Array]], Result],
    footer: PartFooter,
    num_bytes: int,
    column: str,
    retry: Retry,
    access: Access,
) -> Result | None:
    """Return `read` of the values of the first row group with rows, some at a time; None if there is none."""
    uri, schema, metadata = footer
    leaf = image_leaf(schema, column, uri)
    numbers = range(metadata.num_row_groups)
    first = next((number for number in numbers if metadata.row_group(number).num_rows), None)
    if first is None:
        return None

    def opened() -> Result:
        with open_shard(uri, num_bytes, retry, access) as file:
            return read(leaf.of(batch) for batch in _batches(file, metadata, first, [leaf], 0))

    return retried(opened, uri, retry)


def _of_listed(find: Callable[[], Result]) -> Result:
    """Return `find()`; what does not fit was other when the shard was listed."""
    try:
        return find()
    except MisfitShard as refusal:
        raise CorruptShard(str(refusal)) from refusal


def _batches(
    file: Any,
    footer: pq.FileMetaData,
    group: int,
    leaves: Sequence[Leaf],
    max_bytes: int,
    num_rows: int = _BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Yield some rows of the row group at a time; what is larger than `max_bytes` is requested as it is needed."""
    if group >= footer.num_row_groups:
        raise CorruptShard(f"row group {group} is gone, the file has {footer.num_row_groups}; {LIST_AGAIN}")
    chunks = chunks_of(footer.row_group(group), leaves)
    is_small = sum(chunk.total_compressed_size for chunk in chunks) <= max_bytes
    # pre_buffer joins the column chunks of a row group into few large reads.
    shard = parquet_file(file, footer, pre_buffer=is_small, buffer_size=0 if is_small else _BUFFER_BYTES)
    names = [leaf.name for leaf in leaves]
    yield from shard.iter_batches(num_rows, row_groups=[group], columns=names, use_threads=False)
