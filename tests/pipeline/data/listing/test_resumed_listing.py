"""A listing of a real store that is killed, or ends by an outage, is resumed by the next attempt."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote_plus

import pytest
from faults import FaultProxy
from samples import parquet, put_all, small_pages
from servers import S3Server, aws_environment

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest, load_or_build
from dinoray.pipeline.storage import key_ranges, listing_parts, pages
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.key_range import Stretch
from dinoray.pipeline.storage.listing_parts import PART, ListingParts
from dinoray.pipeline.storage.retry import Unreachable

pytestmark = pytest.mark.s3

PAGE, COUNT = 20, 1600
KEYS = [f"data/class{number % 4}/{number:05}.jpg" for number in range(COUNT)]
PROGRAM = f"""
import sys
from dinoray.pipeline.data.manifests.manifest import DataConfig, load_or_build
from dinoray.pipeline.storage import key_ranges, listing_parts, pages
from dinoray.pipeline.storage.files import Directory

request = pages.request_page
pages.request_page = lambda call, **parameters: request(call, MaxKeys={PAGE}, **parameters)
key_ranges.PAGES_PER_PART, listing_parts.AFTER_SECONDS = 2, 0.0
load_or_build(DataConfig(path=sys.argv[1]), Directory(sys.argv[2]))
"""
"""Makes a manifest from small pages, and keeps parts of two pages from the beginning on."""


def until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the listing ended first"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kept(path: str, run: Directory, proxy: FaultProxy) -> list[Stretch]:
    """What the next attempt will not list again."""
    parts = ListingParts(run)
    bucket, _, prefix = path.removeprefix("s3://").partition("/")
    parts.open(f"{proxy.endpoint} {bucket} {prefix}/")
    return parts.stretches


def num_kept(stretches: list[Stretch]) -> int:
    return sum(stretch.batch.num_rows for stretch in stretches)


def part_files(run: Directory) -> list[str]:
    folders = [name for name in run.list() if name.startswith("listing-")]
    return [file for name in folders for file in run.child(name).list() if file.startswith(PART)]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("where", ["on a disk", "below data.path on S3"])
def test_a_killed_listing_is_resumed_without_the_pages_that_it_had(
    where: str, proxy: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    put_all(s3, bucket, dict.fromkeys(KEYS, b"1") | {"data/notes.txt": b"1"})
    path = f"s3://{bucket}/data"
    expected = build_manifest(DataConfig(path=path))
    run = Directory(str(tmp_path) if where == "on a disk" else f"{path}/runs/one")
    command = [sys.executable, "-c", PROGRAM, path, run.uri]
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), **aws_environment(proxy.endpoint)}

    def num_files() -> int:
        if where == "on a disk":
            return len(part_files(run))
        return int(s3.client().list_objects_v2(Bucket=bucket, Prefix="data/runs/one/listing-")["KeyCount"])

    proxy.delay_seconds = 0.3
    process = subprocess.Popen(command, env=environment)
    try:
        until(lambda: num_files() >= 8, process)
        proxy.delay_seconds = 30  # it gets no further, however late the kill comes
    finally:
        process.kill()
        process.wait()
        proxy.delay_seconds = 0.0
    stretches = kept(path, run, proxy)
    assert COUNT / 8 < num_kept(stretches) < COUNT
    assert stretches[0].start == ""

    proxy.requests.clear()
    load_or_build(DataConfig(path=path), run)
    lines = [line for line in proxy.requests if "list-type=2" in line and "delimiter" not in line]
    lines = [line for line in lines if "listing-" not in line]
    # SeaweedFS's token is the key before the page, so each request tells where its page begins.
    places = [re.search(r"(?:start-after|continuation-token)=([^&]*)", line) for line in lines]
    begins = [unquote_plus(place[1]) for place in places if place]
    assert len(begins) == len(lines) > 0
    assert not [key for key in begins if any(one.start < key < (one.end or "~") for one in stretches)]
    manifest = Manifest.from_bytes(run.read("manifest.parquet"), DataConfig(path=path))
    assert manifest.table.equals(expected.table)
    assert manifest.num_ignored == expected.num_ignored == 1
    assert part_files(run) == []  # SeaweedFS may still show the folder


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pages(monkeypatch, PAGE)
    monkeypatch.setattr(key_ranges, "PAGES_PER_PART", 2)
    monkeypatch.setattr(listing_parts, "AFTER_SECONDS", 0.0)


@pytest.mark.usefixtures("small_parts")
def test_an_outage_leaves_parts_and_wrong_data_none(
    proxy: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    put_all(s3, bucket, dict.fromkeys(KEYS[:800], b"1"))
    config, run = DataConfig(path=f"s3://{bucket}/data"), Directory(str(tmp_path))
    storage = StorageConfig(give_up_after_seconds=4)
    proxy.delay_seconds = 0.05
    proxy.fail("slow_down", pattern=r"data%2Fclass3.*(token|start)|(token|start).*class3", times=10**6)
    with pytest.raises(Unreachable):
        load_or_build(config, run, storage=storage)
    stretches = kept(config.path, run, proxy)
    assert num_kept(stretches) > 0

    proxy.heal()
    proxy.delay_seconds = 0.0
    put_all(s3, bucket, {"data/class3/zz.parquet": parquet({"image": [b"x"] * 2})})
    with pytest.raises(ConfigError, match=r"point data\.path at a folder with one kind$"):
        load_or_build(config, run, storage=storage)
    assert part_files(run) == []


@pytest.mark.usefixtures("small_parts")
def test_a_store_that_has_changed_is_listed_again_from_the_beginning(
    proxy: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_all(s3, bucket, dict.fromkeys(KEYS[:400], b"1"))
    config, run = DataConfig(path=f"s3://{bucket}/data"), Directory(str(tmp_path))
    parts = ListingParts(run)
    parts.open(f"{proxy.endpoint} {bucket} data/")
    first = pages.Objects(["data/class0/00000.jpg"], [1], ["gone"], [None]).to_arrow()
    parts.keep(Stretch("", "data/class0/00000.jpg", "data/class0/00001.jpg", first))
    assert len(part_files(run)) == 1
    manifest = load_or_build(config, run)
    assert "the store has changed" in caplog.text
    assert sorted(manifest.table["key"].to_pylist()) == sorted(KEYS[:400])
    assert "gone" not in manifest.table["etag"].to_pylist()
    assert part_files(run) == []


@pytest.mark.usefixtures("small_parts")
def test_a_manifest_that_cannot_be_written_leaves_the_parts(
    proxy: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    put_all(s3, bucket, dict.fromkeys(KEYS[:400], b"1"))
    config, run = DataConfig(path=f"s3://{bucket}/data"), Directory(str(tmp_path))
    write = Directory.write

    def full(directory: Directory, name: str, data: bytes) -> None:
        if name == "manifest.parquet":
            raise DataError("no space left")
        write(directory, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Directory, "write", full)
        with pytest.raises(DataError, match=r"^no space left$"):
            load_or_build(config, run)
    assert num_kept(kept(config.path, run, proxy)) > 0
    assert load_or_build(config, run).num_images == 400
    assert part_files(run) == []
