"""Tabulate the images in a data set's tar files, with their labels.

Stands between the listing of tar files and the manifest: what row_groups.py is for Parquet. Reads headers, and the
members that hold labels; no Ray here.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dinoray.models.errors import DataError
from dinoray.models.settings import Auto
from dinoray.pipeline.data.listing.others import OtherObjects
from dinoray.pipeline.data.tar.tar_file import CompressedTar, HeaderFile, TarFile
from dinoray.pipeline.data.tar.tar_index import TarImages, Wanted, index_tar
from dinoray.pipeline.data.tar.tar_labels import find_labels
from dinoray.pipeline.storage.addresses import is_s3
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.progress import counting
from dinoray.pipeline.storage.ranges import read_range
from dinoray.pipeline.storage.retry import (
    ArchivedObject,
    ChangedObject,
    DeniedObject,
    FailingObject,
    MissingObject,
)
from dinoray.pipeline.storage.waiting import Patient

_UNUSABLE = (CompressedTar, ArchivedObject, ChangedObject, DeniedObject, FailingObject, MissingObject)
_MOST_TARS, _MOST_KINDS = 3, 6
_LOCAL_BYTES = 16 << 10
"""Bytes that are read around a header on a disk."""


class TarsFound(NamedTuple):
    """A table row per image, and what the settings that are auto came to."""

    table: pa.Table
    label_column: str | None
    from_folders: bool
    notes: list[str]
    unusable: list[str]
    """Keys of the tar files that are left out."""


def list_tars(
    tars: pa.Table,
    *,
    path: str,
    prefix: str,
    root: str,
    wanted: Wanted,
    from_folders: bool | Auto,
    concurrency: int,
    storage: StorageConfig,
) -> TarsFound:
    """Return the images in `tars`, a table sorted by key: key, size and etag. Keys begin with `prefix`.

    Reads `concurrency` files at a time, each as patiently as an image. A file that cannot be read is left out; of a
    damaged one the images before the damage are used. Raises ConfigError if a setting does not fit, and DataError if
    there are no images or most files are left out.
    """
    rows = tars.to_pylist()
    others = OtherObjects(tars, root, storage.access)
    unusable: dict[str, str] = {}

    def index(tar: dict[str, Any]) -> TarImages | None:
        try:
            found = _twice_if_damaged(tar, root, wanted, others, storage)
        except _UNUSABLE as error:
            unusable[tar["key"]] = str(error)
            return None
        finally:
            count.add(1)
        if found.damage is not None and not len(found.names):
            unusable[tar["key"]] = (
                f"{root.rstrip('/')}/{tar['key']} is not a readable tar file: {found.damage}; "
                "write it again or remove it"
            )
            return None
        return found

    with (
        counting(f"reading headers of tar files at {path}", "files", len(rows)) as count,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        try:
            found = list(pool.map(index, rows))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # stop reading after the first error
            raise
    if len(unusable) > len(rows) / 2:
        first = unusable[min(unusable)]
        raise DataError(
            f"{len(unusable)} of {len(rows)} tar files under {path} cannot be used; mend or remove them, the first of "
            f"them: {first}"
        )
    number_of = [number for number, images in enumerate(found) if images is not None]
    of_tars = [images for images in found if images is not None]
    left_out = sum((images.left_out for images in of_tars), Counter[str]())
    table = _table(tars.select(["key", "size", "etag"]).take(number_of), of_tars)
    if not table.num_rows:
        raise DataError(
            f"no images in the {len(rows)} tar files under {path}{_listed(left_out)}; "
            "check data.path, and data.image_column if it is set"
        )
    texts = pa.chunked_array([images.labels for images in of_tars])
    labels = find_labels(
        table, texts, prefix=prefix, path=path, asked=wanted.label, from_folders=from_folders
    )
    notes = [*labels.notes, *_notes(rows, number_of, of_tars, left_out)]
    table = table.append_column("label", labels.of_images)
    return TarsFound(table, labels.column, labels.from_folders, notes, sorted(unusable))


def _twice_if_damaged(
    tar: dict[str, Any], root: str, wanted: Wanted, others: OtherObjects, storage: StorageConfig
) -> TarImages:
    """Return the images of a file. One that seems damaged may be so on its way: the better of two attempts."""
    found = _index(tar, root, wanted, others, storage)
    if found.damage is None:
        return found
    again = _index(tar, root, wanted, others, storage)
    return found if len(found.names) > len(again.names) else again


def _index(
    tar: dict[str, Any], root: str, wanted: Wanted, others: OtherObjects, storage: StorageConfig
) -> TarImages:
    uri, size = f"{root.rstrip('/')}/{tar['key']}", tar["size"]
    retry = Patient(storage.give_up_after_seconds, others=lambda: others.probes(tar["key"]))
    etag = tar["etag"] or None

    def read(first: int, stop: int) -> bytes:
        options = {"listed_bytes": size, "etag": etag, "retry": retry, "access": storage.access}
        return read_range(uri, (first, stop - 1), **options)

    file = HeaderFile(read, size) if is_s3(uri) else HeaderFile(read, size, piece_bytes=_LOCAL_BYTES)
    return index_tar(TarFile(file, size, name=uri), wanted)


def _table(tars: pa.Table, found: Sequence[TarImages]) -> pa.Table:
    """Return a row per image; row i of `tars` is the file of `found[i]`."""
    counts = [len(images.names) for images in found]
    chunks, number = [], 0
    for images in found:
        own = images.chunks() + number
        number = int(own[-1]) + 1 if len(own) else number
        chunks.append(own)
    columns = {
        "member": pa.chunked_array([images.names for images in found]),
        "offset": pa.array(np.concatenate([images.offsets for images in found])),
        "num_bytes": pa.array(np.concatenate([images.num_bytes for images in found])),
        "chunk": pa.array(np.concatenate(chunks)),
    }
    of_tars = tars.take(np.repeat(np.arange(len(found)), counts))
    return pa.table({**dict(zip(of_tars.column_names, of_tars.columns, strict=True)), **columns})


def _notes(
    rows: Sequence[dict[str, Any]],
    number_of: Sequence[int],
    found: Sequence[TarImages],
    left_out: Counter[str],
) -> list[str]:
    notes = []
    damaged = [
        f"{rows[number]['key']} {images.damage}; its first {len(images.names)} images are used"
        for number, images in zip(number_of, found, strict=True)
        if images.damage is not None
    ]
    if damaged:
        more = f" and {len(damaged) - _MOST_TARS} more" if len(damaged) > _MOST_TARS else ""
        one = "tar file is" if len(damaged) == 1 else "tar files are"
        notes.append(f"{len(damaged)} {one} damaged: {', '.join(damaged[:_MOST_TARS])}{more}")
    if left_out:
        notes.append(f"not used of the tar files{_listed(left_out)}")
    return notes


def _listed(left_out: Counter[str]) -> str:
    """Return `: 24 .heic, 3 links`, or nothing."""
    most = left_out.most_common(_MOST_KINDS)
    more = sum(left_out.values()) - sum(number for _, number in most)
    shown = [f"{number} {what}" for what, number in most] + ([f"{more} others"] if more else [])
    return f": {', '.join(shown)}" if shown else ""
