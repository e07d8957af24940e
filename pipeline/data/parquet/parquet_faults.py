"""What is wrong with a Parquet file that cannot be read: damaged, or whole and beyond this program."""

import contextlib
from typing import Any

import pyarrow as pa

from dinoray.models.errors import DataError, ResourceError
from dinoray.pipeline.storage.retry import (
    LIST_AGAIN,
    ArchivedObject,
    DeniedObject,
    FailingObject,
    MissingObject,
    may_pass,
)

FAULTS = (pa.ArrowException, OSError, EOFError, UnicodeDecodeError)
"""What pyarrow raises for files that it cannot read; UnicodeDecodeError for names of columns."""
DECRYPT = "decrypt it or remove it"
_STARTS = {
    b"PARE": ("encrypted", DECRYPT),
    b"\x1f\x8b": ("compressed as a whole by gzip", "decompress it with gunzip, or remove it"),
    b"BZh": ("compressed as a whole by bzip2", "decompress it with bunzip2, or remove it"),
    b"\x28\xb5\x2f\xfd": ("compressed as a whole by zstd", "decompress it with unzstd, or remove it"),
    b"ARROW1": ("an Arrow file, not Parquet", "write it again as Parquet, or remove it"),
    b"ORC": ("an ORC file, not Parquet", "write it again as Parquet, or remove it"),
}
"""First bytes -> what the file is, and what to do."""


class CorruptShard(DataError):  # noqa: N818
    """The object is not Parquet, or no longer matches its footer."""


class UnsupportedShard(CorruptShard):
    """The file may be whole, but it cannot be read here: reading it again does not help."""


UNREADABLE = (CorruptShard, DeniedObject, ArchivedObject, FailingObject)
"""Errors of one shard, which is left out."""


def unreadable(uri: str, file: Any, error: Exception) -> Exception:
    """Return the error to raise for what pyarrow raised about the open `file`."""
    if isinstance(error, FileNotFoundError):
        return MissingObject(f"{uri}: there is no such file; {LIST_AGAIN}")
    if isinstance(error, PermissionError):
        return DeniedObject(f"{uri}: {error}; check the file's permissions")
    if isinstance(error, OSError) and may_pass(error):
        return error  # it says nothing of the file
    reason = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return ResourceError(f"{uri}: {reason}; give each node more memory, or lower data.fetch_buffer_bytes")
    start = _start(file)
    known = next((found for magic, found in _STARTS.items() if start.startswith(magic)), None)
    if "crypt" in reason.lower():
        known = _STARTS[b"PARE"]
    if known:
        return UnsupportedShard(f"{uri} is {known[0]}; {known[1]}")
    if isinstance(error, pa.ArrowNotImplementedError):
        return UnsupportedShard(
            f"{uri} is written in a way that pyarrow {pa.__version__} cannot read ({reason}); write it again or "
            "remove it"
        )
    return CorruptShard(f"{uri} is not a readable Parquet file: {reason}; write it again or remove it")


def check_codec(uri: str, codec: str) -> None:
    """Raise UnsupportedShard if pyarrow here was built without this compression, by its name in a footer."""
    name = codec.lower()
    if name != "uncompressed" and not _is_built(name):
        raise UnsupportedShard(
            f"{uri} is compressed by {codec}, which pyarrow {pa.__version__} here cannot decompress; write it again "
            "with zstd or snappy, or remove it"
        )


def _is_built(codec: str) -> bool:
    try:
        return bool(pa.Codec.is_available(codec))
    except (pa.ArrowException, ValueError):
        return False


def _start(file: Any) -> bytes:
    with contextlib.suppress(*FAULTS, DataError, ValueError, AttributeError):
        file.seek(0)
        return bytes(file.read(8))
    return b""
