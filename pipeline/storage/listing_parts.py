"""What has been read of a long listing, kept beside the manifest until that is written: a new attempt reads the rest.

Stands between the ranges of a listing and a folder, local or on S3, so that it outlives the machine. A part is a file
with one stretch of keys, written whole; a part that is torn, or overlaps another, is dropped. No S3 listing here.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pyarrow as pa

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.key_range import Stretch
from dinoray.pipeline.storage.pages import LISTED
from dinoray.pipeline.storage.retry import DeniedObject, FailingObject, Unreachable

logger = logging.getLogger(__name__)

PART = ".dinoray-part-"
"""How the names of parts begin; a listing that comes upon them passes them over."""
OVER = f"{PART}over"
"""Name of the file that tells that the other parts are over."""
MAX_AGE_SECONDS = 24 * 3600.0
"""Age of a listing after which it is begun again. Its first keys are that old, and what has since been added among them
is missed; a day bridges a night in which a job has failed unseen."""
AFTER_SECONDS = 5.0
"""Seconds of listing before anything is written: a short listing is quicker than its parts."""
_THREADS = 16
_METADATA = b"dinoray.part"
_DIGEST_BYTES = 16


_OF_STORAGE = (Unreachable, DeniedObject, FailingObject)


class OutdatedPartsError(Exception):
    """The store no longer gives the keys that it gave before; the listing must begin again without parts."""


@contextlib.contextmanager
def resumable(directory: Directory) -> Iterator["ListingParts"]:
    """Give the parts of a listing, kept in `directory`; the caller calls `forget` once the manifest is written there.

    An error of the storage leaves them, and so does one of the listing; another, of a listing that was complete, is
    about the data, which will be changed, and drops them.
    """
    parts = ListingParts(directory)
    try:
        yield parts
    except DinorayError as error:
        if parts.is_complete and not isinstance(error, _OF_STORAGE):
            parts.forget()
        raise


class Part(NamedTuple):
    """A stretch and the time at which its listing began, in seconds since 1970."""

    stretch: Stretch
    begun: float

    def to_bytes(self) -> bytes:
        """Return a digest and, in Arrow's format of streams, the objects with all else as metadata."""
        start, end, after, batch = self.stretch
        about = json.dumps({"start": start, "end": end, "next": after, "begun": self.begun})
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, LISTED.with_metadata({_METADATA: about}), options=options) as writer:
            writer.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        return _digest(data) + data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Part | None":
        """Return the part, or None if its bytes are not what was written."""
        digest, rest = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if digest != _digest(rest):
            return None
        with pa.ipc.open_stream(rest) as reader:
            if reader.schema.names != LISTED.names:
                return None  # of an earlier version
            about = json.loads(reader.schema.metadata[_METADATA])
            batch = reader.read_next_batch().replace_schema_metadata(None)
        return cls(Stretch(about["start"], about["end"], about["next"], batch), about["begun"])


class ListingParts:
    """The parts of one listing in `directory`. Thread-safe. Keeps nothing before `open`."""

    def __init__(self, directory: Directory, clock: Callable[[], float] = time.time) -> None:
        self._directory, self._clock = directory, clock
        self._lock = threading.Lock()
        self._folder: Directory | None = None
        self._pending: list[Stretch] | None = None
        """What is not written yet; None where nothing is kept."""
        self._has_files = self._is_over = False
        self._opened = self._begun = 0.0
        self.stretches: list[Stretch] = []
        """What an earlier attempt has read, sorted, without overlaps."""
        self._of_sources: list[ListingParts] = []
        self.is_complete = False
        """Set once the listing has come to its end."""

    @contextlib.contextmanager
    def of_source(self) -> Iterator["ListingParts"]:
        """Give the parts of the listing of one of several sources, which are forgotten with these, as `resumable`."""
        with resumable(self._directory) as parts:
            self._of_sources.append(parts)
            yield parts

    def open(self, what: str) -> None:
        """Read what there is of the listing of `what`: a store, a bucket and a prefix, as text.

        Raises DataError if the directory cannot be read.
        """
        name = hashlib.blake2b(what.encode(), digest_size=6).hexdigest()
        self._folder = self._directory.child(f"listing-{name}")
        self._pending, self._opened = [], self._clock()
        names = [] if self._is_over else [one for one in self._folder.list() if one.startswith(PART)]
        if OVER in names:  # who wrote it was not allowed to delete, or ended before
            names = []
            with contextlib.suppress(DataError):
                self._delete_all(self._folder)
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = [part for part in pool.map(self._read, names) if part is not None]
        self._has_files = bool(names)
        parts = [part for part in parts if 0 <= self._opened - part.begun < MAX_AGE_SECONDS]
        self._begun = min((part.begun for part in parts), default=self._opened)
        self.stretches = _without_overlaps(part.stretch for part in parts)
        if self.stretches:
            began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self._begun))
            number = sum(stretch.batch.num_rows for stretch in self.stretches)
            logger.warning(
                "resuming a listing that began at %s UTC: %s keys are kept; delete %s to list them again",
                *(began, f"{number:,}", self._folder.uri),
            )

    def keep(self, stretch: Stretch) -> None:
        """Write a stretch, or hold it until the listing has taken some time. A folder that refuses it ends the keeping.

        A stretch whose keys are not in the order of their bytes ends it too.
        """
        with self._lock:  # also while files are written, so that none is after `forget`
            if self._pending is None:
                return
            self._pending.append(stretch)
            if self._clock() - self._opened < AFTER_SECONDS:
                return
            due, self._pending = self._pending, []
            if not all(one.is_in_order() for one in due):
                self._pending = None
                return
            try:
                for one in due:
                    self._has_files = True
                    self._write(Part(one, self._begun))
            except DataError as error:
                self._pending = None
                logger.warning("this listing cannot be resumed if it is interrupted: %s", error)

    def forget(self) -> None:
        """Keep nothing more, and delete all parts. Files that cannot be deleted stay, and are not read again."""
        for parts in self._of_sources:
            parts.forget()
        with self._lock:
            self._pending = None
        self._is_over, self.stretches = True, []
        if self._folder is None or not self._has_files:
            return
        try:
            self._folder.write(OVER, b"")  # first: whoever may write need not be allowed to delete
            self._delete_all(self._folder)
        except DataError as error:
            logger.warning(
                "parts of the listing are left in %s and can be deleted: %s", self._folder.uri, error
            )
        else:
            if not is_s3(self._folder.uri):
                with contextlib.suppress(OSError):
                    os.rmdir(self._folder.uri)

    @staticmethod
    def _delete_all(folder: Directory) -> None:
        names = [name for name in folder.list() if name.startswith(PART) and name != OVER]
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(folder.delete, names))
        folder.delete(OVER)

    def _read(self, name: str) -> Part | None:
        assert self._folder is not None
        with contextlib.suppress(MissingObject):  # another attempt has ended meanwhile
            return Part.from_bytes(self._folder.read(name))
        return None

    def _write(self, part: Part) -> None:
        assert self._folder is not None
        self._folder.write(f"{PART}{uuid.uuid4().hex}", part.to_bytes())


def _without_overlaps(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Return stretches, sorted, that do not overlap: two attempts at a time may have kept the same keys."""
    kept: list[Stretch] = []
    for stretch in sorted(stretches, key=lambda one: one.start):
        end = kept[-1].end if kept else ""
        if end is not None and end <= stretch.start and stretch.is_in_order():
            kept.append(stretch)
    return kept


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
