"""Rows of one row group: in memory, or in a temporary file where they are too many for it.

A row group is read whole, since its rows are shuffled. Others write row groups of several gigabytes. Those are written
to a file in the folder for temporary files (TMPDIR) as they arrive, a batch at a time, and mapped from there: the
system keeps in memory what it has room for. The file has no name once it is written, so it goes with the process.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterator

import pyarrow as pa

from dinoray.models.errors import ResourceError

LEAST_BYTES = 64 << 20
"""Smaller row groups are always kept in memory."""


def most_in_memory(cache_bytes: int) -> int:
    """Return the bytes up to which a row group is kept in memory, by `data.row_group_cache_bytes`."""
    return max(cache_bytes, LEAST_BYTES)


def collect(batches: Iterator[pa.RecordBatch], *, max_bytes: int, what: str) -> pa.Table:
    """Return all rows of `batches`; more than `max_bytes` of them from a file.

    Raises ResourceError, which names `what` is read, if the disk of temporary files has no room.
    """
    held, num_bytes = deque[pa.RecordBatch](), 0
    for batch in batches:
        held.append(batch)
        num_bytes += batch.nbytes
        if num_bytes > max_bytes:
            return _from_file(_chained(held, batches), held[0].schema, what)
    return pa.Table.from_batches(held, None if held else pa.schema([]))


def _chained(held: deque[pa.RecordBatch], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    while held:
        yield held.popleft()  # no longer needed in memory
    yield from batches


def _from_file(batches: Iterator[pa.RecordBatch], schema: pa.Schema, what: str) -> pa.Table:
    descriptor, path = _temporary_file(what)
    os.close(descriptor)
    try:
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in batches:
                _write(writer, batch, what)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()
    finally:
        os.unlink(path)


def _temporary_file(what: str) -> tuple[int, str]:
    try:
        return tempfile.mkstemp(prefix="dinoray-row-group-")
    except OSError as error:
        raise _no_room(what, error) from error


def _write(writer: pa.RecordBatchFileWriter, batch: pa.RecordBatch, what: str) -> None:
    try:
        writer.write_batch(batch)
    except OSError as error:
        raise _no_room(what, error) from error


def _no_room(what: str, error: OSError) -> ResourceError:
    return ResourceError(
        f"{what}: a row group that is too large for memory is kept in {tempfile.gettempdir()} ({error}); free space "
        "there, set TMPDIR to a larger disk, or raise data.row_group_cache_bytes"
    )
