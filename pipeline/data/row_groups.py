"""Tabulate the row groups of a data set's Parquet shards, and find its columns of images, keys and labels.

Stands between the listing of shards and the manifest. Reads footers; reads rows only if a column is
ambiguous. No Ray here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.detection import AUTO, Columns, detect_columns, is_bytes
from dinoray.pipeline.data.others import OtherObjects
from dinoray.pipeline.data.parquet import (
    ColumnFacts,
    CorruptShard,
    PartFooter,
    RowGroup,
    again_if_damaged,
    column_facts,
    read_footer,
    read_row_group,
    row_groups,
)
from dinoray.pipeline.storage.config import SIGNED, Access, StorageConfig
from dinoray.pipeline.storage.progress import counting
from dinoray.pipeline.storage.retry import ArchivedObject, DeniedObject, FailingObject, Retry
from dinoray.pipeline.storage.waiting import Patient

PACKED = b"dinoray.packed"
"""Name of the note in the footers of shards that `jobs.pack` wrote."""
ROWS_PER_GROUP = "rows_per_group"
"""Rows in each row group of a packed shard but the last: an entry of that note."""

_UNKNOWN = -1


class Asked(NamedTuple):
    """The settings of `data` that name columns and labels; `auto` is detected."""

    image: str
    key: str | None
    label: str | None
    from_folders: bool | Literal["auto"]


class _Part(NamedTuple):
    """The row groups of one shard."""

    counts: NDArray[np.int64]
    """[groups, 4]: row group, rows, bytes, rows without a label or _UNKNOWN."""
    labels: ColumnFacts
    """Of all of them."""


class RowGroups(NamedTuple):
    """One table row per row group, the columns, and a flag: the folders of the shards are labels."""

    table: pa.Table
    columns: Columns
    from_folders: bool
    damaged: list[str]
    """Keys of the shards that are left out."""
    rows_per_group: int | None
    """Rows in each row group, or fewer at the ends of shards, if all shards are packed so; else None."""


def list_row_groups(
    shards: pa.Table, *, path: str, root: str, asked: Asked, concurrency: int, storage: StorageConfig
) -> RowGroups:
    """Return the row groups of `shards`, a table sorted by key: key, size, etag and label (from its folders).

    Reads `concurrency` footers at a time, each as patiently as an image. A shard that is damaged or cannot be
    read is left out. Raises ConfigError if a column or setting does not fit the shards, and DataError if they
    hold no rows or most are damaged.
    """
    from_folders = _is_labelled_by_folders(shards, path, asked)
    rows = shards.to_pylist()
    per_group: set[int | None] = set()
    damaged: dict[str, DataError] = {}
    others, access = OtherObjects(shards, root, storage.access), storage.access

    def retry_of(shard: dict[str, Any]) -> Retry:
        return Patient(storage.give_up_after_seconds, others=lambda: others.probes(shard["key"]))

    def footer_of(shard: dict[str, Any]) -> PartFooter | None:
        uri = f"{root.rstrip('/')}/{shard['key']}"
        try:
            return again_if_damaged(
                lambda: read_footer(uri, shard["size"], retry=retry_of(shard), access=access)
            )
        except (CorruptShard, DeniedObject, ArchivedObject, FailingObject) as error:
            damaged[shard["key"]] = error
            return None

    number, first = next(
        ((i, footer) for i, shard in enumerate(rows) if (footer := footer_of(shard))), (len(rows), None)
    )
    if first is None:
        raise _too_many_damaged(damaged, len(rows), path)
    if from_folders and asked.label == AUTO:
        asked = asked._replace(label=None)
    elif asked.label not in (AUTO, None, *first.schema.names) and not shards["label"].null_count:
        raise ConfigError(
            f"data.label_column={asked.label!r}: {first.uri} has no such column, but lies in a folder of a label; "
            "set data.label_from_parent=true and leave out data.label_column"
        )
    columns = _columns(first, rows[number]["size"], asked, retry_of(rows[number]), access)
    if from_folders:
        columns.notes.append("labels from folder names; data.label_from_parent=false ignores them")
    other_columns = [column for column in (columns.key, columns.label) if column is not None]

    def read(shard: dict[str, Any]) -> _Part:
        footer = first if shard is rows[number] else footer_of(shard)
        count.add(1)
        if footer is None:
            return _part_of([], [])
        per_group.add(_rows_per_group(footer))
        groups = row_groups(footer, image_column=columns.image, other_columns=other_columns)
        if columns.label is None:
            return _part_of(groups, [ColumnFacts(None, None)] * len(groups))
        return _part_of(groups, [column_facts(footer, group.row_group, columns.label) for group in groups])

    with (
        counting(f"reading footers of Parquet at {path}", "files", len(rows) - number) as count,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            found = list(pool.map(read, rows[number:]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # stop reading after the first error
            raise
    if len(damaged) > len(rows) / 2:
        raise _too_many_damaged(damaged, len(rows), path)
    counts = np.concatenate([part.counts for part in found])
    if not len(counts):
        raise DataError(f"the {len(rows)} Parquet shards under {path} hold no rows; check data.path")
    if asked.label == AUTO and columns.label is not None:
        columns = _without_useless_label(columns, [part.labels for part in found if len(part.counts)])
    names = ["key", "size", "etag", *(["label"] if from_folders else [])]
    which = np.repeat(np.arange(number, len(rows)), [len(part.counts) for part in found])
    table = _table(shards.select(names).take(which), counts)
    rows_per_group = per_group.pop() if len(per_group) == 1 else None
    return RowGroups(table, columns, from_folders, sorted(damaged), rows_per_group)


def _part_of(groups: Sequence[RowGroup], labels: Sequence[ColumnFacts]) -> _Part:
    nulls = [_UNKNOWN if one.num_nulls is None else one.num_nulls for one in labels]
    counts = np.array([(*group, null) for group, null in zip(groups, nulls, strict=True)], np.int64)
    known = [one.ends for one in labels if one.ends is not None]
    ends = frozenset[Any]().union(*known) if len(known) == len(labels) else None
    return _Part(counts.reshape(-1, 4), ColumnFacts(ends, sum(one.num_nulls or 0 for one in labels)))


def _table(shards: pa.Table, counts: NDArray[np.int64]) -> pa.Table:
    """Return a table of row groups; row i of `shards` is the shard of row group i."""
    row_group, num_rows, num_bytes, num_unlabelled = counts.T
    columns = {
        "row_group": pa.array(row_group, pa.int32()),
        "num_rows": pa.array(num_rows),
        "num_bytes": pa.array(num_bytes),
        "num_unlabelled": pa.array(num_unlabelled, mask=num_unlabelled == _UNKNOWN),
    }
    of_shards = dict(zip(shards.column_names, shards.columns, strict=True))
    folders = {name: of_shards.pop(name) for name in ("label",) if name in of_shards}
    return pa.table({**of_shards, **columns, **folders})


def _rows_per_group(footer: PartFooter) -> int | None:
    """Return what a packed shard notes of its row groups, unless others have since written it in larger ones."""
    metadata = footer.metadata
    try:
        rows = json.loads(footer.schema.metadata[PACKED])[ROWS_PER_GROUP]
    except (TypeError, KeyError, ValueError):
        return None
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return rows if isinstance(rows, int) and 0 < max(sizes, default=1) <= rows else None


def _too_many_damaged(damaged: Mapping[str, DataError], num_shards: int, path: str) -> DataError:
    """Return the error for a data set most of whose shards are damaged, with the reason for the first."""
    return DataError(
        f"{len(damaged)} of {num_shards} Parquet shards under {path} are damaged, the first of them: "
        f"{damaged[min(damaged)]}"
    )


def hold_images(shards: pa.Table, root: str, access: Access = SIGNED) -> bool:
    """Return True if the first Parquet shard has a column of bytes, or is damaged and may have one."""
    shard = shards.sort_by("key").slice(0, 1).to_pylist()[0]
    try:
        footer = read_footer(f"{root.rstrip('/')}/{shard['key']}", shard["size"], access=access)
    except (CorruptShard, DeniedObject, ArchivedObject):
        return True
    return any(is_bytes(column.type) for column in footer.schema)


def _is_labelled_by_folders(shards: pa.Table, path: str, asked: Asked) -> bool:
    """Return True if the folders of shards are their labels."""
    labels = shards["label"]
    if asked.from_folders is not True:
        several = not labels.null_count and len(labels.unique()) > 1
        return asked.from_folders == AUTO and asked.label == AUTO and several
    if labels.null_count:
        raise ConfigError(
            f"data.label_from_parent=true, but not all Parquet shards of {path} lie in a folder below it; "
            "set data.label_column, or leave data.label_from_parent out"
        )
    if asked.label not in (AUTO, None):
        raise ConfigError(
            f"data.label_from_parent=true and data.label_column={asked.label!r} both say where labels are; "
            "leave out one of them"
        )
    return True


def _columns(footer: PartFooter, num_bytes: int, asked: Asked, retry: Retry, access: Access) -> Columns:
    def first_rows(column: str) -> list[Any]:
        for index in range(footer.metadata.num_row_groups):
            if footer.metadata.row_group(index).num_rows:
                table = read_row_group(
                    footer.uri,
                    num_bytes,
                    index,
                    image_column=column,
                    other_columns=[],
                    retry=retry,
                    access=access,
                )
                return list(table[column].to_pylist())
        return []

    def first_bytes(column: str) -> bytes | None:
        return next((value for value in first_rows(column) if value), None)

    def is_unique(column: str) -> bool:
        values = first_rows(column)
        return None not in values and len(set(values)) == len(values)

    if asked.key not in (AUTO, None) and asked.key in footer.schema.names:
        _check_keys(footer, asked.key, first_rows)
    return detect_columns(
        footer.schema,
        uri=footer.uri,
        image=asked.image,
        key=asked.key,
        label=asked.label,
        first_bytes=first_bytes,
        is_unique=is_unique,
    )


def _check_keys(footer: PartFooter, column: str, first_rows: Callable[[str], list[Any]]) -> None:
    """Raise ConfigError if keys repeat among the first rows. Rows without a key are named by their place."""
    if pa.types.is_nested(footer.schema.field(column).type):
        return  # refused with the column's type
    keys = [key for key in first_rows(column) if key is not None]
    if len(set(keys)) < len(keys):
        raise ConfigError(
            f"data.key_column={column!r}: keys must differ, but the first {len(keys)} rows of {footer.uri} hold "
            f"{len(set(keys))} different values; set another column, or data.key_column=null"
        )


def _without_useless_label(columns: Columns, facts: Sequence[ColumnFacts]) -> Columns:
    """Return the columns, without the detected label column if it is empty or holds only one class."""
    ends = [found.ends for found in facts if found.ends is not None]
    if len(ends) < len(facts) or len(frozenset().union(*ends)) > 1:
        num_nulls = sum(found.num_nulls or 0 for found in facts)
        notes = [f"{num_nulls} rows have no label"] if num_nulls else []
        return columns._replace(notes=[*columns.notes, *notes])
    why = "holds one class" if any(ends) else "is empty"
    notes = [note for note in columns.notes if not note.startswith("labels ")]
    notes.append(f"no labels: column {columns.label!r} {why}; data.label_column={columns.label} takes it")
    return columns._replace(label=None, notes=notes)
