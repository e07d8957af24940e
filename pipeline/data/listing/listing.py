"""List the objects under `data.path`: a stream of entries in the store's order, which feeds the manifest.

Opens no object. No Ray here.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import NamedTuple

import pyarrow as pa

from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing.choosing import pattern_remedy
from dinoray.pipeline.data.listing.walk import File, file_at, walk
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.files import MissingObject, check_bucket, normal_uri
from dinoray.pipeline.storage.key_ranges import list_ranges
from dinoray.pipeline.storage.listing_parts import ListingParts
from dinoray.pipeline.storage.pages import LISTED, Objects
from dinoray.pipeline.storage.progress import Count
from dinoray.pipeline.storage.retry import Retry, retrying
from dinoray.pipeline.storage.s3 import etag_of, list_page, s3_client

_BATCH_ROWS = 65_536


class Entry(NamedTuple):
    """One object or file: its key, its size in bytes, and a tag that changes with its content."""

    key: str
    size: int
    etag: str
    storage_class: str | None = None


class Listing(NamedTuple):
    """Entries as record batches, the address that their keys are relative to, and the folder prefix of each key."""

    root: str
    prefix: str
    batches: Iterator[pa.RecordBatch]
    """Of the schema LISTED."""
    left_out: Mapping[str, int] = {}
    """Number of files that cannot be listed, by kind; complete once the batches are."""

    @property
    def entries(self) -> Iterator[Entry]:
        """The same entries one by one."""
        for batch in self.batches:
            yield from map(Entry, *(column.to_pylist() for column in batch.columns))


class EntryTable:
    """Entries and labels in Arrow batches, because Python objects would need far more memory."""

    schema = LISTED.append(pa.field("label", pa.string()))

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._pending: list[tuple[str, int, str, str | None, str | None]] = []

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._batches) + len(self._pending)

    def add(self, entry: Entry, label: str | None) -> None:
        """Append one row."""
        self._pending.append((*entry, label))
        if len(self._pending) == _BATCH_ROWS:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch, labels: pa.Array) -> None:
        """Append rows of the schema LISTED and their labels."""
        if self._pending:
            self._flush()
        if batch.num_rows:
            self._batches.append(pa.record_batch([*batch.columns, labels], self.schema))

    def table(self) -> pa.Table:
        """Return all rows so far, in the order they were added."""
        if self._pending:
            self._flush()
        return pa.Table.from_batches(self._batches, schema=self.schema)

    def _flush(self) -> None:
        columns = zip(*self._pending, strict=True)
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=self.schema))
        self._pending = []


def list_entries(
    path: str,
    *,
    setting: str = "data.path",
    retry: Retry = retrying,
    retry_later: Retry = retrying,
    access: Access = SIGNED,
    count: Count | None = None,
    parts: ListingParts | None = None,
) -> Listing:
    """List all entries under `path`: a folder, an `s3://` prefix (treated as a folder), or a single file.

    Keys are full object keys on S3 (root `s3://bucket`), in the store's order, and slash-separated paths
    relative to the folder on a disk, with links followed as in walk.py. On S3, `retry` repeats the first request and
    `retry_later` all others, several at once; what `parts` has of an earlier attempt is not listed again. Adds the
    entries to `count` as they come. Raises DataError if the folder or bucket is missing or access is denied; on S3
    only during iteration. The message names `setting`, which gave the path.
    """
    count = count or Count("listing", "keys")
    path = normal_uri(path)
    if is_s3(path):
        bucket, key = split_s3_uri(path)
        prefix = f"{key}/" if key else ""
        return Listing(
            f"s3://{bucket}", prefix, _objects(bucket, key, prefix, retry, retry_later, access, count, parts)
        )
    left_out = Counter[str]()
    if os.path.isfile(path):
        folder, name = os.path.split(path)
        file = file_at(path, name, left_out)
        return Listing(folder, "", _batches([] if file is None else [file], count), left_out)
    if not os.path.isdir(path):
        remedy = pattern_remedy(setting, path) or "check the path"
        raise DataError(f"{setting}={path}: there is no such folder or file; {remedy}")
    return Listing(path, "", _batches(walk(path, left_out), count), left_out)


def _objects(
    bucket: str,
    key: str,
    prefix: str,
    retry: Retry,
    retry_later: Retry,
    access: Access,
    count: Count,
    parts: ListingParts | None,
) -> Iterator[pa.RecordBatch]:
    def folders(folder: str, *, retry: Retry) -> list[str]:
        return list_page(bucket, folder, delimiter="/", retry=retry, access=access).folders

    if parts:
        parts.open(f"{s3_client(access).meta.endpoint_url} {bucket} {prefix}")
        if parts.stretches:
            # The first request of a listing that is resumed waits as all others do.
            check_bucket(f"s3://{bucket}", access)
    found, read = False, partial(list_page, bucket, prefix, access=access)
    for batch in list_ranges(
        read, folders, prefix, retry=retry, retry_later=retry_later, count=count, parts=parts
    ):
        found = True
        yield batch
    if found or not key:
        return
    try:
        request = partial(s3_client(access).head_object, Bucket=bucket, Key=key)
        answer = retry_later(request, what=f"s3://{bucket}/{key}")
    except MissingObject:
        return
    yield Objects(
        [key], [answer["ContentLength"]], [etag_of(answer)], [answer.get("StorageClass")]
    ).to_arrow()


def _batches(files: Iterable[File], count: Count) -> Iterator[pa.RecordBatch]:
    files = iter(files)
    while some := list(islice(files, _BATCH_ROWS)):
        count.add(len(some))
        keys, sizes, etags = map(list, zip(*some, strict=True))
        yield Objects(keys, sizes, etags, [None] * len(some)).to_arrow()
