"""The source: the right bytes for each index, many at once, and a status rather than an exception."""

import json
import pickle
import random
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from faults import FaultProxy
from samples import hostile_entries, needs_hostile, parquet, put_all, write_all
from servers import ACCESS_KEY, SECRET_KEY, S3Server, aws_environment, use_aws
from sources import IMAGES, as_shard, fetch_all, source_of

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.reading.source import Fetched, Source, Status
from dinoray.pipeline.storage import s3 as s3_module
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.retry import Unreachable


@pytest.mark.s3
def test_a_folder_a_bucket_and_parquet_shards_give_the_same_images(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    keys = sorted(IMAGES)
    shards = {
        "p/0.parquet": as_shard({key: IMAGES[key] for key in keys[:7]}),
        "p/1.parquet": as_shard({key: IMAGES[key] for key in keys[7:]}),
    }
    write_all(tmp_path / "images", IMAGES)
    write_all(tmp_path, shards)
    put_all(s3, bucket, IMAGES | shards)
    for folder in "ab":
        put_all(s3, bucket, {f"i/{key}": IMAGES[key] for key in IMAGES if key[0] == folder})
    columns = {"image_column": "jpeg", "key_column": "name", "label_column": "class"}
    sources = [
        source_of(str(tmp_path / "images"), label_from_parent=True),
        source_of(f"s3://{bucket}/i", label_from_parent=True),
        source_of(str(tmp_path / "p"), **columns),
        source_of(f"s3://{bucket}/p", **columns),
    ]
    expected = [(key, IMAGES[key], key[0], Status.OK, "") for key in keys]
    for source in sources:
        assert source.num_images == len(IMAGES)
        fetched = fetch_all(source)
        assert [(f.key.removeprefix("i/"), *f[1:]) for f in fetched] == expected
    assert [sources[1].key(index) for index in range(3)] == ["i/a/0.jpg", "i/a/1.jpg", "i/a/2.jpg"]


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_images_come_in_the_order_asked_for_and_as_often(tmp_path: Path, kind: str) -> None:
    write_all(tmp_path, IMAGES if kind == "images" else {"x.parquet": as_shard(IMAGES)})
    source = source_of(str(tmp_path), **({} if kind == "images" else {"image_column": "jpeg"}))
    asked = [17, 0, 5, 5, 3, 17, 9]
    ordered = [IMAGES[key] for key in (sorted(IMAGES) if kind == "images" else IMAGES)]
    assert [fetched.data for fetched in source.fetch(asked)] == [ordered[index] for index in asked]
    assert source.fetch([]) == []
    for outside in (-1, len(IMAGES)):
        with pytest.raises(IndexError):
            source.key(outside)
        with pytest.raises(IndexError):
            source.fetch([outside])


@pytest.mark.s3
@pytest.mark.parametrize("store", ["local", "s3"])
def test_one_bad_image_is_a_status_in_its_place(
    store: str, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    files = {
        "a.jpg": b"good",
        "empty.jpg": b"",
        "gone.jpg": b"soon",
        "large.jpg": bytes(1001),
        "z.jpg": bytes(1000),
    }
    if store == "local":
        write_all(tmp_path, files)
        source = source_of(str(tmp_path), max_object_bytes=1000)
        (tmp_path / "gone.jpg").unlink()
    else:
        put_all(s3, bucket, files)
        source = source_of(f"s3://{bucket}", max_object_bytes=1000)
        s3.client().delete_object(Bucket=bucket, Key="gone.jpg")
    fetched = fetch_all(source)
    assert [f.key for f in fetched] == sorted(files)
    expected = [Status.OK, Status.CORRUPT, Status.MISSING, Status.TOO_LARGE, Status.OK]
    assert [f.status for f in fetched] == expected
    assert [f.data for f in fetched] == [b"good", None, None, None, bytes(1000)]
    assert [bool(f.reason) for f in fetched] == [status != Status.OK for status in expected]
    assert "gone.jpg" in fetched[2].reason
    assert "1001 bytes, more than data.max_object_bytes=1000" in fetched[3].reason


@pytest.mark.s3
@pytest.mark.parametrize("store", ["local", "s3"])
def test_an_object_that_grew_after_the_listing_is_not_read(
    store: str, proxy: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    for number, size in enumerate([10, 5_000_000]):
        if store == "local":
            write_all(tmp_path, {"x.jpg": bytes(size)})
        else:
            put_all(s3, bucket, {"x.jpg": bytes(size)})
        if number == 0:
            path = str(tmp_path) if store == "local" else f"s3://{bucket}"
            source = source_of(path, max_object_bytes=1000)
    [fetched] = source.fetch([0])
    assert (fetched.status, fetched.data) == (Status.TOO_LARGE, None)
    assert "x.jpg holds 5000000 bytes, more than 1000" in fetched.reason


@pytest.mark.parametrize("key", ["../secret.jpg", "a/../../secret.jpg", "/etc/hostname"])
def test_a_key_never_leads_out_of_the_folder(tmp_path: Path, key: str) -> None:
    write_all(tmp_path, {"secret.jpg": b"secret", "data/a.jpg": b"1"})
    config = DataConfig(path=str(tmp_path / "data"))
    good = build_manifest(config)
    keys = pa.array([key], pa.large_string())
    forged = Manifest(good.table.set_column(0, "key", keys), good.kind, good.root, 0, good.listed_as)
    [fetched] = Source(config, forged).fetch([0])
    assert (fetched.status, fetched.data) == (Status.MISSING, None)


@pytest.mark.parametrize(
    "name", ["..two.jpg", "a..b.jpg", "dots./x.jpg", "s3:colon.jpg", "%41.jpg", "line\nfeed.jpg"]
)
def test_a_file_with_an_odd_name_is_read(tmp_path: Path, name: str) -> None:
    write_all(tmp_path, {name: b"data"})
    assert source_of(str(tmp_path)).fetch([0]) == [Fetched(name, b"data", None, Status.OK, "")]


@pytest.mark.s3
@pytest.mark.parametrize("key", ["dots/../up.jpg", "a//b.jpg", "/leading.jpg", "./dot.jpg"])
def test_an_odd_key_is_asked_for_as_it_stands(proxy: FaultProxy, s3: S3Server, bucket: str, key: str) -> None:
    put_all(s3, bucket, {"a.jpg": b"1"})
    source = source_of(f"s3://{bucket}")
    table = source.manifest.table.set_column(0, "key", pa.array([key], pa.large_string()))
    manifest = Manifest(table, "images", source.manifest.root, 0, source.manifest.listed_as)
    proxy.fail("slow_down", times=9)  # SeaweedFS would rename or refuse what S3 keeps
    with pytest.raises(Unreachable):
        Source(source.config, manifest, StorageConfig(give_up_after_seconds=0)).fetch([0])
    assert proxy.requests[-1] == f"GET /{bucket}/{key}"


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["slow_down", "truncate", "corrupt"])
def test_a_spoilt_image_is_fetched_again(fault: str, proxy: FaultProxy, s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, IMAGES)
    source = source_of(f"s3://{bucket}")
    before = proxy.count("^GET ")
    proxy.fail(fault, times=3)
    fetched = fetch_all(source)
    assert [f.data for f in fetched] == [IMAGES[key] for key in sorted(IMAGES)]
    assert {f.status for f in fetched} == {Status.OK}
    assert proxy.count("^GET ") == before + len(IMAGES) + 3


@pytest.mark.s3
@pytest.mark.timeout(180)  # waiting for all of them would take far longer
def test_forbidden_images_end_the_fetch_at_once(
    proxy: FaultProxy, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "READ_SECONDS", 60.0)  # far longer than a busy machine takes to refuse one
    put_all(s3, bucket, {f"{number:02}.jpg": b"data" for number in range(60)})
    source = source_of(f"s3://{bucket}", fetch_concurrency=16)
    proxy.fail("hang", pattern=r"\.jpg", times=15)
    proxy.fail("forbid", pattern=r"\.jpg", times=1_000)
    proxy.gate = 16  # no answer, the refusal neither, before as many requests as may be are under way
    with pytest.raises(DataError, match=rf"s3://{bucket}/\d+\.jpg: AccessDenied"):
        fetch_all(source)
    assert proxy.in_flight > 0  # it did not wait for those that hang,
    proxy.heal()
    source.fetch([0])
    # nor leave the others in the queue. 8 were asked for to compare, and some before all had heard of the refusal.
    assert proxy.count(r"\.jpg") <= 45


@pytest.mark.s3
def test_a_bucket_that_vanishes_or_closes_ends_the_fetch(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(s3, bucket, {"a.jpg": b"1"})
    source = source_of(f"s3://{bucket}")
    with monkeypatch.context() as patch:
        use_aws(patch, aws_environment(s3.endpoint, secret="wrong"))
        with pytest.raises(DataError, match=f"s3://{bucket}/a.jpg: SignatureDoesNotMatch"):
            source.fetch([0])
    s3.client().delete_object(Bucket=bucket, Key="a.jpg")
    s3.client().delete_bucket(Bucket=bucket)
    with pytest.raises(DataError, match=f"s3://{bucket}/a.jpg: NoSuchBucket"):
        source.fetch([0])


@pytest.mark.s3
def test_many_requests_are_in_flight_but_never_more_than_allowed(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    names = [f"{number:03}.jpg" for number in range(120)]
    put_all(s3, bucket, dict.fromkeys(names, b"data"))
    source = source_of(f"s3://{bucket}", fetch_concurrency=24)
    proxy.gate = 24  # the first answers wait until 24 requests are there at once
    rounds = [threading.Thread(target=fetch_all, args=(source,)) for _ in range(2)]
    for thread in rounds:
        thread.start()
    for thread in rounds:
        thread.join()
    assert proxy.gate == 0
    assert proxy.max_in_flight == 24
    assert proxy.count(r"\.jpg") == 240


@pytest.mark.s3
@pytest.mark.parametrize("as_parquet", [False, True])
def test_no_more_is_fetched_ahead_than_the_buffer_holds(
    as_parquet: bool, proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    """However slowly images are taken, and however many requests are allowed."""
    images = {f"{number:02}.jpg": bytes([number]) * 10_000 for number in range(13)}
    put_all(s3, bucket, {"p/x.parquet": as_shard(images, row_group_size=1)} if as_parquet else images)
    config = {"image_column": "jpeg"} if as_parquet else {}
    source = source_of(f"s3://{bucket}", fetch_buffer_bytes=35_000, **config)
    source.fetch([12])  # and the shard's footer, whose request is under way alone
    pattern = r"^GET .*\.(jpg|parquet)"
    before = proxy.count(pattern)
    proxy.max_in_flight, proxy.gate = 0, 3  # no answer before three requests are under way
    arrivals = source.arrivals(range(12))
    taken = [next(arrivals) for _ in range(5)]
    assert proxy.count(pattern) - before <= 3 + len(taken)
    taken += list(arrivals)
    assert proxy.max_in_flight == 3
    assert {index: fetched.data for index, fetched in taken} == dict(enumerate(list(images.values())[:12]))


def test_an_image_larger_than_the_buffer_is_fetched_alone(tmp_path: Path) -> None:
    images = {f"{number}.jpg": bytes([number]) * (1000 if number % 2 else 10) for number in range(9)}
    write_all(tmp_path, images)
    source = source_of(str(tmp_path), fetch_buffer_bytes=100)
    assert [fetched.data for fetched in fetch_all(source)] == list(images.values())


@pytest.mark.s3
def test_a_pickled_source_works_and_carries_no_secret(s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"p/x.parquet": as_shard(IMAGES)} | IMAGES)
    for source in (source_of(f"s3://{bucket}/a"), source_of(f"s3://{bucket}/p", image_column="jpeg")):
        fetched = fetch_all(source)
        pickled = pickle.dumps(source)
        for secret in (SECRET_KEY, ACCESS_KEY, s3.endpoint):
            assert secret.encode() not in pickled
        assert IMAGES["a/3.jpg"] not in pickled  # nor what was cached
        assert fetch_all(pickle.loads(pickled)) == fetched


@pytest.mark.s3
def test_a_row_group_is_read_once_while_it_is_cached(proxy: FaultProxy, s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"p/x.parquet": as_shard(IMAGES, row_group_size=6)})
    config = {"path": f"s3://{bucket}/p", "image_column": "jpeg"}
    source = source_of(**config)
    fetch_all(source)
    before = len(proxy.requests)
    assert fetch_all(source)[3].data == list(IMAGES.values())[3]
    assert len(proxy.requests) == before
    small = source_of(**config, row_group_cache_bytes=1, fetch_buffer_bytes=1)
    fetch_all(small)
    before = len(proxy.requests)
    small.fetch([17])  # the group read last is kept whatever its size
    assert len(proxy.requests) == before
    small.fetch([0])
    assert len(proxy.requests) > before


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["slow_down", "truncate"])
def test_a_spoilt_shard_is_fetched_again(fault: str, proxy: FaultProxy, s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"p/x.parquet": as_shard(IMAGES)})
    source = source_of(f"s3://{bucket}/p", image_column="jpeg")
    proxy.fail(fault, times=3)
    assert [f.data for f in fetch_all(source)] == list(IMAGES.values())


@pytest.mark.s3
def test_only_the_wanted_columns_of_a_row_group_cross_the_network(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    bulk = [random.Random(n).randbytes(400_000) for n in range(4)]
    shard = parquet({"before": bulk, "image": [b"small"] * 4, "after": bulk}, row_group_size=4)
    put_all(s3, bucket, {"x.parquet": shard})
    source = source_of(f"s3://{bucket}")
    assert {f.data for f in fetch_all(source)} == {b"small"}
    assert proxy.bytes_answered < 400_000


@pytest.mark.s3
def test_a_shard_that_is_gone_or_changed_is_a_status_but_forbidden_ones_end_the_fetch(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    shard = as_shard(IMAGES)
    put_all(s3, bucket, {f"p/{name}.parquet": shard for name in ("gone", "long", "short", "zeros")})
    source = source_of(f"s3://{bucket}/p", image_column="jpeg")
    s3.client().delete_object(Bucket=bucket, Key="p/gone.parquet")
    changed = {
        "p/long.parquet": shard + shard,
        "p/short.parquet": b"PAR1",
        "p/zeros.parquet": bytes(len(shard)),
    }
    put_all(s3, bucket, changed)
    fetched = fetch_all(source)
    expected = {
        "gone": Status.MISSING,
        "long": Status.CORRUPT,
        "short": Status.CORRUPT,
        "zeros": Status.CORRUPT,
    }
    assert [f.status for f in fetched] == [status for status in expected.values() for _ in IMAGES]
    assert all(f.data is None for f in fetched)
    assert f"{2 * len(shard)} bytes, not {len(shard)} as listed" in fetched[len(IMAGES)].reason
    proxy.fail("forbid", times=999)
    with pytest.raises(DataError, match=rf"s3://{bucket}/p/\w+\.parquet: AccessDenied"):
        fetch_all(source)


@pytest.mark.s3
@needs_hostile
def test_every_object_of_a_hostile_bucket_is_fetched_or_counted(s3: S3Server, bucket: str) -> None:
    refused = {"/leading-slash.jpg", "dots/../up.jpg", "names/back\\slash.jpg"}
    entries = [e for e in hostile_entries() if e.key not in refused and not e.key.endswith(".parquet")]
    put_all(s3, bucket, {entry.key: entry.data for entry in entries})
    data = {entry.key: entry.data for entry in entries}
    for fetched in fetch_all(source_of(f"s3://{bucket}")):
        if data[fetched.key]:
            assert (fetched.data, fetched.status) == (data[fetched.key], Status.OK)
        else:
            assert (fetched.data, fetched.status) == (None, Status.CORRUPT)


def test_a_status_fits_one_byte_and_json() -> None:
    assert [int(status) for status in Status] == [0, 1, 2, 3, 4, 5, 6]
    assert json.dumps(Status.MISSING) == "1"
