"""Objects that are written in parts: the same bytes, one request repeated at a time, nothing visible before the end."""

from typing import BinaryIO

import pytest
from faults import FaultProxy
from servers import S3Server

from dinoray.models.errors import DataError
from dinoray.pipeline.storage import object_writer, waiting
from dinoray.pipeline.storage.files import Directory

pytestmark = pytest.mark.s3

PART = 5 << 20
"""The least that S3 takes for a part that is not the last."""


@pytest.fixture(autouse=True)
def _small_parts_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_writer, "PART_BYTES", PART)
    monkeypatch.setattr(waiting, "MAX_SECONDS", 0.1)


def pieces(num_bytes: int) -> list[bytes]:
    """Bytes that differ everywhere, in pieces of odd sizes."""
    data = (b"%08d" * (num_bytes // 8 + 1) % tuple(range(num_bytes // 8 + 1)))[:num_bytes]
    return [data[i : i + 700_001] for i in range(0, num_bytes, 700_001)]


def write(run: Directory, parts: list[bytes]) -> None:
    def produce(file: BinaryIO) -> None:
        for part in parts:
            file.write(part)

    run.write_pieces("file", produce, num_bytes=sum(map(len, parts)))


@pytest.mark.parametrize("num_bytes", [0, 1, PART, PART + 1, 2 * PART, 2 * PART + 12_345])
def test_an_object_is_what_was_written(bucket: str, num_bytes: int) -> None:
    run, data = Directory(f"s3://{bucket}/run"), pieces(num_bytes)
    write(run, data)
    assert run.read("file") == b"".join(data)


def test_each_part_is_sent_again_by_itself(proxy: FaultProxy, bucket: str) -> None:
    run, data = Directory(f"s3://{bucket}/run").patient(60), pieces(3 * PART)
    for pattern in (r"^POST .*\?uploads", "^PUT .*partNumber=2", r"^POST .*\?uploadId"):
        proxy.fail("internal_error", pattern=pattern, times=7)
    write(run, data)
    assert proxy.count("^PUT .*partNumber=1&") == proxy.count("^PUT .*partNumber=3&") == 1
    assert proxy.count("^PUT .*partNumber=2&") == 8
    assert run.read("file") == b"".join(data)


def test_an_answer_that_is_lost_at_the_end_is_no_failure(proxy: FaultProxy, bucket: str) -> None:
    run, data = Directory(f"s3://{bucket}/run"), pieces(2 * PART)
    proxy.fail("truncate", pattern=r"^POST .*\?uploadId")
    proxy.fail("no_upload", pattern=r"^POST .*\?uploadId")  # as some stores answer the second time
    write(run, data)
    assert proxy.count(r"^POST .*\?uploadId") == 2
    assert run.read("file") == b"".join(data)
    proxy.fail("no_upload", pattern=r"^POST .*\?uploadId")
    with pytest.raises(DataError, match="NoSuchUpload"):
        write(run, [*data, b"more"])


@pytest.mark.parametrize("pattern", ["^PUT .*partNumber=2", r"^POST .*\?uploadId"])
def test_an_object_that_fails_leaves_the_old_one_and_no_parts(
    proxy: FaultProxy, s3: S3Server, bucket: str, pattern: str
) -> None:
    run = Directory(f"s3://{bucket}/run")
    write(run, [b"old"])
    proxy.fail("forbid", pattern=pattern, times=100)
    with pytest.raises(DataError, match=rf"s3://{bucket}/run/file: AccessDenied"):
        write(run, pieces(2 * PART))
    assert run.read("file") == b"old"
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket)


def test_an_object_whose_source_fails_is_not_there(bucket: str) -> None:
    run = Directory(f"s3://{bucket}/run")

    def produce(file: BinaryIO) -> None:
        file.write(bytes(PART + 1))
        raise KeyError("source")

    with pytest.raises(KeyError, match="source"):
        run.write_pieces("file", produce, num_bytes=0)
    assert not run.exists("file")
