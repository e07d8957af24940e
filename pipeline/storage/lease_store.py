"""Where the record of a lease is kept: an object of S3, or numbered files of a folder.

Both replace the record only if it is still the one that was read: S3 by If-None-Match and If-Match, a folder by making
the file with the next number, which one process alone can do, also on a network file system. No Ray here.
"""

import contextlib
import os
from typing import Any, Protocol

import botocore.exceptions

from dinoray.pipeline.storage.files import Directory, is_s3, split_s3_uri
from dinoray.pipeline.storage.lease import Failed, Found, Read, Record, Reply, Request, Write, Written
from dinoray.pipeline.storage.local_files import local_errors
from dinoray.pipeline.storage.retry import MissingObject, code_and_status, retrying
from dinoray.pipeline.storage.run_dir import LEASE, LEASE_FILE
from dinoray.pipeline.storage.s3 import etag_of, s3_client

READ_SECONDS = 5.0
"""Longest pause within a response. A renewal that hangs must leave time for others within the term."""
_NO_ETAG = "0" * 32
"""An ETag that no object has."""


class LeaseStore(Protocol):
    """Keeps the record of one directory."""

    def perform(self, request: Request, *, attempts: int = 5) -> Reply:
        """Carry a request out. Raises DataError if it fails for another reason than a conflict."""
        ...

    def is_conditional(self, record: Record) -> bool:
        """Return False if the store ignores conditions, or lacks them; `record` is the one that was written last."""
        ...


def lease_store(directory: Directory) -> LeaseStore:
    """Return the store of a directory's lease."""
    return BucketStore(directory) if is_s3(directory.uri) else FolderStore(directory)


class BucketStore:
    """The record as an object; its token is the object's ETag."""

    def __init__(self, directory: Directory) -> None:
        self._uri = directory.join(LEASE)
        self._bucket, self._key = split_s3_uri(self._uri)
        self._has_conditions = True

    def perform(self, request: Request, *, attempts: int = 5) -> Reply:
        """See LeaseStore."""
        if isinstance(request, Read):
            return self._read(attempts)
        if not self._has_conditions:  # not atomic, but drivers that start one after the other are kept apart
            if self._read(attempts).token != request.token:
                return Failed.CONFLICT
            reply = self._put(request.record, {}, attempts)
        else:
            reply = self._put(request.record, _condition(request.token), attempts)
        return self.perform(request, attempts=attempts) if reply is None else reply

    def is_conditional(self, record: Record) -> bool:
        """See LeaseStore. Two writes that no store with conditions carries out."""
        for condition in (_condition(None), _condition(_NO_ETAG)):
            if self._has_conditions and isinstance(self._put(record, condition, attempts=3), Written):
                self._has_conditions = False
        return self._has_conditions

    def _read(self, attempts: int) -> Found:
        def get() -> Found:
            answer = self._client().get_object(Bucket=self._bucket, Key=self._key)
            with contextlib.closing(answer["Body"]) as body:
                return Found(Record.decode(body.read()), etag_of(answer))

        try:
            return retrying(get, what=self._uri, attempts=attempts)
        except MissingObject:
            return Found(None, None)

    def _put(self, record: Record, condition: dict[str, str], attempts: int) -> Written | Failed | None:
        """Write if the condition holds; None, and no condition ever again, if the store has none."""

        def put() -> Written | Failed | None:
            try:
                answer = self._client().put_object(
                    Bucket=self._bucket, Key=self._key, Body=record.encode(), **condition
                )
            except botocore.exceptions.ClientError as error:
                code, status = code_and_status(error)
                if condition and (status in (409, 412) or code == "NoSuchKey"):
                    return Failed.CONFLICT
                if condition and status == 501:
                    self._has_conditions = False
                    return None
                raise
            return Written(etag_of(answer))

        return retrying(put, what=self._uri, attempts=attempts)

    def _client(self) -> Any:
        return s3_client(read_seconds=READ_SECONDS)


def _condition(token: str | None) -> dict[str, str]:
    return {"IfNoneMatch": "*"} if token is None else {"IfMatch": f'"{token}"'}


class FolderStore:
    """The record as the file with the highest number; its token is that number.

    Numbers only grow, and the newest file is never removed: so a process that was asleep cannot write over a newer one.
    """

    def __init__(self, directory: Directory) -> None:
        self._folder = directory.uri

    def perform(self, request: Request, *, attempts: int = 5) -> Reply:
        """See LeaseStore."""
        with local_errors(self._folder, writing=isinstance(request, Write)):
            return self._read() if isinstance(request, Read) else self._write(request)

    def is_conditional(self, record: Record) -> bool:
        """See LeaseStore."""
        return True

    def _numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        try:
            names = os.listdir(self._folder)
        except (FileNotFoundError, NotADirectoryError):  # for the latter, a writer has a better message
            return []
        return sorted(int(match[1]) for name in names if (match := LEASE_FILE.fullmatch(name)) and match[1])

    def _path(self, number: int) -> str:
        return f"{self._folder}/{LEASE.replace('.', f'-{number:08d}.')}"

    def _read(self) -> Found:
        # A listing may miss both of two files, if one takes the other's place meanwhile: so an empty one is made twice.
        while numbers := self._numbers() or self._numbers():
            with contextlib.suppress(FileNotFoundError), open(self._path(numbers[-1]), "rb") as file:
                return Found(Record.decode(file.read()), str(numbers[-1]))
        return Found(None, None)

    def _write(self, request: Write) -> Reply:
        os.makedirs(self._folder, exist_ok=True)
        number = int(request.token or 0) + 1
        try:
            file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return Failed.CONFLICT
        try:
            with open(file, "wb") as stream:
                stream.write(request.record.encode())
        except OSError:
            self._remove(number)
            raise
        numbers = self._numbers()
        if numbers[-1] != number:  # the file of this number was removed long ago, for a newer one
            self._remove(number)
            return Failed.CONFLICT
        for old in numbers[:-1]:
            self._remove(old)
        return Written(str(number))

    def _remove(self, number: int) -> None:
        with contextlib.suppress(OSError):  # another user's old file does no harm
            os.unlink(self._path(number))
