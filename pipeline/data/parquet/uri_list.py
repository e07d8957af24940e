"""Images that a column of a Parquet data set names by their addresses: each is an object or file of its own.

Stands between the shards of addresses and the manifest, which lists the images as it lists those below a folder. An
address is `s3://bucket/key`, an absolute path, or relative to the folder of the shard that it is in. No Ray here.
"""

import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing.folder_labels import AUTO, folder_label
from dinoray.pipeline.data.listing.others import OtherObjects
from dinoray.pipeline.data.listing.sorting import sorted_by_key
from dinoray.pipeline.data.parquet.column_detection import detect_columns
from dinoray.pipeline.data.parquet.columns import (
    MisfitShard,
    byte_columns,
    features,
    image_leaf,
    is_text,
    path_columns,
    text_leaf,
)
from dinoray.pipeline.data.parquet.first_shard import Asked, check_columns
from dinoray.pipeline.data.parquet.image_addresses import (
    common_root,
    image_address,
    in_buckets_that_exist,
    of_one_store,
)
from dinoray.pipeline.data.parquet.parquet import PartFooter, column_facts
from dinoray.pipeline.data.parquet.parquet_faults import UNREADABLE
from dinoray.pipeline.data.parquet.parquet_rows import read_texts
from dinoray.pipeline.data.parquet.shards import ShardFiles
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.retry import MissingObject, ObjectTooLarge
from dinoray.pipeline.storage.s3 import read_object
from dinoray.pipeline.storage.waiting import Patient

_SAMPLE = 8
"""Addresses that are tried before all are taken."""


class Addressed(NamedTuple):
    """One table row per image (key, size, etag, storage_class, label), and the address that keys are relative to.

    A key is a whole address where the image lies elsewhere. Size is null where the listing has no such object.
    """

    table: pa.Table
    root: str
    label: str | None
    notes: list[str]
    damaged: list[str]
    num_listed: int
    """Images that the listing has too."""


def paths_alone(files: ShardFiles) -> str | None:
    """Return the column of paths if the shards have no image bytes, but paths where these would be; else None.

    Hugging Face's `datasets` writes so with `Image(decode=False)`, or `embed_external_files=False`.
    """
    for _, footer in files.candidates():
        columns = byte_columns(footer.schema)
        if any(not _is_empty(footer, column) for column in columns):
            return None
        marked = [name for name, about in features(footer.schema).items() if about.get("_type") == "Image"]
        texts = [field.name for field in footer.schema if is_text(field.type) and field.name in marked]
        if named := [*path_columns(footer.schema), *texts]:
            return named[0]
    return None


def _is_empty(footer: PartFooter, column: str) -> bool:
    leaf = image_leaf(footer.schema, column, footer.uri)
    numbers = range(footer.metadata.num_row_groups)
    return all(column_facts(footer, number, leaf.name).ends == frozenset() for number in numbers)


def list_addresses(
    files: ShardFiles, listed: pa.Table, root: str, *, path: str, column: str, asked: Asked, concurrency: int
) -> Addressed:
    """Return the images that `column` names. `listed` has key, size and etag of objects below `root`.

    An image that is named twice is taken once. Raises ConfigError if most shards lack the column or most addresses are
    neither of S3 nor paths, and DataError if most shards cannot be read, or no image of some is there.
    """
    label, label_notes = _label_column(files, column, asked)

    def read(shard: dict[str, Any]) -> pa.Table:
        empty = pa.table({"address": pa.array([], pa.string()), "label": pa.array([], pa.string())})
        footer = files.footer(shard)
        if footer is None:
            return empty
        try:
            text_leaf(footer.schema, column, footer.uri)
            check_columns(footer.schema, asked, footer.uri)
            columns = [column] if label is None else [column, label]
            texts = read_texts(
                footer.uri,
                shard["size"],
                columns,
                retry=files.retry(shard["key"]),
                access=files.storage.access,
            )
        except (MisfitShard, *UNREADABLE) as error:
            files.leave_out(shard["key"], error)
            return empty
        folder = posixpath.dirname(footer.uri)
        addresses = pa.array([image_address(text, folder) for text in texts[column].to_pylist()], pa.string())
        labels = pa.nulls(len(addresses), pa.string()) if label is None else texts[label].combine_chunks()
        return pa.table({"address": addresses, "label": labels})

    what = f"reading addresses of images at {path}"
    named = pa.concat_tables(files.each(read, concurrency=concurrency, what=what))
    files.check(path)
    notes = [f"addresses of images from column {column!r}", *label_notes, *files.notes()]
    named = of_one_store(named, path, column, notes)
    named = in_buckets_that_exist(named, files.storage.access, notes)
    unique = named.group_by("address", use_threads=False).aggregate([("label", "first")])
    if twice := named.num_rows - unique.num_rows:
        notes.append(f"rows that name an image again: {twice}")
    addresses, labels = unique["address"], unique["label_first"]
    if asked.label == AUTO and label is not None and len(labels.unique().drop_null()) < 2:
        notes = [note for note in notes if not note.startswith("labels ")]
        notes.append(f"no labels: column {label!r} has one class; data.label_column={label} takes it")
        label, labels = None, pa.chunked_array([pa.nulls(len(labels), pa.string())])
    if asked.from_folders is True:
        folders = (posixpath.dirname(address).split("/") for address in addresses.to_pylist())
        labels = pa.chunked_array([[folder_label(one) for one in folders]], pa.string())
    columns, top = _columns(addresses, labels, listed, root)
    num_listed = len(addresses) - columns["size"].null_count
    table = sorted_by_key(columns)
    _check_some(table, top, column, files)
    return Addressed(table, top, label, notes, files.damaged, num_listed)


def _columns(
    addresses: pa.ChunkedArray, labels: pa.ChunkedArray, listed: pa.Table, root: str
) -> tuple[dict[str, pa.ChunkedArray], str]:
    """Return the columns of the table of images, and the address that keys are relative to."""
    there = pa.scalar(f"{root.rstrip('/')}/", pa.large_string())
    known = pc.binary_join_element_wise(there, listed["key"], pa.scalar("", pa.large_string()))
    place = pc.index_in(addresses.cast(pa.large_string()), value_set=known)
    top = common_root(addresses, root)
    keys = [address.removeprefix(f"{top.rstrip('/')}/") for address in addresses.to_pylist()]
    columns = {
        "key": pa.chunked_array([keys], pa.large_string()),
        **{name: listed[name].take(place) for name in ("size", "etag", "storage_class")},
        "label": labels,
    }
    columns["etag"] = columns["etag"].fill_null("")
    return columns, top


def _label_column(files: ShardFiles, column: str, asked: Asked) -> tuple[str | None, list[str]]:
    if asked.label != AUTO or asked.from_folders is True:
        return None if asked.label == AUTO else asked.label, []
    for _, footer in files.candidates():
        found = detect_columns(
            footer.schema,
            uri=footer.uri,
            image=column,
            key=None,
            label=AUTO,
            first_bytes=lambda _: None,
            is_unique=lambda _: False,
        )
        return found.label, found.notes
    return None, []


def _check_some(table: pa.Table, root: str, column: str, files: ShardFiles) -> None:
    """Raise DataError if none of some images, from all over the list, is there."""
    sample = table.take(np.unique(np.linspace(0, table.num_rows - 1, _SAMPLE).astype(int)))
    if sample["size"].null_count < sample.num_rows:
        return  # the listing has some of them
    keys: Sequence[str] = sample["key"].to_pylist()
    with ThreadPoolExecutor(len(keys)) as pool:
        whole = [key if is_s3(key) else f"{root.rstrip('/')}/{key}" for key in keys]
        if not any(pool.map(lambda address: _is_there(address, root, sample, files), whole)):
            raise DataError(
                f"data.uri_column={column!r} names images that are not there ({whole[0]} and all others "
                "that were tried); check data.uri_column (a path is relative to the folder of its shard), or write the "
                "images themselves into the column"
            )


def _is_there(address: str, root: str, sample: pa.Table, files: ShardFiles) -> bool:
    if not is_s3(address):
        return os.path.exists(address)
    others = OtherObjects(sample, root, files.storage.access)
    retry = Patient(files.storage.give_up_after_seconds, others=lambda: others.probes(address))
    try:
        read_object(*split_s3_uri(address), max_bytes=0, retry=retry, access=files.storage.access)
    except MissingObject:
        return False
    except (ObjectTooLarge, *UNREADABLE):
        pass
    return True
