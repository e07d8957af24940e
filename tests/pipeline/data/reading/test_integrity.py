"""Bytes are those that were listed: overwritten objects are noticed, damage on the way is read again, groups once."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.session
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.config import Config
from faults import FaultProxy
from paths import ROOT, SUPPORT
from samples import put_all, write_all
from servers import S3Server
from sources import IMAGES, as_shard, fetch_all, source_of

from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.storage import checks, etags
from dinoray.pipeline.storage import s3 as s3_reads
from dinoray.pipeline.storage.checks import UNCHECKED, UncheckedReads

KEYS = sorted(IMAGES)


@pytest.fixture(autouse=True)
def _nothing_is_known_of_etags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_md5_etags", {})


@pytest.fixture
def plain(s3: S3Server, bucket: str) -> Iterator[Any]:
    """Puts objects without a checksum beside them, as older clients do: their ETag is all there is."""
    config = Config(
        request_checksum_calculation="when_required", response_checksum_validation="when_required"
    )
    client = botocore.session.Session().create_client("s3", endpoint_url=s3.endpoint, config=config)

    def put(files: dict[str, bytes]) -> None:
        for key, data in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=data)

    yield put
    client.close()


# Overwritten objects


@pytest.mark.s3
@pytest.mark.parametrize("store", ["local", "s3"])
@pytest.mark.parametrize(("policy", "status"), [("bad", Status.CORRUPT), ("use", Status.OK)])
def test_an_overwritten_object_is_bad_or_used_as_set(
    store: str, policy: str, status: Status, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    path = str(tmp_path) if store == "local" else f"s3://{bucket}"

    def write(files: dict[str, bytes]) -> None:
        write_all(tmp_path, files) if store == "local" else put_all(s3, bucket, files)

    write(IMAGES)
    source = source_of(path, if_overwritten=policy)
    write({KEYS[1]: b"longer than before" + IMAGES[KEYS[1]]})
    fetched = fetch_all(source)
    assert [f.status for f in fetched] == [status if key == KEYS[1] else Status.OK for key in KEYS]
    if policy == "use":
        assert fetched[1].data == b"longer than before" + IMAGES[KEYS[1]]
    else:
        assert fetched[1].data is None
        assert "as listed" in fetched[1].reason or "was overwritten after it was listed" in fetched[1].reason


@pytest.mark.s3
def test_an_overwritten_object_of_the_same_size_is_noticed_too(s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"a.jpg": b"before", "p/x.parquet": as_shard(IMAGES)})
    images, rows = source_of(f"s3://{bucket}/a.jpg"), source_of(f"s3://{bucket}/p", image_column="jpeg")
    other = {key: bytes(reversed(data)) for key, data in IMAGES.items()}
    put_all(s3, bucket, {"a.jpg": b"after!", "p/x.parquet": as_shard(other)})
    for source in (images, rows):
        assert {f.status for f in fetch_all(source)} == {Status.CORRUPT}
    assert "a.jpg was overwritten after it was listed" in fetch_all(images)[0].reason


# Damage on the way


@pytest.mark.s3
def test_a_flipped_byte_is_found_by_the_etag_and_fetched_again(
    plain: Any, proxy: FaultProxy, bucket: str
) -> None:
    plain(IMAGES)
    source = source_of(f"s3://{bucket}")
    before = proxy.count("^GET ")
    for key in KEYS[:3]:  # the same damage twice, to one object, would be taken for what was uploaded
        proxy.fail("corrupt", pattern=f"^GET /{bucket}/{re.escape(key)}")
    assert [f.data for f in fetch_all(source)] == [IMAGES[key] for key in KEYS]
    assert proxy.count("^GET ") == before + len(IMAGES) + 3


@pytest.mark.s3
def test_an_object_that_stays_damaged_is_bad_and_says_so(plain: Any, proxy: FaultProxy, bucket: str) -> None:
    plain(IMAGES)
    source = source_of(f"s3://{bucket}")
    assert source.fetch([0])[0].status == Status.OK  # this store's ETags are MD5s
    proxy.fail("corrupt", pattern=f"^GET /{bucket}/{KEYS[1]}", times=1_000_000)
    fetched = fetch_all(source)
    assert [f.status for f in fetched] == [Status.CORRUPT if key == KEYS[1] else Status.OK for key in KEYS]
    assert "is damaged: its MD5 is" in fetched[1].reason


@pytest.mark.s3
def test_etags_that_are_no_md5_cost_a_few_requests_and_no_image(
    plain: Any, proxy: FaultProxy, bucket: str
) -> None:
    many = {f"{i:02d}.jpg": bytes([i]) * 100 for i in range(12)}
    plain(many)
    source = source_of(f"s3://{bucket}", fetch_concurrency=16)
    proxy.fail("corrupt", times=1_000_000)  # no body fits its ETag, twice in the same way
    before = proxy.count("^GET ")
    for index in range(12):
        assert source.fetch([index])[0].status == Status.OK
    assert proxy.count("^GET ") == before + 2 * checks._ENOUGH_OTHERS + (12 - checks._ENOUGH_OTHERS)


# Disks

EXHAUSTED = """
import os, resource, sys, threading
from sources import source_of

source = source_of(sys.argv[1])
source.fetch([0])  # what is imported at first use is there
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
held = []
try:
    while True:
        held.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
threading.Timer(1.0, lambda: [os.close(number) for number in held]).start()
print(*(fetched.status.name for fetched in source.fetch(range(source.num_images))))
"""


def test_images_wait_for_free_descriptors(tmp_path: Path) -> None:
    write_all(tmp_path, {f"{i}.jpg": b"x" for i in range(20)})
    environment = {"PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    command = [sys.executable, "-c", EXHAUSTED, str(tmp_path)]
    output = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True)
    assert output.stdout.decode().split() == 20 * ["OK"]


# Row groups


def with_checksums(files: dict[str, bytes], *, row_group_size: int) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"jpeg": list(files.values())})
    pq.write_table(
        table, sink, compression="none", use_dictionary=False, row_group_size=row_group_size,
        write_page_checksum=True, write_statistics=False,
    )  # fmt: skip
    return sink.getvalue()


@pytest.mark.s3
def test_a_footer_is_read_once_and_then_each_row_group_in_one_request(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, {"p/x.parquet": as_shard(IMAGES, row_group_size=3)})
    source = source_of(f"s3://{bucket}/p", image_column="jpeg", row_group_cache_bytes=0)
    before = proxy.count("^GET ")
    for _ in range(2):
        for index in range(0, source.num_images, 3):
            source.fetch([index])
    num_groups = -(-source.num_images // 3)
    assert proxy.count("^GET ") == before + 1 + 2 * num_groups


@pytest.fixture
def unchecked() -> Iterator[UncheckedReads]:
    UNCHECKED.take()
    yield UNCHECKED
    UNCHECKED.take()


@pytest.mark.s3
def test_what_nothing_checks_is_counted_and_said(
    s3: S3Server, bucket: str, unchecked: UncheckedReads
) -> None:
    put_all(s3, bucket, {"one/a.jpg": b"a", "p/x.parquet": as_shard(IMAGES, row_group_size=4)})
    client = s3.client()
    upload = client.create_multipart_upload(Bucket=bucket, Key="parts/b.jpg")["UploadId"]
    about = {"Bucket": bucket, "Key": "parts/b.jpg", "UploadId": upload}
    parts = [
        {"PartNumber": n, "ETag": client.upload_part(**about, PartNumber=n, Body=body)["ETag"]}
        for n, body in ((1, bytes(5 << 20)), (2, b"b"))
    ]
    client.complete_multipart_upload(**about, MultipartUpload={"Parts": parts})
    source_of(f"s3://{bucket}/one").fetch([0])
    assert unchecked.take() is None

    source = source_of(f"s3://{bucket}/parts")
    source.fetch([0])
    source.fetch([0])
    found = unchecked.take()
    assert found is not None
    assert found.number == 2
    assert found.line.startswith(f"s3://{bucket}/parts/b.jpg and maybe others are read unchecked: ")

    fetch_all(source_of(f"s3://{bucket}/p", image_column="jpeg"))
    found = unchecked.take()
    assert found is not None
    assert found.number == -(-len(IMAGES) // 4)
    assert "`dinoray pack`" in found.line


@pytest.mark.s3
def test_calls_that_want_the_same_row_group_at_once_read_it_once(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, {"p/x.parquet": as_shard(IMAGES, row_group_size=100)})
    source = source_of(f"s3://{bucket}/p", image_column="jpeg")
    before = proxy.count("^GET ")
    proxy.delay_seconds = 0.2
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(source.fetch, [[0], [1], [2], [3]]))
    assert [answer[0].status for answer in answers] == 4 * [Status.OK]
    assert proxy.count("^GET ") == before + 2  # the footer and the group


@pytest.mark.s3
def test_a_row_group_that_was_damaged_on_its_way_is_read_again(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    shard = with_checksums(IMAGES, row_group_size=4)
    put_all(s3, bucket, {"p/x.parquet": shard})
    source = source_of(f"s3://{bucket}/p", image_column="jpeg")
    proxy.fail("corrupt", times=2)  # of the footer, and of a group
    assert [f.data for f in fetch_all(source)] == list(IMAGES.values())


@pytest.mark.s3
def test_a_row_group_that_stays_damaged_costs_its_own_rows(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    shard = bytearray(with_checksums(IMAGES, row_group_size=4))
    place = shard.index(next(iter(IMAGES.values())))
    shard[place] ^= 1
    put_all(s3, bucket, {"p/x.parquet": bytes(shard)})
    source = source_of(f"s3://{bucket}/p", image_column="jpeg")
    statuses = [f.status for f in fetch_all(source)]
    assert statuses == 4 * [Status.CORRUPT] + (len(IMAGES) - 4) * [Status.OK]


@pytest.mark.s3
def test_a_store_whose_reads_have_other_etags_is_read_with_a_warning(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_all(s3, bucket, {f"i/{key}": data for key, data in IMAGES.items()})
    images = source_of(f"s3://{bucket}/i")
    assert etags._other_etags.isdisjoint({f"{s3.endpoint}/{bucket}"})
    monkeypatch.setattr(s3_reads, "etag_of", lambda answer: "made-up")
    assert {fetched.status for fetched in fetch_all(images)} == {Status.OK}
    assert caplog.text.count("reads have other ETags than listings") == 1
