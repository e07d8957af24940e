"""Which listed objects are Parquet shards: by their content where the name leaves it open, and by their folder.

Stands between the listing and the manifest. Athena, Trino and Snowflake write Parquet without a suffix; tables of Delta
Lake, Hudi and Spark have folders of their own, whose files are no rows of the table. No Ray here.
"""

import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dinoray.models.settings import Auto
from dinoray.pipeline.data.contents import Contents
from dinoray.pipeline.data.detection import AUTO, automatic_label, folder_label, has_label_pair
from dinoray.pipeline.data.parquet_faults import UNREADABLE
from dinoray.pipeline.data.shards import ShardFiles
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.s3 import read_object

_MAGIC = b"PAR1"
_LEAST_BYTES = 12
"""Of a Parquet file: its first and last four bytes, and the length of its footer."""
_SAMPLE = 8
"""Objects of one kind whose first bytes are read."""
_SUFFIXES = 2
"""Unknown suffixes that are looked at, the commonest."""
_OF_TABLES = r"(?:^|/)(?:_delta_log|_change_data|_temporary|_spark_metadata|\.hoodie)/"
"""Folders of logs, of changes, and of files that were never committed."""
_FORMATS = {
    "Delta": r"(?:^|/)_delta_log/",
    "Hudi": r"(?:^|/)\.hoodie/",
    "Iceberg": r"(?:^|/)metadata/(?:[^/]*\.metadata\.json|snap-[^/]*\.avro|version-hint\.text)$",
}
_HIDDEN = r"(?:^|/)[._][^/]*$"


def with_shards_by_content(
    contents: Contents, label_from_parent: bool | Auto, storage: StorageConfig
) -> tuple[Contents, list[str]]:
    """Return the contents with the objects that are Parquet as shards, and phrases on tables with a log of their own.

    Reads the first bytes of a few objects without a suffix and, where nothing else may be an image, of a few others.
    """
    shards, others = contents.shards, contents.others
    of_tables = _matches(shards, _OF_TABLES)
    if of_tables.any():
        others = pa.concat_tables([others, shards.filter(pa.array(of_tables))])
        shards = shards.filter(pa.array(~of_tables))
        contents = contents._replace(shards=shards, others=others)
    bare = np.ones(contents.bare.num_rows, bool)
    if len(bare) and _are_parquet(contents.bare, contents.root, storage):
        contents = _adopt(contents, "bare", bare, label_from_parent)
    elif not (len(bare) or contents.images.num_rows or shards.num_rows):
        for is_alike in _by_suffix(others):
            if _are_parquet(others.filter(pa.array(is_alike)), contents.root, storage):
                contents = _adopt(contents, "others", is_alike, label_from_parent)
                break
    return contents, _notes(contents) if contents.shards.num_rows else []


def _adopt(
    contents: Contents, role: str, is_shard: NDArray[np.bool_], label_from_parent: bool | Auto
) -> Contents:
    """Return the contents with some objects of a role as shards, and with the labels that shards have."""
    table: pa.Table = getattr(contents, role)
    taken = table.filter(pa.array(is_shard))
    folders = (key[len(contents.prefix) :].split("/")[:-1] for key in taken["key"].to_pylist())
    labels = pa.array([_label(names, label_from_parent) for names in folders], pa.string())
    taken = taken.set_column(taken.schema.get_field_index("label"), "label", labels)
    left = table.filter(pa.array(~is_shard))
    return contents._replace(**{role: left, "shards": pa.concat_tables([contents.shards, taken])})


def _label(folders: Sequence[str], label_from_parent: bool | Auto) -> str | None:
    if label_from_parent == AUTO:
        return automatic_label(folders) if has_label_pair(folders) else None
    return folder_label(folders) if label_from_parent else None


def _are_parquet(table: pa.Table, root: str, storage: StorageConfig) -> bool:
    """Return True if most of some objects, from all over the list, begin as Parquet does."""
    rows = np.unique(np.linspace(0, table.num_rows - 1, _SAMPLE).astype(int))
    sample = table.take(rows).to_pylist()
    files = ShardFiles(table, root, storage)
    with ThreadPoolExecutor(len(sample)) as pool:
        return 2 * sum(pool.map(lambda row: _starts_as_parquet(row, files), sample)) > len(sample)


def _starts_as_parquet(row: dict[str, Any], files: ShardFiles) -> bool:
    if not row["size"] or row["size"] < _LEAST_BYTES:
        return False
    uri, retry, access = files.uri(row["key"]), files.retry(row["key"]), files.storage.access
    try:
        if is_s3(uri):
            head = (0, len(_MAGIC) - 1)
            return read_object(*split_s3_uri(uri), byte_range=head, retry=retry, access=access) == _MAGIC
        with open(uri, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (*UNREADABLE, OSError):
        return False


def _by_suffix(table: pa.Table) -> Iterator[NDArray[np.bool_]]:
    """Yield which objects have the commonest suffix, then the next; hidden and empty ones are of no account."""
    suffixes = np.array([posixpath.splitext(key)[1] for key in table["key"].to_pylist()], str)
    is_open = ~_matches(table, _HIDDEN) & np.array([bool(size) for size in table["size"].to_pylist()], bool)
    names, counts = np.unique(suffixes[is_open], return_counts=True)
    for name in names[np.argsort(-counts, kind="stable")][:_SUFFIXES]:
        yield is_open & (suffixes == name)


def _notes(contents: Contents) -> list[str]:
    """Return a phrase on each format of tables whose log says which of the shards count."""
    found = [name for name, pattern in _FORMATS.items() if _matches(contents.others, pattern).any()]
    return [
        f"the log of the {name} table is not read: rows that it has deleted or replaced are read too; write the table "
        "anew as plain Parquet to leave them out"
        for name in found
    ]


def _matches(table: pa.Table, pattern: str) -> NDArray[np.bool_]:
    matches: NDArray[np.bool_] = pc.match_substring_regex(table["key"], pattern).to_numpy()
    return matches
