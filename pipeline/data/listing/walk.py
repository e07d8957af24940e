"""List the files below a local folder, with links followed, and count what cannot be listed.

The part of listing.py for disks. Opens no file; no Ray here.
"""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator, Set
from typing import NamedTuple, TypeAlias

from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing.ignored import (
    BROKEN_LINK,
    CLOSED_FOLDER,
    LOOP,
    NOT_UTF8,
    OFTEN_LINKED,
    SPECIAL_FILE,
)

logger = logging.getLogger(__name__)

MOST_NAMES = 16
"""Links to one folder that are followed. Folders that link to each other would have more names than can be listed."""

_MOST_WARNINGS = 5

_Identity: TypeAlias = tuple[int, int]
"""Of a folder on this machine: device and inode."""


class File(NamedTuple):
    """A file: its path below the folder with slashes, its size in bytes, and a tag that changes with its content."""

    key: str
    size: int
    etag: str


def walk(root: str, left_out: Counter[str]) -> Iterator[File]:
    """Yield the files below `root`, and add to `left_out` what cannot be an image.

    Links are followed, also to folders, which so may have several names; a link to a folder that it lies in is a loop,
    and is left out. A link that leads nowhere is yielded with size 0 if it has a suffix, so that its image counts as
    missing. Names that are not UTF-8 are left out, since no manifest and no log can hold them; so are pipes, sockets
    and devices, and folders below `root` that may not be read or that have just been removed, with a warning. Raises
    DataError if `root` cannot be read, or a disk fails.
    """
    folders, names = [""], Counter[_Identity]()
    while folders:
        inner = folders.pop()
        folder, above = os.path.join(root, inner), None
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (PermissionError, FileNotFoundError) as error:
            if not inner:
                raise _unreadable(folder, error) from error
            left_out[CLOSED_FOLDER] += 1
            if left_out[CLOSED_FOLDER] <= _MOST_WARNINGS:
                logger.warning("%s; it is left out", _unreadable(folder, error))
            continue
        except OSError as error:
            raise _unreadable(folder, error) from error
        for entry in entries:
            key = f"{inner}{entry.name}"
            if not _is_folder(entry):
                if (file := file_at(entry.path, key, left_out)) is not None:
                    yield file
                continue
            if entry.is_symlink():
                above = above or _above(root, inner)
                if (reason := _is_left_out(entry.path, above, names)) is not None:
                    left_out[reason] += 1
                    continue
            folders.append(f"{key}/")


def file_at(path: str, key: str, left_out: Counter[str]) -> File | None:
    """Return the file at `path`; None for what is none, which is counted."""
    if not _is_utf8(key):
        left_out[NOT_UTF8] += 1
        return None
    try:
        status = os.stat(path)
    except OSError:
        if os.path.splitext(key)[1]:
            return File(key, 0, "")
        left_out[BROKEN_LINK] += 1
        return None
    if not stat.S_ISREG(status.st_mode):  # to read it could block, or never end
        left_out[SPECIAL_FILE] += 1
        return None
    return File(key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _is_left_out(link: str, above: Set[_Identity], names: Counter[_Identity]) -> str | None:
    """Return why a link to a folder is not followed; None if it is, which is added to `names`."""
    target = _identity(link)
    if target in above:
        return LOOP
    names[target] += 1
    return OFTEN_LINKED if names[target] > MOST_NAMES else None


def _above(root: str, inner: str) -> set[_Identity]:
    """Return the folder `inner` below `root` and all that it lies in, by its path and by where links on it lead."""
    found, path = set[_Identity](), root
    for name in ["", *inner.split("/")[:-1]]:
        path = os.path.join(path, name)
        real = os.path.realpath(path)
        while True:
            found.add(_identity(real))
            if real == (real := os.path.dirname(real)):
                break
    return found


def _identity(folder: str) -> _Identity:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return status.st_dev, status.st_ino


def _unreadable(folder: str, error: OSError) -> DataError:
    return DataError(f"{folder}: {error.strerror}; make the folder readable")


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_utf8(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
