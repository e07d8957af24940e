"""Addresses of images as tables of others hold them: made whole, and those that can be read.

Reads no image; no Ray here.
"""

import os
import posixpath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.storage.addresses import is_s3
from dinoray.pipeline.storage.config import Access
from dinoray.pipeline.storage.files import check_bucket
from dinoray.pipeline.storage.retry import Unreachable

_S3_SCHEMES = ("s3", "s3a", "s3n")
"""The last two are Hadoop's names of the first."""
_OF_S3 = "^s3://[^/@:]+/."
"""Without keys of an account in the address."""
_MOST_BUCKETS = 64
"""Buckets that are asked for."""


def image_address(text: str | None, folder: str) -> str | None:
    """Return the address of an image that a shard in `folder` names; None if it names none."""
    if not text:
        return None
    scheme, has_scheme, rest = text.partition("://")
    if has_scheme and scheme.lower() == "file":
        return rest
    if has_scheme and scheme.lower() in _S3_SCHEMES:
        return f"s3://{rest}"
    if (has_scheme and scheme.isalnum()) or text.startswith("/"):
        return text
    if not {".", ".."} & set(text.split("/")):
        return f"{folder}/{text}"
    if is_s3(folder):
        return f"s3://{posixpath.normpath(f'{folder[5:]}/{text}')}"
    return os.path.normpath(f"{folder}/{text}")


def of_one_store(named: pa.Table, path: str, column: str, notes: list[str]) -> pa.Table:
    """Return the rows whose `address` is of S3, or those with a path, whichever are more; append a note on the others.

    Raises ConfigError if most rows are neither.
    """
    is_remote = pc.match_substring_regex(named["address"], _OF_S3)
    is_path = pc.starts_with(named["address"], "/")
    chosen = max(is_remote, is_path, key=lambda found: pc.sum(found).as_py() or 0)
    kept = named.filter(chosen)  # a row without an address is in neither
    left_out = named.num_rows - kept.num_rows
    if not kept.num_rows or left_out > named.num_rows / 2:
        other = named.filter(pc.invert(chosen))["address"]
        example = repr(other[0].as_py()) if len(other) else "no address"
        raise ConfigError(
            f"data.uri_column={column!r} of {path} holds {example} or the like in most rows; it must hold addresses "
            "s3://bucket/key, or paths: download images of other places first, or choose another column"
        )
    if left_out:
        notes.append(f"rows left out, without an address that can be read: {left_out}")
    return kept


def in_buckets_that_exist(named: pa.Table, access: Access, notes: list[str]) -> pa.Table:
    """Return the rows whose `address` is in a bucket that exists, or on a disk; append a note on the others.

    Raises DataError if there is none of the buckets.
    """
    if not is_s3(named["address"][0].as_py()):
        return named
    buckets = pc.value_counts(_bucket(named["address"])).to_pylist()
    missing: dict[str, DataError] = {}
    for bucket in sorted(buckets, key=lambda one: -one["counts"])[:_MOST_BUCKETS]:
        try:
            check_bucket(f"s3://{bucket['values']}", access)
        except Unreachable:
            raise
        except DataError as error:
            missing[bucket["values"]] = error
    if not missing:
        return named
    is_missing = pc.is_in(_bucket(named["address"]), pa.array(list(missing), pa.string()))
    kept = named.filter(pc.invert(is_missing))
    if not kept.num_rows:
        raise next(iter(missing.values()))
    left_out = named.num_rows - kept.num_rows
    notes.append(f"rows left out, in buckets that cannot be read ({', '.join(sorted(missing))}): {left_out}")
    return kept


def common_root(addresses: pa.ChunkedArray, root: str) -> str:
    """Return the bucket with most of the images; on a disk `root` if all are below it, else `/`."""
    if not is_s3(addresses[0].as_py()):
        is_inside = not is_s3(root) and pc.all(pc.starts_with(addresses, f"{root.rstrip('/')}/")).as_py()
        return root if is_inside else "/"
    buckets = pc.value_counts(_bucket(addresses))
    return f"s3://{buckets[int(np.argmax(buckets.field('counts').to_numpy()))]['values'].as_py()}"


def _bucket(addresses: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(pc.extract_regex(addresses, "^s3://(?P<bucket>[^/]+)"), "bucket")
