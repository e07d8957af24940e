"""The files of one checkpoint: checksums when they are written, and what is wrong with them when they are read.

meta.json is written last, so that where it is, the other files are complete. It has the checksum of each file, of the
bytes that were to be written, and its own. No torch and no Ray here.
"""

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from dinoray.models.commands import command
from dinoray.models.errors import DataError, one_line
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.run_dir import (
    CHECKPOINTS,
    META,
    STUDENT,
    TEACHER,
    TRAIN_STATE,
    committed_checkpoints,
)

FORMAT = 3
"""Format of meta.json. Format 2, which has no checksums, is read too."""
_WITHOUT_CHECKSUMS = 2
FILES = (STUDENT, TEACHER, TRAIN_STATE, META)
"""The files of a checkpoint, in the order in which they are written."""
_CHECKSUMS, _BYTES = "checksums", "file_bytes"
_STEP = re.compile(r"step_(\d{8,})")
_CHUNK_BYTES = 4 << 20


class DamagedCheckpointError(DataError):
    """The files of a checkpoint are not as they were written: `what` is wrong, at `address`."""

    def __init__(self, address: str, what: str) -> None:
        super().__init__(address, what)
        self.address, self.what = address, what

    def __str__(self) -> str:
        run, inside, _ = self.address.rpartition(f"/{CHECKPOINTS}/")
        others = f" of the run (`{command('doctor', run)}` checks all)" if inside else ""
        return (
            f"checkpoint {self.address} is damaged: {self.what}; "
            f"pass another checkpoint{others}, or restore it from a copy"
        )


class WrittenFile:
    """Passes on what is written to `file`; counts its bytes and computes their checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._crc = file, 0
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        """Append `data`."""
        self._crc = zlib.crc32(data, self._crc)
        self.num_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Do nothing; torch.save calls it."""

    @property
    def checksum(self) -> str:
        """The checksum of all bytes so far."""
        return _shown(self._crc)


def meta_json(meta: Mapping[str, Any], written: Mapping[str, WrittenFile]) -> bytes:
    """Return meta.json, once the other files are `written`: `meta`, their sizes and checksums, and its own checksum."""
    whole = {"format": FORMAT, **meta, _BYTES: {name: file.num_bytes for name, file in written.items()}}
    whole[_CHECKSUMS] = {name: file.checksum for name, file in written.items()}
    whole = json.loads(json.dumps(whole))  # as it will be read: JSON has only text for keys
    whole[_CHECKSUMS][META] = _own_checksum(whole)
    return json.dumps(whole, indent=1).encode()


def read_meta(checkpoint: Directory, *, address: str | None = None) -> dict[str, Any]:
    """Read a checkpoint's meta.json and check its format, its checksum, and its step against the folder's name.

    `address`: of the checkpoint, if `checkpoint` is a copy of it. Raises DamagedCheckpointError, and DataError for a
    whole file of another format.
    """
    address = address or checkpoint.uri
    try:
        meta = json.loads(checkpoint.read(META))
        found, step = meta["format"], meta["step"]
        own = meta.get(_CHECKSUMS, {}).get(META)
        changed = own is not None and own != _own_checksum(meta)
    except MissingObject as error:
        raise DamagedCheckpointError(address, f"it lacks {META}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{META} is not that of a checkpoint ({type(error).__name__}: {one_line(error, limit=100)})"
        raise DamagedCheckpointError(address, what) from error
    if changed:
        raise DamagedCheckpointError(
            address, f"{META} has checksum {_own_checksum(meta)}, not {own} as written"
        )
    if found not in (_WITHOUT_CHECKSUMS, FORMAT):
        raise DataError(
            f"checkpoint {address} has format {found}, this version reads {_WITHOUT_CHECKSUMS} and {FORMAT}; "
            "use the version of dinoray that wrote it"
        )
    if found == FORMAT and own is None:
        raise DamagedCheckpointError(address, f"{META} has no checksums")
    named = _STEP.fullmatch(address.rpartition("/")[2])
    if named and int(named[1]) != step:
        raise DamagedCheckpointError(
            address, f"{META} is of step {step}, the folder's name of step {int(named[1])}"
        )
    return meta


def has_checksums(meta: Mapping[str, Any]) -> bool:
    """Return False for a checkpoint of an earlier version, whose files can be checked by their sizes at most."""
    return _CHECKSUMS in meta


def verify(
    checkpoint: Directory, files: Iterable[str] = FILES, *, address: str | None = None
) -> dict[str, Any]:
    """Return the meta data, once `files` are known to be as written. Raises as `read_meta`."""
    meta = read_meta(checkpoint, address=address)
    for what in wrong_files(checkpoint, meta, files):
        raise DamagedCheckpointError(address or checkpoint.uri, what)
    return meta


def wrong_files(
    checkpoint: Directory, meta: Mapping[str, Any], files: Iterable[str] = FILES
) -> Iterator[str]:
    """Yield what is wrong with each of `files` besides meta.json: it is missing, or has another size or checksum."""
    sizes, checksums = meta.get(_BYTES) or {}, meta.get(_CHECKSUMS) or {}
    for file in files:
        if file == META:
            continue
        try:
            size, expected = checkpoint.size(file), sizes.get(file)
            if expected not in (None, size):
                yield f"{file} has {size:,} bytes, not {expected:,} as written"
            elif file in checksums and (found := _checksum_of(checkpoint, file)) != checksums[file]:
                yield f"{file} has checksum {found}, not {checksums[file]} as written"
            elif has_checksums(meta) and file not in checksums:
                yield f"{META} has no checksum of {file}"
        except MissingObject:
            yield f"it lacks {file}"


def newest_meta(run: Directory) -> dict[str, Any] | None:
    """Return the meta data of the newest committed checkpoint that has them whole; None before the first checkpoint.

    Raises DamagedCheckpointError of the newest checkpoint if none has.
    """
    first: DamagedCheckpointError | None = None
    for name in reversed(committed_checkpoints(run)):
        try:
            return read_meta(run.child(CHECKPOINTS).child(name))
        except DamagedCheckpointError as error:
            first = first or error
    if first is not None:
        raise first
    return None


def _checksum_of(checkpoint: Directory, file: str) -> str:
    if is_s3(checkpoint.uri):
        return _shown(zlib.crc32(checkpoint.read(file)))
    crc, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    try:
        with open(checkpoint.join(file), "rb", buffering=0) as stream:
            while num_bytes := stream.readinto(buffer):
                crc = zlib.crc32(buffer[:num_bytes], crc)
    except OSError as error:
        raise DataError(f"{checkpoint.join(file)}: {error.strerror or error}; check the disk") from error
    return _shown(crc)


def _own_checksum(meta: Mapping[str, Any]) -> str:
    """Return the checksum of meta.json's content without that checksum itself."""
    checksums = {name: value for name, value in meta[_CHECKSUMS].items() if name != META}
    text = json.dumps({**meta, _CHECKSUMS: checksums}, sort_keys=True, separators=(",", ":"))
    return _shown(zlib.crc32(text.encode()))


def _shown(crc: int) -> str:
    return f"crc32:{crc:08x}"
