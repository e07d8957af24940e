"""Tabulate the row groups of a data set's Parquet shards, and find its columns of images, keys and labels.

Stands between the listing of shards and the manifest. Reads footers; reads rows only if a column is
ambiguous. No Ray here.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.parquet.column_detection import Columns
from dinoray.pipeline.data.parquet.columns import MisfitShard
from dinoray.pipeline.data.parquet.first_shard import Asked, check_columns, find_columns
from dinoray.pipeline.data.parquet.parquet import (
    ColumnFacts,
    PartFooter,
    RowGroup,
    column_facts,
    row_groups,
)
from dinoray.pipeline.data.parquet.parquet_faults import UnsupportedShard
from dinoray.pipeline.data.parquet.shards import ShardFiles

PACKED = b"dinoray.packed"
"""Name of the note in the footers of shards that `jobs.pack` wrote."""
ROWS_PER_GROUP = "rows_per_group"
"""Rows in each row group of a packed shard but the last: an entry of that note."""

_UNKNOWN = -1


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


def list_row_groups(files: ShardFiles, *, path: str, asked: Asked, concurrency: int) -> RowGroups:
    """Return the row groups of `files`, whose table is sorted by key: key, size, etag and label (from its folders).

    Reads `concurrency` footers at a time, each as patiently as an image. A shard that is damaged, cannot be read, or
    lacks the columns of the others is left out. Raises ConfigError if a column or setting does not fit most shards,
    and DataError if they hold no rows or most cannot be read.
    """
    from_folders = _is_labelled_by_folders(files.shards, path, asked)
    first = find_columns(files, path=path, asked=asked, has_folder_labels=from_folders)
    columns, shards = first.columns, first.shards
    if from_folders:
        columns.notes.append("labels from folder names; data.label_from_parent=false ignores them")
    by_path = from_folders or first.labels_in_path
    other_columns = [column for column in (columns.key, columns.label) if column is not None]
    per_group: set[int | None] = set()

    def read(shard: dict[str, Any]) -> _Part:
        footer = files.footer(shard)
        try:
            if footer is None:
                return _part_of([], [])
            check_columns(footer.schema, asked, footer.uri, in_path=first.labels_in_path)
            groups = row_groups(footer, image_column=columns.image, other_columns=other_columns)
        except (MisfitShard, UnsupportedShard) as error:
            files.leave_out(shard["key"], error)
            return _part_of([], [])
        per_group.add(_rows_per_group(footer))
        if first.labels_in_path:
            nulls = [0 if shard["label"] is not None else group.num_rows for group in groups]
            return _part_of(groups, [ColumnFacts(None, null) for null in nulls])
        if columns.label is None:
            return _part_of(groups, [ColumnFacts(None, None)] * len(groups))
        return _part_of(groups, [column_facts(footer, group.row_group, columns.label) for group in groups])

    what = f"reading footers of Parquet at {path}"
    found = files.each(read, concurrency=concurrency, what=what, shards=shards)
    files.check(path)
    counts = np.concatenate([part.counts for part in found])
    counts[:, 2] = np.ceil(counts[:, 2] * first.growth)
    if not len(counts):
        raise DataError(f"the {shards.num_rows} Parquet shards under {path} hold no rows; check data.path")
    if asked.label == AUTO and columns.label is not None:
        columns = _without_useless_label(columns, [part.labels for part in found if len(part.counts)])
    columns.notes.extend(files.notes())
    names = ["key", "size", "etag", *(["label"] if by_path else [])]
    which = np.repeat(np.arange(shards.num_rows), [len(part.counts) for part in found])
    table = _table(shards.select(names).take(which), counts)
    rows_per_group = per_group.pop() if len(per_group) == 1 else None
    return RowGroups(table, columns, from_folders, files.damaged, rows_per_group)


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
