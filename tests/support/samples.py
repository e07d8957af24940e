"""Small data sets for the tests: a folder, a bucket, a Parquet shard, the shared collection of bad files."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import SHARED
from servers import S3Server

from dinoray.pipeline.storage import pages

HOSTILE = SHARED / "hostile"
needs_hostile = pytest.mark.skipif(not HOSTILE.is_dir(), reason="the shared sample data is not here")


class HostileEntry(NamedTuple):
    """One object that a bucket may hold: its key, its bytes, and what is to become of it."""

    key: str
    data: bytes
    expect: str


def hostile_entries() -> list[HostileEntry]:
    """The shared collection; keys that stand for a key alone get made-up bytes, folder markers none."""
    entries = [entry for entry in json.loads((HOSTILE / "manifest.json").read_text()) if entry["key"]]
    return [HostileEntry(entry["key"], _bytes_of(entry), entry["expect"]) for entry in entries]


def _bytes_of(entry: dict[str, Any]) -> bytes:
    if entry["file"]:
        return (HOSTILE / entry["file"]).read_bytes()
    if entry["expect"] == "decode" and "." not in entry["key"]:
        return b"\xff\xd8\xff"  # what tells that it is an image
    return b"" if entry["key"].endswith("/") else b"some bytes"


def put_all(s3: S3Server, bucket: str, objects: dict[str, bytes]) -> None:
    """Put objects into a bucket, many at a time, by a client of our own.

    SeaweedFS may lose one of two that it gets at once if one has the name of the other's folder: those come first.
    """
    client = s3.client()
    folders = {str(folder) for key in objects for folder in PurePosixPath(key).parents}
    for keys in (objects.keys() & folders, objects.keys() - folders):
        with ThreadPoolExecutor(16) as pool:
            puts = [pool.submit(client.put_object, Bucket=bucket, Key=k, Body=objects[k]) for k in keys]
        for put in puts:
            put.result()


def small_pages(patch: pytest.MonkeyPatch, most: int) -> None:
    """Have pages of listings hold at most so many keys: else only thousands of objects are several pages."""
    request = pages.request_page
    patch.setattr(pages, "request_page", lambda call, **how: request(call, **({"MaxKeys": most} | how)))


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder, making the folders between."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def parquet(columns: dict[str, Any], *, row_group_size: int = 2, **options: Any) -> bytes:
    """A Parquet file of these columns."""
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=row_group_size, **options)
    return sink.getvalue()
