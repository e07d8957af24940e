"""Tell by their first bytes what objects are whose names do not: a few of each suffix are looked into.

Stands between the names and the contents of a data set. A fixed number of small requests, however many objects there
are. No image is decoded; no Ray here.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dinoray.pipeline.data.decoding.signatures import HEAD_BYTES, content_of
from dinoray.pipeline.data.listing.names import ARRAY_SUFFIX, BARE, kinds_of, most_frequent
from dinoray.pipeline.data.listing.others import OtherObjects
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.retry import ArchivedObject, DeniedObject, FailingObject, MissingObject
from dinoray.pipeline.storage.s3 import read_object
from dinoray.pipeline.storage.waiting import Patient

_THREADS = 16
_MOST_KINDS, _SAMPLE = 8, 8
"""Suffixes that are told apart, the most frequent ones, and objects of each that are looked into."""


def contents_of(table: pa.Table, root: str, storage: StorageConfig, *, beside_images: bool) -> pa.Array:
    """Return what each object of a table, with key and size, is taken for: "image", "parquet", "tar" or null.

    Of a suffix with few objects each is what it begins as; of others, and of those that cannot be read, all are what
    most, or half, of a sample begin as. If none can be read, objects without a suffix are taken for images, which are
    then named as bad images, and others for nothing. Arrays count only where there are no other images, here or
    beside: they may be features or masks of these.
    """
    kinds = kinds_of(table["key"])
    common = [kind for kind, _ in most_frequent(kinds, _MOST_KINDS)]
    # Rare suffixes count as one: there may be as many as objects.
    groups = pc.index_in(kinds, pa.array(common, pa.string())).fill_null(len(common)).to_numpy()
    sizes = table["size"].to_numpy()
    samples = [_spread(np.flatnonzero((groups == group) & (sizes > 0))) for group in range(len(common) + 1)]
    chosen = np.concatenate(samples)
    others = OtherObjects(table, root, storage.access)
    objects = table.select(["key", "size"]).take(chosen).to_pylist()
    with ThreadPoolExecutor(_THREADS) as pool:
        heads = list(pool.map(lambda one: _head(one, root, others, storage), objects))
    read = {
        row: content_of(head) for row, head in zip(chosen.tolist(), heads, strict=True) if head is not None
    }
    found: NDArray[np.object_] = np.full(table.num_rows, None, object)
    for group, (kind, sample) in enumerate(zip([*common, None], samples, strict=True)):
        rows = np.flatnonzero(groups == group)
        contents = Counter(read[row] for row in sample.tolist() if row in read)
        if not contents:
            found[rows] = "image" if kind == BARE and len(sample) else None
            continue
        most = max(contents, key=lambda content: (contents[content], content is not None))
        if len(rows) > _SAMPLE:
            found[rows] = most
        else:
            found[rows] = [read.get(row, most if sizes[row] else None) for row in rows.tolist()]
    is_array = pc.equal(kinds, ARRAY_SUFFIX).to_numpy()
    if beside_images or (found[~is_array] == "image").any():
        found[is_array] = None
    return pa.array(found, pa.string())


def _spread(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a few of the rows, from all over them."""
    return rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(_SAMPLE, len(rows))).astype(int))]


def _head(one: dict[str, Any], root: str, others: OtherObjects, storage: StorageConfig) -> bytes | None:
    """Return the first bytes of an object, or None if it cannot be read."""
    uri, last = f"{root.rstrip('/')}/{one['key']}", min(one["size"], HEAD_BYTES) - 1
    if not is_s3(uri):
        try:
            with open(uri, "rb") as file:
                return file.read(last + 1)
        except OSError:
            return None
    retry = Patient(storage.give_up_after_seconds, others=lambda: others.probes(one["key"]))
    try:
        return read_object(*split_s3_uri(uri), byte_range=(0, last), retry=retry, access=storage.access)
    except (MissingObject, DeniedObject, ArchivedObject, FailingObject):
        return None
