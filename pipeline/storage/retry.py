"""One policy for failed requests to an object store: which are retried, which concern one object, which end the run.

Every request to S3 in this project, and every read of an image on a disk, is repeated *whole*. The S3 client
itself stops retrying once a body starts to arrive, so a truncated body requires that the whole GET is repeated.
`retrying` makes few attempts: for the first contact with a store, and for the files of a run. Reads of images
wait longer: see waiting.py. Handles botocore's and urllib3's exceptions; no client, no bucket and no Ray here.

    transient   5xx but 501, throttling, timeouts, broken connections, short or damaged bodies; on disks and network
                file systems: no free descriptors, no space, input or output errors, stale handles
                -> retried after a random pause; Unreachable when no attempts are left
    missing     the object does not exist                              -> MissingObject, at once
    refused     403, an archived object, a disabled key, ...           -> DeniedObject, ArchivedObject, at once
    permanent   no such bucket, bad or expired credentials, ...        -> DataError, at once
"""

import errno
import http.client
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard, TypeVar

import urllib3.exceptions
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from dinoray.models.errors import DataError, one_line
from dinoray.pipeline.storage.config import SIGNED
from dinoray.pipeline.storage.remedies import (
    ACCESS,
    OR_ANONYMOUS,
    SET_CREDENTIALS,
    refusal_remedy,
    store_remedy,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Separate from the global generator: its seed must not give all actors the same pauses, and network failures
# must not change its state.
jitter = random.SystemRandom().random


class Retry(Protocol):
    """A way to repeat an operation until it succeeds. `what`: the object's name, for messages."""

    def __call__(self, operation: Callable[[], T], *, what: str) -> T:
        """Return the operation's result. Raises DataError."""
        ...


class MissingObject(DataError):  # noqa: N818  (the name is a state of the object)
    """The object (or file) does not exist; the bucket (or folder) may exist."""


class Unreachable(DataError):  # noqa: N818
    """The storage did not answer in the allowed attempts or time."""


class FailingObject(DataError):  # noqa: N818
    """All requests for the object failed, although the store answered requests for others."""


class DeniedObject(DataError):  # noqa: N818
    """The store refuses the object."""


class ArchivedObject(DataError):  # noqa: N818
    """The object is in an archive class, whose objects cannot be read."""


class ChangedObject(DataError):  # noqa: N818
    """The object's size differs from the listed size."""


class ObjectTooLarge(DataError):  # noqa: N818
    """The object is larger than the caller's limit."""


_THROTTLING_CODES = frozenset(
    {
        *("SlowDown", "SlowDownRead", "SlowDownWrite", "Throttling", "ThrottlingException"),
        *("RequestLimitExceeded", "TooManyRequests", "ServiceUnavailable", "KMS.ThrottlingException"),
    }
)
_TRANSIENT_CODES = _THROTTLING_CODES | {
    *("RequestTimeout", "InternalError", "KMS.InternalException"),
    *("BadDigest", "IncompleteBody", "OperationAborted", "ConditionalRequestConflict"),
}
_MISSING_CODES = frozenset({"NoSuchKey", "NotFound", "404"})
_TRANSIENT_ERRORS = (
    boto.HTTPClientError,  # read timeouts, closed connections, broken streams
    boto.ConnectionError,  # connect timeouts, refused, DNS, TLS
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    boto.ChecksumError,
    ResponseParserError,  # a truncated XML body, or a proxy's HTML
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
)
_EXHAUSTED_NUMBERS = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOBUFS})
FULL_NUMBERS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Of a disk without space, or a quota that is used up: writes succeed again once somebody has freed some."""
_TRANSIENT_NUMBERS = _EXHAUSTED_NUMBERS | FULL_NUMBERS | {errno.EIO, errno.ESTALE, errno.EBUSY}
RETRIED = (boto.ClientError, boto.BotoCoreError, *_TRANSIENT_ERRORS, OSError)
"""Exceptions of an operation that `judge` takes."""
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.NoAuthTokenError,
    boto.SSOError,
    boto.ProfileNotFound,
)
LIST_AGAIN = "remove the manifest to list the data again"


def retrying(
    operation: Callable[[], T],
    *,
    what: str,
    attempts: int = 5,
    most_seconds: float = 10.0,
    base_seconds: float = 0.2,
    max_seconds: float = 5.0,
    rng: Callable[[], float] = jitter,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call `operation` until it succeeds, at most `attempts` times. `what`: the object's name, for messages.

    The pause after attempt i (from 0) is uniform in [0, min(max_seconds, base_seconds * 2**i)] ("full
    jitter": actors that failed together do not retry together). No attempt begins after `most_seconds`, because
    an address where nothing answers takes seconds each time. Raises MissingObject, Unreachable or another
    DataError as in the module's table. Any other exception is not caught: other errors of a disk are the caller's.
    """
    began = time.monotonic()
    for attempt in range(attempts):
        try:
            return operation()
        except RETRIED as error:
            reason = judge(error, what)
            if attempt + 1 == attempts or time.monotonic() - began > most_seconds:
                raise Unreachable(
                    f"{what}: failed after {attempt + 1} attempts, the last with {reason}; {remedy(error)}"
                ) from error
            pause = rng() * min(max_seconds, base_seconds * 2**attempt)
            logger.debug("%s: %s; attempt %d of %d in %.2f s", what, reason, attempt + 2, attempts, pause)
            sleep(pause)
    raise ValueError(f"attempts={attempts} must be at least 1")


def guarded(retry: Retry, guard: Callable[[], object]) -> Retry:
    """Return `retry` that calls `guard` before each attempt of a write.

    What held before the first attempt may not hold before one that is made minutes later. What `guard` raises ends the
    write, unless it is Unreachable: then the attempt counts as failed, because the storage may answer the next moment.
    """

    def guarded_retry(operation: Callable[[], T], *, what: str) -> T:
        def attempt() -> T:
            try:
                guard()
            except Unreachable as error:
                raise error.__cause__ or error from None
            return operation()

        return retry(attempt, what=what)

    return guarded_retry


def judge(error: Exception, what: str) -> str:
    """Return the reason of a failure that may pass. Raises the error that stands for any other failure."""
    if is_of_a_disk(error):
        if not may_pass(error):
            raise error
    elif (permanent := _permanent(error, what)) is not None:
        raise permanent from error
    return _one_line(error)


def is_throttling(error: Exception) -> bool:
    """Return True for a failure that only says how busy the store or this process is."""
    if isinstance(error, boto.ClientError):
        code, status = code_and_status(error)
        return status in (429, 503) or code in _THROTTLING_CODES
    return is_of_a_disk(error) and error.errno in _EXHAUSTED_NUMBERS


def may_pass(error: OSError) -> bool:
    """Return True for an error of a disk, or of this process's files, that says nothing of the file."""
    return error.errno in _TRANSIENT_NUMBERS


def is_of_a_disk(error: Exception) -> TypeGuard[OSError]:
    """Return True for an error of the operating system on a file, not on a connection."""
    return isinstance(error, OSError) and not isinstance(error, _TRANSIENT_ERRORS)


def remedy(error: Exception) -> str:
    """Return what to check after a failure that did not pass."""
    if not is_of_a_disk(error):
        return "check the network, AWS_ENDPOINT_URL and the store's load"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    if error.errno in FULL_NUMBERS:
        return "free space on its disk"
    return "check the disk, or the server of this network file system"


def _permanent(error: Exception, what: str) -> DataError | None:
    """Return the error to raise instead of `error`, or None if a retry may succeed."""
    if isinstance(error, boto.ClientError):
        return _permanent_answer(error, what)
    if isinstance(error, _TRANSIENT_ERRORS):
        return None
    if isinstance(error, _CREDENTIAL_ERRORS):
        return DataError(
            f"{what}: no usable AWS credentials ({_one_line(error)}); {SET_CREDENTIALS}{OR_ANONYMOUS}"
        )
    return DataError(f"{what}: {_one_line(error)}; check the address and the AWS_* settings")


def _permanent_answer(error: Any, what: str) -> DataError | None:
    """As `_permanent`, for an error response of the store: by its HTTP status and error code."""
    code, status = code_and_status(error)
    if (status >= 500 and status != 501) or status == 429 or code in _TRANSIENT_CODES:
        return None
    if code in _MISSING_CODES and error.operation_name == "HeadBucket":
        code = "NoSuchBucket"
    if code in _MISSING_CODES:
        return MissingObject(f"{what}: there is no such object ({code}); check the path")
    if status == 416:  # the requested range fits the listed size, so the size has changed
        return ChangedObject(f"{what}: its size changed after it was listed; {LIST_AGAIN}")
    message = " ".join(str(error.response.get("Error", {}).get("Message", "")).split())
    text = f"{what}: {code} (HTTP {status}){': ' + message if message else ''}"
    if (remedy_of_store := store_remedy(code, status, message, error.operation_name)) is not None:
        return DataError(f"{text}; {remedy_of_store}")
    if code == "InvalidObjectState":
        return ArchivedObject(f"{text}; restore the object from its archive class first")
    if code.startswith("KMS."):
        return DeniedObject(f"{text}; allow kms:Decrypt to these credentials, and enable the key")
    access = error.response.get(ACCESS, SIGNED)
    return DeniedObject(f"{text}; {refusal_remedy(status, message, error.operation_name, access)}")


def code_and_status(error: Any) -> tuple[str, int]:
    """Return the error code and the HTTP status in a ClientError of botocore."""
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    return code, int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error, limit=500)}"
