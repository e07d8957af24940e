"""Outages through a real client: images wait and none is replaced; only an object that fails alone is bad."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import FaultProxy
from samples import put_all, small_pages
from servers import S3Server, aws_environment, use_aws
from sources import IMAGES, as_shard, fetch_all, source_of

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, load_or_build
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.storage import waiting
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.retry import Unreachable

pytestmark = pytest.mark.s3

KEYS = sorted(IMAGES)
EVER = 1_000_000


@pytest.fixture(autouse=True)
def _pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BASE_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(waiting, "WATCH", waiting.OutageWatch())


@pytest.fixture(params=["images", "parquet"])
def put(request: pytest.FixtureRequest, s3: S3Server, bucket: str) -> Callable[..., Source]:
    """Puts IMAGES as objects, or as three shards, and returns their source."""
    files = IMAGES
    if request.param == "parquet":
        files = {f"{n}.parquet": as_shard({key: IMAGES[key] for key in KEYS[n::3]}) for n in range(3)}
    put_all(s3, bucket, files)
    columns = {} if request.param == "images" else {"image_column": "jpeg", "key_column": "name"}

    def source(give_up_after_seconds: float = 60) -> Source:
        listed = source_of(f"s3://{bucket}", **columns, row_group_cache_bytes=0)
        return Source(
            listed.config, listed.manifest, StorageConfig(give_up_after_seconds=give_up_after_seconds)
        )

    return source


def test_a_throttling_store_costs_time_and_no_image(proxy: FaultProxy, put: Callable[..., Source]) -> None:
    source = put()
    calm = fetch_all(source)
    before = proxy.count("^GET ")
    proxy.fail("slow_down", times=EVER, share=0.6)
    for _ in range(3):
        assert fetch_all(source) == calm
    assert proxy.count("^GET ") > before + 3 * 5 + 3  # some were asked for again
    assert {f.status for f in calm} == {Status.OK}


def test_a_store_that_fails_often_costs_no_image(proxy: FaultProxy, put: Callable[..., Source]) -> None:
    source = put()
    calm = fetch_all(source)
    for fault in ("reset", "internal_error", "truncate"):
        proxy.fail(fault, times=EVER, share=0.2)
    for _ in range(3):
        assert fetch_all(source) == calm


def test_images_wait_for_a_store_that_is_down(
    proxy: FaultProxy, put: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = put()
    calm = fetch_all(source)
    monkeypatch.setattr(waiting, "NOTED_SECONDS", 0.2)
    lines: list[str] = []
    told = threading.Event()

    def report(line: str, is_over: bool) -> None:
        lines.append(line)
        told.set()

    waiting.report_outages(report)
    proxy.go_down()
    comes_back = threading.Thread(target=lambda: (told.wait(), proxy.come_up()), daemon=True)
    comes_back.start()
    assert fetch_all(source) == calm
    comes_back.join()
    assert len(lines) == 2  # however many requests have waited
    assert "storage has not answered for" in lines[0]
    assert lines[1].startswith("storage answers again after")


def test_a_store_that_stays_down_ends_the_fetch_with_a_remedy(
    proxy: FaultProxy, put: Callable[..., Source]
) -> None:
    source = put(give_up_after_seconds=0.5)
    proxy.go_down()
    with pytest.raises(
        Unreachable, match=r"s3://.*AWS_ENDPOINT_URL.*raise storage.give_up_after_seconds=0.5"
    ):
        fetch_all(source)
    proxy.come_up()
    assert {f.status for f in fetch_all(source)} == {Status.OK}


@pytest.mark.parametrize("fault", ["internal_error", "reset", "truncate"])
def test_one_object_that_always_fails_is_a_bad_image(
    proxy: FaultProxy, put: Callable[..., Source], fault: str
) -> None:
    calm, source = fetch_all(put()), put()  # of its own: the row group that was read last is kept
    bad = source.key(1).partition("#")[0]
    proxy.fail(fault, pattern=rf"^GET /\S+/{bad}", times=EVER)
    fetched = fetch_all(source)
    assert [f.status for f in fetched] == [
        Status.UNREACHABLE if _is_in(source, n, bad) else Status.OK for n in range(len(KEYS))
    ]
    assert [f for f in fetched if f.data] == [f for n, f in enumerate(calm) if not _is_in(source, n, bad)]


@pytest.mark.parametrize(
    ("fault", "status"),
    [("forbid", Status.DENIED), ("archived", Status.ARCHIVED), ("disabled_key", Status.DENIED)],
)
def test_one_refused_object_is_a_bad_image(
    proxy: FaultProxy, put: Callable[..., Source], fault: str, status: Status
) -> None:
    source = put()
    bad = source.key(1).partition("#")[0]
    proxy.fail(fault, pattern=rf"^GET /\S+/{bad}", times=EVER)
    fetched = fetch_all(source)
    assert [f.status for f in fetched] == [
        status if _is_in(source, n, bad) else Status.OK for n in range(len(KEYS))
    ]
    assert f"/{bad}: " in next(f.reason for f in fetched if f.data is None)


@pytest.mark.parametrize("fault", ["forbid", "archived", "expired"])
def test_a_store_that_refuses_everything_ends_the_fetch_at_once(
    proxy: FaultProxy, put: Callable[..., Source], fault: str
) -> None:
    source = put()
    for _ in range(2):  # before any image was read, and after all were
        proxy.fail(fault, times=EVER)
        with pytest.raises(
            DataError, match=r"s3://.*(AccessDenied|InvalidObjectState|ExpiredToken)"
        ) as caught:
            fetch_all(source)
        assert type(caught.value) is DataError
        proxy.heal()
        assert {f.status for f in fetch_all(source)} == {Status.OK}


@pytest.mark.timeout(60)  # they would wait for hours
def test_reads_that_wait_end_with_the_fetch_that_wanted_them(
    proxy: FaultProxy, put: Callable[..., Source]
) -> None:
    source = put(give_up_after_seconds=10_000)
    proxy.fail("expired", pattern=source.key(5).partition("#")[0], times=EVER)
    proxy.fail("slow_down", times=EVER)
    with pytest.raises(DataError, match="ExpiredToken"):
        fetch_all(source)
    source._pool.shutdown(wait=True)


def test_half_of_the_objects_refused_are_so_many_bad_images(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, IMAGES)
    source = source_of(f"s3://{bucket}")
    proxy.fail("forbid", pattern="^GET .*/a/", times=EVER)
    expected = [Status.DENIED if key.startswith("a/") else Status.OK for key in KEYS]
    assert [f.status for f in fetch_all(source)] == expected


# The listing


def test_pages_after_the_first_wait_and_the_first_does_not(
    proxy: FaultProxy, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pages(monkeypatch, 20)
    put_all(s3, bucket, {f"{n:04}.jpg": b"x" for n in range(21)})
    proxy.fail("slow_down", pattern="continuation-token", times=20)
    assert source_of(f"s3://{bucket}").num_images == 21
    proxy.fail("slow_down", pattern="list-type=2", times=20)
    with pytest.raises(Unreachable, match="failed after 5 attempts"):
        source_of(f"s3://{bucket}")


def test_a_shard_that_is_refused_at_the_listing_is_left_out(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, {f"{n}.parquet": as_shard(IMAGES) for n in range(3)})
    proxy.fail("forbid", pattern=r"/1\.parquet", times=EVER)
    source = source_of(f"s3://{bucket}", image_column="jpeg")
    assert source.manifest.damaged == ("1.parquet",)
    assert source.num_images == 2 * len(IMAGES)
    proxy.heal()
    proxy.fail("slow_down", pattern=r"\.parquet", times=20)
    assert source_of(f"s3://{bucket}", image_column="jpeg").num_images == 3 * len(IMAGES)


def test_a_data_set_that_is_listed_but_has_a_wrong_address_fails_soon(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(s3, bucket, {"a.jpg": b"x"})
    config, run = DataConfig(path=f"s3://{bucket}"), Directory(str(tmp_path))
    listed = load_or_build(config, run)
    assert load_or_build(config, run).table.equals(listed.table)
    use_aws(monkeypatch, aws_environment("http://127.0.0.1:9"))
    with pytest.raises(Unreachable, match="failed after 5 attempts"):
        load_or_build(config, run)


# Disks


def test_a_file_that_may_not_be_read_is_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    source = source_of(str(tmp_path))

    def refuse(path: object, *_: object) -> object:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # the tests may run as root, to whom nothing is refused
        patch.setattr("builtins.open", refuse)
        [fetched] = source.fetch([0])
    assert fetched.status == Status.DENIED
    assert "a.jpg: Permission denied" in fetched.reason


def _is_in(source: Source, index: int, key: str) -> bool:
    return source.key(index).partition("#")[0] == key
