"""What becomes of the request for one image, and what an object must be to be read."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig
from dinoray.pipeline.data.parquet.parquet_faults import CorruptShard, UnsupportedShard
from dinoray.pipeline.storage.retry import (
    ArchivedObject,
    ChangedObject,
    DeniedObject,
    FailingObject,
    MissingObject,
    ObjectTooLarge,
)


class Status(IntEnum):
    """Result of reading one image: a small number that is sent with it to the trainer."""

    OK = 0
    MISSING = 1
    CORRUPT = 2
    UNREACHABLE = 3
    TOO_LARGE = 4
    DENIED = 5
    ARCHIVED = 6


class Fetched(NamedTuple):
    """One fetched image. Unless `status` is OK, `data` is None and `reason` is the reason."""

    key: str
    data: bytes | None
    label: str | None
    status: Status
    reason: str


BAD_IMAGE: Mapping[type[DataError], Status] = {
    MissingObject: Status.MISSING,
    FailingObject: Status.UNREACHABLE,
    DeniedObject: Status.DENIED,
    ArchivedObject: Status.ARCHIVED,
    ObjectTooLarge: Status.TOO_LARGE,
    ChangedObject: Status.CORRUPT,
    CorruptShard: Status.CORRUPT,
    UnsupportedShard: Status.CORRUPT,
}
"""Errors of one object or shard. Unreachable is none of them: an outage is never a property of an image."""
BAD_OBJECT = tuple(BAD_IMAGE)
"""The same, for `except`."""


def whole(key: str, data: bytes | None, label: str | None, limit: int) -> Fetched:
    """Return a read image: OK unless it has no bytes or more than `limit` bytes."""
    if not data:
        return Fetched(key, None, label, Status.CORRUPT, "null" if data is None else "0 bytes")
    if len(data) > limit:
        reason = f"{len(data)} bytes, more than data.max_object_bytes={limit}"
        return Fetched(key, None, label, Status.TOO_LARGE, reason)
    return Fetched(key, data, label, Status.OK, "")


def expected_etag(config: DataConfig, listed: str | None) -> str | None:
    """Return the ETag that an object must have to be read, None for any."""
    return listed if listed and config.if_overwritten == "bad" else None
