"""The columns of images, keys and labels of a Parquet data set, by the first shard that has images.

Stands between the footers (shards.py) and the table of row groups. Reads rows only if a column is ambiguous. No Ray
here.
"""

from typing import Any, Literal, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.decoding.signatures import begins_as_an_image
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.parquet.column_detection import Columns, detect_columns, is_named_as_images
from dinoray.pipeline.data.parquet.columns import (
    MisfitShard,
    byte_columns,
    has_column,
    image_leaf,
    text_leaf,
)
from dinoray.pipeline.data.parquet.parquet import PartFooter
from dinoray.pipeline.data.parquet.parquet_faults import UNREADABLE
from dinoray.pipeline.data.parquet.parquet_rows import first_bytes, growth, read_column
from dinoray.pipeline.data.parquet.shards import ShardFiles

_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""What Hive and Spark write in a folder's name for null."""


class Asked(NamedTuple):
    """The settings of `data` that name columns and labels; `auto` is detected."""

    image: str
    key: str | None
    label: str | None
    from_folders: bool | Literal["auto"]


class First(NamedTuple):
    """The columns of the first shard with images, and all shards with the labels of their folders."""

    columns: Columns
    shards: pa.Table
    growth: float
    """How many times as large as by their footers images are in memory."""
    labels_in_path: bool
    """True if the column of labels is in the folders' names alone: `species=cat/part-0.parquet`."""


def find_columns(files: ShardFiles, *, path: str, asked: Asked, has_folder_labels: bool) -> First:
    """Return the columns of the first shard that can be used, among some of them.

    Raises ConfigError if none has an image column or a named one, and DataError if none can be read.
    """
    for shard, footer in files.candidates():
        labels = None
        if has_folder_labels and asked.label == AUTO:
            asked = asked._replace(label=None)
        elif asked.label not in (AUTO, None) and not has_column(footer.schema, asked.label):
            labels = _labels_in_path(files.shards, shard["key"], asked.label)
            if labels is None and not files.shards["label"].null_count:
                raise ConfigError(
                    f"data.label_column={asked.label!r}: {footer.uri} has no such column, but lies in a folder of a "
                    "label; set data.label_from_parent=true and leave out data.label_column"
                )
        try:
            columns = _columns(footer, shard, asked, files, in_path=labels is not None)
            retry, access = files.retry(shard["key"]), files.storage.access
            times = growth(footer, shard["size"], columns.image, retry=retry, access=access)
        except (MisfitShard, *UNREADABLE) as error:
            files.leave_out(shard["key"], error)
            continue
        shards = files.shards
        if labels is not None:
            columns.notes.append(f"labels from folders named {asked.label}=...")
            shards = shards.set_column(shards.schema.get_field_index("label"), "label", labels)
        return First(columns, shards, times, labels is not None)
    raise files.too_many(path)


def check_columns(
    schema: pa.Schema, asked: Asked, uri: str, *, image: str = AUTO, in_path: bool = False
) -> None:
    """Raise MisfitShard if a column that a setting names is missing or holds no text, or the column `image`."""
    if image != AUTO:
        image_leaf(schema, image, uri)
    for column in (asked.key, None if in_path else asked.label):
        if column not in (AUTO, None):
            text_leaf(schema, column, uri)


def hold_images(files: ShardFiles) -> bool:
    """Return True if one of some Parquet shards has a column of images by its name or bytes, or all are damaged.

    Empty files hold none.
    """
    is_any_whole = False
    for shard, footer in files.candidates():
        is_any_whole = True
        for column in byte_columns(footer.schema):
            if is_named_as_images(footer.schema, column):
                return True
            retry, access = files.retry(shard["key"]), files.storage.access
            try:
                data = first_bytes(footer, shard["size"], column, retry=retry, access=access)
            except UNREADABLE:
                return True
            if data and begins_as_an_image(data):
                return True
    return not is_any_whole and pc.max(files.shards["size"]).as_py() > 0


def _columns(
    footer: PartFooter, shard: dict[str, Any], asked: Asked, files: ShardFiles, *, in_path: bool
) -> Columns:
    num_bytes = shard["size"]
    options: dict[str, Any] = {"retry": files.retry(shard["key"]), "access": files.storage.access}

    def texts(column: str) -> list[str | None]:
        numbers = range(footer.metadata.num_row_groups)
        first = next((number for number in numbers if footer.metadata.row_group(number).num_rows), None)
        return [] if first is None else read_column(footer.uri, num_bytes, first, column=column, **options)

    def is_unique(column: str) -> bool:
        values = texts(column)
        return None not in values and len(set(values)) == len(values)

    check_columns(footer.schema, asked, footer.uri, image=asked.image, in_path=in_path)
    if asked.key not in (AUTO, None):
        _check_keys(footer, asked.key, [key for key in texts(asked.key) if key is not None])
    return detect_columns(
        footer.schema,
        uri=footer.uri,
        image=asked.image,
        key=asked.key,
        label=asked.label,
        first_bytes=lambda column: first_bytes(footer, num_bytes, column, **options),
        is_unique=is_unique,
    )


def _check_keys(footer: PartFooter, column: str, keys: list[str]) -> None:
    """Raise ConfigError if keys repeat among the first rows. Rows without a key are named by their place."""
    if len(set(keys)) < len(keys):
        raise ConfigError(
            f"data.key_column={column!r}: keys must differ, but the first {len(keys)} rows of {footer.uri} hold "
            f"{len(set(keys))} different values; set another column, or data.key_column=null"
        )


def _labels_in_path(shards: pa.Table, key: str, column: str) -> pa.Array | None:
    """Return the label of each shard by a folder `column=label`; None if that of `key` has no such folder."""
    if _value_in_path(key, column) is None:
        return None
    values = [_value_in_path(key, column) for key in shards["key"].to_pylist()]
    return pa.array([None if value == _NO_PARTITION else value for value in values], pa.string())


def _value_in_path(key: str, column: str) -> str | None:
    pairs = (folder.partition("=") for folder in key.split("/")[:-1])
    return next(
        (unquote(value) for name, is_pair, value in pairs if is_pair and unquote(name) == column), None
    )
