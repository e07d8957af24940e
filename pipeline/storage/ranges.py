"""Basic reads of files on a disk, with the errors of reads from S3; and a range of bytes of either. No Ray here."""

import os

from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.retry import (
    LIST_AGAIN,
    ChangedObject,
    DeniedObject,
    MissingObject,
    ObjectTooLarge,
    Retry,
    retrying,
)
from dinoray.pipeline.storage.s3 import read_object


def read_file(
    path: str,
    *,
    byte_range: tuple[int, int] | None = None,
    listed_bytes: int | None = None,
    max_bytes: int | None = None,
    retry: Retry = retrying,
) -> bytes:
    """Return the bytes of one file, or its bytes [first, last], both included; `retry` the whole read.

    Raises MissingObject, DeniedObject, ObjectTooLarge if the file is over `max_bytes`, and ChangedObject if it has no
    longer `listed_bytes`. Not by its time, which differs between copies on several nodes.
    """

    def read() -> bytes:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise ObjectTooLarge(f"{path} holds {size} bytes, more than {max_bytes}")
            if listed_bytes not in (None, size):
                raise ChangedObject(f"{path} has {size} bytes, not {listed_bytes} as listed; {LIST_AGAIN}")
            if byte_range is None:
                return file.read()
            first, last = byte_range
            file.seek(first)
            data = file.read(last - first + 1)
            if len(data) <= last - first:
                raise ChangedObject(f"{path} ends before its byte {last}; {LIST_AGAIN}")
            return data

    try:
        return retry(read, what=path)
    except PermissionError as error:
        raise DeniedObject(f"{path}: {error.strerror}; make it readable") from error
    except OSError as error:
        raise MissingObject(f"{path}: {error.strerror or error}") from error


def read_range(
    uri: str,
    byte_range: tuple[int, int],
    *,
    listed_bytes: int | None = None,
    etag: str | None = None,
    retry: Retry = retrying,
    access: Access = SIGNED,
) -> bytes:
    """Return the bytes [first, last], both included, of an object or file: one request. Raises as `read_object`."""
    if not is_s3(uri):
        return read_file(uri, byte_range=byte_range, listed_bytes=listed_bytes, retry=retry)
    bucket, key = split_s3_uri(uri)
    return read_object(
        bucket, key, byte_range=byte_range, listed_bytes=listed_bytes, etag=etag, retry=retry, access=access
    )
