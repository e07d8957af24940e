"""What has changed between two manifests of one data set, by key and ETag. Reads nothing; no Ray here."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.data.manifest import Manifest


class Changes(NamedTuple):
    """Keys of image objects, or of Parquet shards, each in the order of its manifest."""

    new: pa.ChunkedArray
    gone: pa.ChunkedArray
    changed: pa.ChunkedArray
    """Of those in both, the ones whose size or ETag differs."""


def changes_between(old: Manifest, new: Manifest) -> Changes:
    """Compare two manifests, whose keys are relative to the same root."""
    before, now = _objects(old), _objects(new)
    places = pc.index_in(now["key"], value_set=before["key"])
    is_new = places.is_null()
    common = now.filter(pc.invert(is_new))
    then = before.take(places.drop_null())
    differs = pc.or_(*(pc.not_equal(common[name], then[name]) for name in ("size", "etag")))
    is_gone = np.ones(before.num_rows, bool)
    is_gone[places.drop_null().to_numpy()] = False
    return Changes(
        now["key"].filter(is_new), before["key"].filter(pa.array(is_gone)), common["key"].filter(differs)
    )


def _objects(manifest: Manifest) -> pa.Table:
    """Return key, size and ETag of each object once: a shard has a row for each of its row groups."""
    table = manifest.table.select(["key", "size", "etag"])
    if manifest.kind == "images" or not table.num_rows:
        return table
    keys = table["key"].combine_chunks()
    is_first = np.r_[True, pc.not_equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)]
    return table.filter(pa.array(is_first))
