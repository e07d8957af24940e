"""Files on a local disk that are written as a whole or not at all, also while the disk is full.

A write that fails leaves no part of itself behind: it can be repeated, and other files keep their space. No Ray here.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.retry import FULL_NUMBERS, MissingObject

T = TypeVar("T")

TEMPORARY = ".dinoray-tmp"
"""End of the names of files that are being written."""


def replace_file(path: str, data: bytes) -> None:
    """Replace a file atomically: a reader gets the old or new bytes, even if the writer is killed. Raises OSError."""
    temporary = f"{path}.{uuid.uuid4().hex}{TEMPORARY}"
    with _full_disk_named(path, len(data)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _removed_on_error(temporary):
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)


def write_file(path: str, produce: Callable[[BinaryIO], T], *, num_bytes: int) -> T:
    """Write a file in place with `produce`, which writes some `num_bytes`; return its result. Raises OSError."""
    with _full_disk_named(path, num_bytes):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _removed_on_error(path), open(path, "wb") as file:
            result = produce(file)
            file.flush()
            os.fsync(file.fileno())
            return result


def append_to_file(path: str, data: bytes) -> None:
    """Append all of `data` to a file, or nothing of it. Raises OSError."""
    if not data:
        return
    with _full_disk_named(path, len(data)), open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


@contextlib.contextmanager
def local_errors(path: str, *, writing: bool = False) -> Iterator[None]:
    """Raise the same exceptions for local disks as for S3."""
    try:
        yield
    except FileNotFoundError as error:
        if writing:  # the file itself need not exist
            raise DataError(f"{path} cannot be written: {error.strerror}; check the folder") from error
        raise MissingObject(f"{path}: there is no such file; check the path") from error
    except OSError as error:
        if error.errno in FULL_NUMBERS:
            raise DataError(f"{path}: {error.strerror}; free space on its disk") from error
        raise DataError(f"{path}: {error.strerror or error}; check the path and its permissions") from error


@contextlib.contextmanager
def _full_disk_named(path: str, num_bytes: int) -> Iterator[None]:
    """Add to the error of a full disk how many bytes are needed and how many are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_NUMBERS:
            raise
        about = f"{os.strerror(error.errno)}: {num_bytes:,} bytes are needed"
        with contextlib.suppress(OSError):
            about += f", {shutil.disk_usage(os.path.dirname(path)).free:,} are free"
        raise OSError(error.errno, about) from error


@contextlib.contextmanager
def _removed_on_error(path: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
