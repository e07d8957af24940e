"""Read Parquet shards of images: their footers, and one row group at a time.

Stands between storage and two readers: the manifest (footers, read once) and the source (row groups, on
demand). A shard on S3 is read in ranged GETs through the project's client, so it has the same retries and
errors as any object. Decodes no image; no Ray here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.detection import is_bytes
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.retry import LIST_AGAIN, DeniedObject, MissingObject, Retry, may_pass, retrying
from dinoray.pipeline.storage.s3 import ObjectFile

Result = TypeVar("Result")

_MOST_DAMAGES = 4
"""Kinds of damage to the same bytes after which they are given up."""


class RowGroup(NamedTuple):
    """One row group, from the footer; `num_bytes` is the uncompressed size of the wanted columns."""

    row_group: int
    num_rows: int
    num_bytes: int


class CorruptShard(DataError):  # noqa: N818
    """The object is not Parquet, or no longer matches its footer."""


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
        with _open_shard(uri, num_bytes, retry, access, etag) as shard:
            return PartFooter(uri, shard.schema_arrow, shard.metadata)

    return _retried(read, uri, retry)


def row_groups(footer: PartFooter, *, image_column: str, other_columns: Sequence[str]) -> list[RowGroup]:
    """Return the row groups of one shard that hold rows.

    Raises ConfigError if a column is missing or `image_column` holds no bytes. The message has the shard, the
    column and the existing columns or types.
    """
    uri, schema, metadata = footer
    for column in (image_column, *other_columns):
        if column not in schema.names:
            raise ConfigError(
                f"{uri} has no column {column!r}; it has {', '.join(map(repr, schema.names)) or 'none'}; "
                "set data.image_column, data.key_column and data.label_column to names among these"
            )
    if not is_bytes(schema.field(image_column).type):
        raise ConfigError(
            f"data.image_column={image_column!r} of {uri} holds {schema.field(image_column).type}; "
            "it must hold the encoded image as binary, or as a struct with a binary field 'bytes'; set "
            "data.image_column to such a column"
        )
    for column in other_columns:
        if pa.types.is_nested(schema.field(column).type):
            raise ConfigError(
                f"column {column!r} of {uri} holds {schema.field(column).type}, but a key or label is one value; "
                "set data.key_column and data.label_column to other columns, or to null"
            )
    wanted = {image_column, *other_columns}
    groups = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = [group.column(c) for c in range(group.num_columns)]
        sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in wanted]
        if group.num_rows:
            groups.append(RowGroup(index, group.num_rows, sum(sizes)))
    return groups


class ColumnFacts(NamedTuple):
    """Statistics of a column in one row group: its least and greatest value, and its number of nulls."""

    ends: frozenset[Any] | None
    """None if the values are unknown."""
    num_nulls: int | None
    """None if the number is unknown."""


def column_facts(footer: PartFooter, group: int, column: str) -> ColumnFacts:
    """Return the statistics of a column that is not nested."""
    metadata = footer.metadata.row_group(group)
    for number in range(metadata.num_columns):
        chunk = metadata.column(number)
        if chunk.path_in_schema != column or (found := chunk.statistics) is None:
            continue
        num_nulls = found.null_count if found.has_null_count else None
        if num_nulls == metadata.num_rows:
            return ColumnFacts(frozenset(), num_nulls)
        return ColumnFacts(frozenset((found.min, found.max)) if found.has_min_max else None, num_nulls)
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
) -> pa.Table:
    """Read columns of one row group: `image_column` as plain (large) binary, the others as text.

    With `metadata` from the shard's footer, the footer is not read again. An object on S3 must have the ETag
    `etag`, if one is given. Raises the errors of `retry` from the store, and CorruptShard if the bytes cannot
    be parsed.
    """

    def read() -> pa.Table:
        with _open_shard(uri, num_bytes, retry, access, etag, metadata) as shard:
            table = shard.read_row_group(group, columns=[image_column, *other_columns], use_threads=False)
            images = table[image_column]
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            texts = {column: table[column].cast(pa.string()) for column in other_columns}
            return pa.table({image_column: images, **texts})

    return _retried(read, uri, retry)


def read_column(
    uri: str, num_bytes: int, group: int, *, column: str, retry: Retry = retrying, access: Access = SIGNED
) -> list[str | None]:
    """Read one column of one row group as text; raises as `read_row_group`."""

    def read() -> list[str | None]:
        with _open_shard(uri, num_bytes, retry, access) as shard:
            table = shard.read_row_group(group, columns=[column], use_threads=False)
            texts: list[str | None] = table[column].cast(pa.string()).to_pylist()
            return texts

    return _retried(read, uri, retry)


def again_if_damaged(read: Callable[[], Result], *, forget: Callable[[], object] = lambda: None) -> Result:
    """Return `read()`. Bytes may be damaged on their way: CorruptShard counts once another attempt has found the same.

    `forget` is called before another attempt.
    """
    seen: set[str] = set()
    while True:
        try:
            return read()
        except CorruptShard as error:
            if str(error) in seen or len(seen) == _MOST_DAMAGES:
                raise
            seen.add(str(error))
            forget()


def _retried(read: Callable[[], Result], uri: str, retry: Retry) -> Result:
    """Call `read`, with `retry` if that is a file's: requests to S3 have it in ObjectFile."""
    return read() if is_s3(uri) else retry(read, what=uri)


@contextmanager
def _open_shard(
    uri: str,
    num_bytes: int,
    retry: Retry,
    access: Access,
    etag: str | None = None,
    metadata: pq.FileMetaData | None = None,
) -> Iterator[pq.ParquetFile]:
    try:
        if is_s3(uri):
            source = ObjectFile(*split_s3_uri(uri), num_bytes, retry=retry, etag=etag, access=access)
        else:
            source = pa.OSFile(uri)
        # pre_buffer joins the column chunks of a row group into few large reads.
        options: dict[str, Any] = {"pre_buffer": True, "page_checksum_verification": True}
        with source, pq.ParquetFile(source, metadata=metadata, **options) as shard:
            yield shard
    except FileNotFoundError as error:
        raise MissingObject(f"{uri}: there is no such file; {LIST_AGAIN}") from error
    except PermissionError as error:
        raise DeniedObject(f"{uri}: {error}; check the file's permissions") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise  # it says nothing of the file
        reason = " ".join(str(error).split())
        raise CorruptShard(
            f"{uri} is not a readable Parquet file: {reason}; write it again or remove it"
        ) from error
