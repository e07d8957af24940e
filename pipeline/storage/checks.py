"""Checks the body of an object by the MD5 in its ETag, and counts what is read from S3 and checked by nothing.

An object is checked by a checksum that the store keeps, or by its ETag where that is the MD5 of its bytes, which it is
not if the object was uploaded in parts or is encrypted with a key of KMS. A row group is checked by the checksums of
its pages, if `dinoray pack` wrote them. No requests here.
"""

import hashlib
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import botocore.exceptions

from dinoray.pipeline.storage.retry import ChangedObject

_ENOUGH_OTHERS = 8
"""Objects of a bucket whose ETags look like an MD5 and are none after which no other is expected to be."""
_md5_etags: dict[str, int] = {}
"""Bucket -> 1 if an ETag has been the MD5 of its object, else minus the number of those that were not."""

NO_CHECKSUM = "the store keeps no checksum of it, and its ETag is no MD5; upload such objects with a checksum"
NO_PAGE_CHECKSUMS = "its row groups may have no checksums; those that `dinoray pack` writes have"
NO_MEMBER_CHECKSUMS = "a tar file has no checksums of its members; row groups that `dinoray pack` writes have"


class Unchecked(NamedTuple):
    """Reads of a process that nothing checked."""

    number: int
    line: str
    """The first of them, for a person."""


class UncheckedReads:
    """Counts the reads of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock, self._count, self._line = threading.Lock(), 0, ""

    def add(self, what: str, why: str) -> None:
        """Count a read of the object `what`."""
        with self._lock:
            self._count += 1
            self._line = self._line or f"{what} and maybe others are read unchecked: {why}"

    def take(self) -> Unchecked | None:
        """Return those since the last call; None if there were none."""
        with self._lock:
            found = Unchecked(self._count, self._line) if self._count else None
            self._count, self._line = 0, ""
            return found


UNCHECKED = UncheckedReads()
"""Of this process."""


def is_its_md5(
    data: bytes, response: Mapping[str, Any], etag: str, seen: set[str], *, bucket: str, uri: str
) -> bool:
    """Return whether the ETag of an answer is the MD5 of its body. `seen` holds the digests of earlier attempts.

    Raises botocore's ChecksumError, which is retried, and ChangedObject for the same wrong body twice. Unless no
    ETag of the bucket has been an MD5 so far: then that of this store is something else.
    """
    if not _may_be_md5(bucket, etag, response):
        return False
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if digest == etag:
        _md5_etags[bucket] = 1
    elif digest not in seen:
        seen.add(digest)
        raise botocore.exceptions.ChecksumError(
            checksum_type="md5", expected_checksum=etag, actual_checksum=digest
        )
    elif _md5_etags.get(bucket, 0) > 0:
        raise ChangedObject(f"{uri} is damaged: its MD5 is {digest}, not its ETag {etag}; upload it again")
    else:
        _md5_etags[bucket] = _md5_etags.get(bucket, 0) - 1
    return digest == etag


def _may_be_md5(bucket: str, etag: str, response: Mapping[str, Any]) -> bool:
    """Return True if the ETag of an answer may be the MD5 of its body: as of objects in one part, unless encrypted with
    a key of AWS KMS or of the customer."""
    if _md5_etags.get(bucket, 0) <= -_ENOUGH_OTHERS:
        return False
    if response.get("SSECustomerAlgorithm") or str(response.get("ServerSideEncryption", "")).startswith(
        "aws:kms"
    ):
        return False
    return re.fullmatch("[0-9a-f]{32}", etag) is not None
