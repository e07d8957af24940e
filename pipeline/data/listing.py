"""List the objects under `data.path` and classify them by name.

Feeds the manifest: a stream of entries, in the store's order, and one rule per key. Never opens an object:
the decoder checks the content later, whatever the suffix is. No Ray here.
"""

import os
import posixpath
import re
import stat
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import pyarrow as pa

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.files import MissingObject, check_bucket, normal_uri
from dinoray.pipeline.storage.key_ranges import list_ranges
from dinoray.pipeline.storage.listing_parts import ListingParts
from dinoray.pipeline.storage.pages import LISTED, Objects
from dinoray.pipeline.storage.progress import Count
from dinoray.pipeline.storage.retry import Retry, retrying
from dinoray.pipeline.storage.s3 import etag_of, list_page, s3_client

Role = Literal["image", "bare", "parquet", "other"]

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
        *(".jp2", ".j2k", ".avif"),
    }
)
_PARQUET = re.compile(r"\.(parquet|parq|pq)(\.(gz|gzip|snappy|zstd|zst|lz4|br|brotli|lzo))?$")
"""Names of Parquet; some writers add the codec of its pages. Objects without a suffix may be Parquet too."""
_TEXT_NAMES = frozenset({"readme", "license", "licence", "copying", "notice", "authors", "makefile"})
_PATTERN = re.compile(r"[*?]|\[.+\]|\{.+,.+\}")
_BATCH_ROWS = 65_536


class Entry(NamedTuple):
    """One object or file: its key, its size in bytes, and a tag that changes with its content.

    The size is None for a file whose name is not valid UTF-8, which disks allow: no manifest and no log can hold it.
    """

    key: str
    size: int | None
    etag: str
    storage_class: str | None = None


class Listing(NamedTuple):
    """Entries as record batches, the address that their keys are relative to, and the folder prefix of each key."""

    root: str
    prefix: str
    batches: Iterator[pa.RecordBatch]
    """Of the schema LISTED; what is wrong in a name that is not valid UTF-8 is replaced."""

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
        self._pending: list[tuple[str, int | None, str, str | None, str | None]] = []

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
    relative to the folder on a disk. Links to files are followed; links to folders are not, because they may
    form loops. Pipes, sockets and devices are skipped. A broken link is listed with size 0, so that its image
    counts as missing. On S3, `retry` repeats the first request and `retry_later` all others, several at once;
    what `parts` has of an earlier attempt is not listed again. Adds the entries to `count` as they come.
    Raises DataError if the folder or bucket is missing or access is denied; on S3 only during iteration. The
    message names `setting`, which gave the path.
    """
    count = count or Count("listing", "keys")
    path = normal_uri(path)
    if is_s3(path):
        bucket, key = split_s3_uri(path)
        prefix = f"{key}/" if key else ""
        return Listing(
            f"s3://{bucket}", prefix, _objects(bucket, key, prefix, retry, retry_later, access, count, parts)
        )
    if os.path.isfile(path):
        folder, name = os.path.split(path)
        return Listing(
            folder, "", _batches((entry for entry in [_entry(path, name)] if entry is not None), count)
        )
    if not os.path.isdir(path):
        remedy = (
            f"patterns are not supported: set {setting} to a folder" if is_pattern(path) else "check the path"
        )
        raise DataError(f"{setting}={path}: there is no such folder or file; {remedy}")
    return Listing(path, "", _batches(_files(path), count))


def role_of(key: str) -> Role:
    """Return the role of a key by its name: "image", "bare", "parquet", or "other", which is ignored.

    A "bare" key has no suffix; it is an image unless the data set is Parquet. Suffixes match in upper and
    lower case and with trailing spaces. An image name may start with a dot or an underscore. But macOS's
    `._x.jpg`, system files, Spark's `_SUCCESS` and folder markers (`x/`) are "other".
    """
    name = key.rsplit("/", 1)[-1].rstrip(" ").lower()
    suffix = posixpath.splitext(name)[1]
    if not name or name.startswith("._"):
        return "other"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if name.startswith((".", "_")) or name in _TEXT_NAMES:
        return "other"
    return "parquet" if _PARQUET.search(name) else "other" if suffix else "bare"


def is_pattern(path: str) -> bool:
    """Return True if a path looks like a pattern of a shell."""
    return _PATTERN.search(path) is not None


def _is_unicode(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _batches(entries: Iterator[Entry], count: Count) -> Iterator[pa.RecordBatch]:
    while some := list(islice(entries, _BATCH_ROWS)):
        count.add(len(some))
        some = [entry if _is_unicode(entry.key) else _replaced(entry) for entry in some]
        yield Objects(*map(list, zip(*some, strict=True))).to_arrow()


def _replaced(entry: Entry) -> Entry:
    return entry._replace(key=entry.key.encode(errors="replace").decode(), size=None)


def _files(root: str) -> Iterator[Entry]:
    for folder, _, names in os.walk(root, onerror=_refuse):
        inner = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in names:
            key = name if inner == "." else f"{inner}/{name}"
            entry = _entry(os.path.join(folder, name), key)
            if entry is not None:
                yield entry


def _entry(path: str, key: str) -> Entry | None:
    """Return the entry of a file on disk; None for special files, whose reading could block or never end."""
    try:
        status = os.stat(path)
    except OSError:
        return Entry(key, 0, "")
    if not stat.S_ISREG(status.st_mode):
        return None
    return Entry(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _refuse(error: OSError) -> None:
    """Raise DataError. Without this, os.walk silently skips folders that it cannot read, and their images."""
    raise DataError(f"{error.filename}: {error.strerror}; make the folder readable") from error
