"""One interface to local folders and `s3://bucket/prefix`, whose files are read and written whole.

Run directories, checkpoints and manifests use it. Nothing here holds a secret (see storage/s3.py), so
everything here can be pickled and sent to any node. No images, no manifests and no Ray here.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit

import pyarrow.fs

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.addresses import is_s3, is_shared_path, normal_uri, split_s3_uri
from dinoray.pipeline.storage.arrow_s3 import RenewedS3
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.local_files import TEMPORARY, local_errors, replace_file, write_file
from dinoray.pipeline.storage.object_writer import ObjectWriter
from dinoray.pipeline.storage.retry import (
    ChangedObject,
    DeniedObject,
    MissingObject,
    ObjectTooLarge,
    Retry,
    Unreachable,
    guarded,
    retrying,
)
from dinoray.pipeline.storage.s3 import list_pages, read_object, s3_client
from dinoray.pipeline.storage.unsaved import patient_write
from dinoray.pipeline.storage.waiting import Patient

__all__ = [
    "ChangedObject",
    "Directory",
    "MissingObject",
    "ObjectTooLarge",
    "Unreachable",
    "check_bucket",
    "filesystem",
    "is_s3",
    "is_shared_path",
    "normal_uri",
    "retrying",
    "s3_client",
    "split_s3_uri",
]

T = TypeVar("T")

_AWS_HOST = re.compile(r"s3([.-][a-z0-9-]+)*\.amazonaws\.com(\.cn)?")


def filesystem(
    uri: str,
    *,
    give_up_after_seconds: float | None = None,
    guard: Callable[[], object] | None = None,
) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return a pyarrow filesystem and the path of `uri` in it; a relative local path becomes absolute.

    For S3, endpoint, scheme, region and keys come from botocore. Each call asks for the keys anew, because they may
    expire. So a pickled filesystem contains no secret. Raises DataError with the bucket's name if it is missing or
    forbidden, so that the first checkpoint does not fail later. `give_up_after_seconds` and `guard` as in RenewedS3.
    """
    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), normal_uri(uri)
    bucket, key = split_s3_uri(uri)
    client = s3_client()
    answer = retrying(partial(client.head_bucket, Bucket=bucket), what=f"s3://{bucket}")
    endpoint = urlsplit(client.meta.endpoint_url)
    options: dict[str, Any] = {}
    if not _AWS_HOST.fullmatch(endpoint.netloc):
        virtual = (client.meta.config.s3 or {}).get("addressing_style") == "virtual"
        options |= {"endpoint_override": endpoint.netloc, "force_virtual_addressing": virtual}
    if os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = os.environ["AWS_CA_BUNDLE"]  # pyarrow does not read it
    options |= {
        "region": answer.get("BucketRegion") or client.meta.region_name,
        "scheme": endpoint.scheme,
    }
    return pyarrow.fs.PyFileSystem(
        RenewedS3(options, give_up_after_seconds, guard)
    ), f"{bucket}/{key}".rstrip("/")


def check_bucket(uri: str, access: Access = SIGNED) -> None:
    """Raise DataError soon if the bucket of an `s3://` address does not answer or does not exist.

    Credentials that may read objects need not be allowed to ask for the bucket.
    """
    if is_s3(uri):
        bucket, _ = split_s3_uri(uri)
        with contextlib.suppress(DeniedObject):
            retrying(partial(s3_client(access).head_bucket, Bucket=bucket), what=f"s3://{bucket}")


def check_writable(uri: str, *, setting: str) -> None:
    """Make a local folder; raise DataError, which names `setting`, if no file can be made in it."""
    if is_s3(uri):
        return
    uri = normal_uri(uri)
    try:
        os.makedirs(uri, exist_ok=True)
        with tempfile.TemporaryFile(dir=uri):
            pass
    except OSError as error:
        raise DataError(
            f"{setting}={uri}: no file can be made there ({error.strerror or error}); "
            f"set {setting} to a folder that you may write to"
        ) from error


@dataclass(frozen=True)
class Directory:
    """A folder, local or on S3, with small files that are read and written whole; picklable, no secrets.

    A folder exists only through its files. Every failure is a DataError with the file's full name; a missing
    file is a MissingObject.
    """

    uri: str
    give_up_after_seconds: float | None = None
    """How long reads and writes of files wait for storage that does not answer or is full; None: a few attempts."""
    guard: Callable[[], object] | None = None
    """Called before each attempt to change a file; what it raises ends the write, unless it is Unreachable."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", normal_uri(self.uri))

    def patient(self, give_up_after_seconds: float | None) -> "Directory":
        """Return the same folder, whose reads and writes wait for so long."""
        return replace(self, give_up_after_seconds=give_up_after_seconds)

    def guarded(self, guard: Callable[[], object]) -> "Directory":
        """Return the same folder, in which files are changed only as long as `guard` does not raise.

        A write may be repeated for minutes: what held before its first attempt may not hold before its last.
        """
        return replace(self, guard=guard)

    def join(self, *parts: str) -> str:
        """Return the full address of a path in this folder; `parts` are relative, with forward slashes."""
        return "/".join([self.uri.rstrip("/"), *(part.strip("/") for part in parts)])

    def child(self, name: str) -> "Directory":
        """Return the folder `name` in this folder."""
        return replace(self, uri=self.join(name))

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Raises MissingObject if it does not exist."""
        uri = self.join(name)
        if is_s3(uri):
            seconds = self.give_up_after_seconds
            return read_object(*split_s3_uri(uri), retry=retrying if seconds is None else Patient(seconds))
        with local_errors(uri), open(uri, "rb") as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """Replace a file atomically: a reader gets the old or new bytes, even if the writer is killed."""
        uri = self.join(name)
        if is_s3(uri):
            bucket, key = split_s3_uri(uri)
            self._retry_write(partial(s3_client().put_object, Bucket=bucket, Key=key, Body=data), what=uri)
        else:
            self.on_disk(partial(replace_file, uri, data), path=uri)

    def write_pieces(self, name: str, produce: Callable[[BinaryIO], T], *, num_bytes: int) -> T:
        """Write a large file with `produce`, which writes some `num_bytes`, and return its result.

        The file is not replaced atomically on a disk. `produce` is called again if a disk was full.
        """
        uri = self.join(name)
        if not is_s3(uri):
            return self.on_disk(lambda: write_file(uri, produce, num_bytes=num_bytes), path=uri)
        writer = ObjectWriter(uri, self._retry_write)
        try:
            result = produce(cast(BinaryIO, writer))
            writer.close()
        except BaseException:
            writer.abort()
            raise
        return result

    def on_disk(self, write: Callable[[], T], *, path: str) -> T:
        """Return the result of a write to the local `path`, which raises OSError; repeat it as other writes."""
        with local_errors(path, writing=True):
            if self.give_up_after_seconds is not None:
                return self._retry_write(write, what=path)
            if self.guard is not None:
                self.guard()
            return write()

    @property
    def _retry_write(self) -> Retry:
        seconds = self.give_up_after_seconds
        retry = retrying if seconds is None else patient_write(seconds)
        return retry if self.guard is None else guarded(retry, self.guard)

    def exists(self, name: str) -> bool:
        """Return True if a file (not a folder) of this name exists."""
        uri = self.join(name)
        if not is_s3(uri):
            return os.path.isfile(uri)
        try:
            self.size(name)
        except MissingObject:
            return False
        return True

    def size(self, name: str) -> int:
        """Return the bytes in a file. Raises MissingObject if it does not exist."""
        uri = self.join(name)
        if is_s3(uri):
            bucket, key = split_s3_uri(uri)
            head = retrying(partial(s3_client().head_object, Bucket=bucket, Key=key), what=uri)
            return int(head["ContentLength"])
        with local_errors(uri):
            return os.path.getsize(uri)

    def list(self) -> list[str]:
        """Return the sorted names of files and folders directly in this folder, [] if it does not exist."""
        if is_s3(self.uri):
            bucket, prefix = split_s3_uri(self.join(""))
            names: set[str] = set()
            for page in list_pages(bucket, prefix, delimiter="/"):
                names.update(key[len(prefix) :] for key in page.objects.keys)
                names.update(folder[len(prefix) : -1] for folder in page.folders)
            return sorted(names - {""})
        if not os.path.lexists(self.uri):
            return []
        with local_errors(self.uri):
            return sorted(name for name in os.listdir(self.uri) if not name.endswith(TEMPORARY))

    def delete(self, name: str) -> None:
        """Remove a file; a missing file is no error."""
        uri = self.join(name)
        if is_s3(uri):
            bucket, key = split_s3_uri(uri)
            self._retry_write(partial(s3_client().delete_object, Bucket=bucket, Key=key), what=uri)
            return
        if self.guard is not None:
            self.guard()
        with local_errors(uri), contextlib.suppress(FileNotFoundError):
            os.unlink(uri)

    def remove(self) -> None:
        """Remove the folder with the files in it; a missing folder is no error."""
        if is_s3(self.uri):
            for name in (
                *self.list(),
                "",
            ):  # the last is the folder's own marker, which some stores and clients make
                self.delete(name)
        elif os.path.lexists(self.uri):
            with local_errors(self.uri):
                shutil.rmtree(self.uri)
