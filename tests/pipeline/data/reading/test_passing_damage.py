"""What passes is no damage to a shard: errors of a disk, and bytes that arrive damaged once."""

import errno
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import FaultProxy
from samples import put_all, write_all
from servers import S3Server
from sources import IMAGES, as_shard, fetch_all, source_of

from dinoray.pipeline.data.parquet.footers import FooterCache
from dinoray.pipeline.data.reading.source import Status

SHARDS = {f"{number}.parquet": as_shard(IMAGES, row_group_size=4) for number in range(3)}


@pytest.fixture(params=[errno.EMFILE, errno.EIO, errno.ESTALE])
def flaky_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A disk on which each first attempt to open a file fails; the attempts by file."""
    opened: Counter[str] = Counter()
    really = pa.OSFile

    def open_file(path: str, *args: Any) -> Any:
        opened[path] += 1
        if opened[path] == 1:
            raise OSError(request.param, os.strerror(request.param), path)
        return really(path, *args)

    monkeypatch.setattr(pa, "OSFile", open_file)
    return opened


def test_an_error_of_the_disk_that_passes_leaves_no_shard_out(
    tmp_path: Path, flaky_disk: Counter[str]
) -> None:
    write_all(tmp_path, SHARDS)
    source = source_of(str(tmp_path), image_column="jpeg")
    assert source.manifest.damaged == ()
    assert source.num_images == 3 * len(IMAGES)
    assert flaky_disk
    flaky_disk.clear()
    assert {found.status for found in fetch_all(source)} == {Status.OK}
    assert len(flaky_disk) == 3


def test_a_file_that_is_no_parquet_is_damaged_still(tmp_path: Path) -> None:
    write_all(tmp_path, SHARDS)
    (tmp_path / "2.parquet").write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    source = source_of(str(tmp_path), image_column="jpeg")
    assert list(source.manifest.damaged) == ["2.parquet"]
    (tmp_path / "1.parquet").write_bytes(SHARDS["1.parquet"][:-100] + bytes(100))
    statuses = Counter(found.status for found in fetch_all(source))
    assert statuses == {Status.OK: len(IMAGES), Status.CORRUPT: len(IMAGES)}


@pytest.mark.s3
def test_a_footer_that_arrives_damaged_once_leaves_no_shard_out(
    proxy: FaultProxy, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(s3, bucket, SHARDS)
    monkeypatch.setattr(faults, "_flip_middle_byte", lambda data: data[:-60] + bytes(40) + data[-20:])
    proxy.fail("corrupt", pattern=r"^GET .*/[12]\.parquet", times=2)
    source = source_of(f"s3://{bucket}", image_column="jpeg")
    assert source.manifest.damaged == ()
    assert source.num_images == 3 * len(IMAGES)


@pytest.mark.s3
def test_a_footer_that_many_groups_need_at_once_is_read_once(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, SHARDS)
    source = source_of(f"s3://{bucket}", image_column="jpeg", row_group_cache_bytes=0)
    before = proxy.count(r"^GET .*\.parquet")
    fetch_all(source)
    groups = 3 * -(-len(IMAGES) // 4)
    assert proxy.count(r"^GET .*\.parquet") - before == groups + 3


def footer(number: int) -> pq.FileMetaData:
    """That of a file which no other number gives."""
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": list(range(number + 1))}), file)
    return pq.read_metadata(pa.BufferReader(file.getvalue()))


def test_footers_are_kept_as_they_are_up_to_a_limit_of_bytes() -> None:
    reads: Counter[int] = Counter()

    def get(number: int) -> pq.FileMetaData:
        def read() -> pq.FileMetaData:
            reads[number] += 1
            return footer(number)

        return cache.get(str(number), read)

    cache = FooterCache(1 << 20)
    for _ in range(2):
        for number in range(600):
            assert get(number).equals(footer(number))
    assert set(reads.values()) == {1}
    cache.forget("7")
    assert get(7).num_rows == 8
    assert reads[7] == 2

    cache, reads = FooterCache(3000), Counter()  # room for a few
    for number in (0, 1, 2, 0, *range(3, 50), 49, 0):
        get(number)
    assert reads[49] == 1
    assert reads[0] == 2


def test_of_calls_that_need_a_footer_at_once_one_reads_it() -> None:
    cache, together = FooterCache(1 << 20), threading.Barrier(4)
    reads = []

    def read() -> pq.FileMetaData:
        reads.append(1)
        return footer(3)

    def get(_: int) -> int:
        together.wait(120)
        rows: int = cache.get("a", read).num_rows
        return rows

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(get, range(4))) == [4] * 4
    assert len(reads) == 1
