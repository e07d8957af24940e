"""What has changed between two manifests of one data set, by key and ETag. Reads nothing; no Ray here."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.data.manifests.manifest import Manifest


class Changes(NamedTuple):
    """Keys of image objects, or of Parquet shards, each in the order of its manifest."""

    new: pa.ChunkedArray
    gone: pa.ChunkedArray
    changed: pa.ChunkedArray
    """Of those in both, the ones whose size or ETag differs."""


def changes_between(old: Manifest, new: Manifest) -> Changes:
    """Compare two manifests, whose keys are relative to the same root."""
    before, now = (manifest.objects.select(["key", "size", "etag"]) for manifest in (old, new))
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
