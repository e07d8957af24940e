"""What becomes of the request for one image, and what an object must be to be read."""

from enum import IntEnum
from typing import NamedTuple

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifest import DataConfig
from dinoray.pipeline.data.parquet import CorruptShard
from dinoray.pipeline.storage.files import ChangedObject, MissingObject, ObjectTooLarge, Unreachable


class Status(IntEnum):
    """Result of reading one image: a small number that is sent with it to the trainer."""

    OK = 0
    MISSING = 1
    CORRUPT = 2
    UNREACHABLE = 3
    TOO_LARGE = 4


class Fetched(NamedTuple):
    """One fetched image. Unless `status` is OK, `data` is None and `reason` is the reason."""

    key: str
    data: bytes | None
    label: str | None
    status: Status
    reason: str


BAD_IMAGE: dict[type[DataError], Status] = {
    MissingObject: Status.MISSING,
    Unreachable: Status.UNREACHABLE,
    ObjectTooLarge: Status.TOO_LARGE,
    ChangedObject: Status.CORRUPT,
    CorruptShard: Status.CORRUPT,
}


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
