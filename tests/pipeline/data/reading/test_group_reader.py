"""One reader for all actors: their images as each would read them, and each byte of the store once."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import pytest
from faults import FaultProxy
from samples import parquet, put_all
from servers import S3Server

from dinoray.models.errors import DinorayError
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.group_reader import GroupReader
from dinoray.pipeline.data.reading.sharing import groups_ahead, share_reading
from dinoray.pipeline.data.reading.source import Fetched, Source, Status
from dinoray.pipeline.storage import waiting
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.retry import Unreachable

pytestmark = pytest.mark.s3

SHARDS, ROWS_PER_SHARD, ROWS, WINDOW_GROUPS, BATCH = 4, 200, 10, 12, 32
NUM_IMAGES = SHARDS * ROWS_PER_SHARD
IMAGE_BYTES = 20_000
FILES = {
    f"{shard}.parquet": parquet(
        {
            "key": [f"{shard}-{row}" for row in range(ROWS_PER_SHARD)],
            "image": [
                random.Random(1000 * shard + row).randbytes(IMAGE_BYTES) for row in range(ROWS_PER_SHARD)
            ],
        },
        row_group_size=ROWS,
        compression="none",
    )
    for shard in range(SHARDS)
}
WINDOW = WINDOW_GROUPS * ROWS


@pytest.fixture(autouse=True)
def _pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BASE_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(waiting, "WATCH", waiting.OutageWatch())


@pytest.fixture
def path(s3: S3Server, bucket: str) -> str:
    put_all(s3, bucket, {f"theirs/{name}": data for name, data in FILES.items()})
    return f"s3://{bucket}/theirs"


def source_at(path: str, *, give_up_after_seconds: float = 60) -> Source:
    """With windows of twelve row groups. No request is made twice because the machine is busy."""
    config = DataConfig(path=path, row_group_cache_bytes=WINDOW_GROUPS * ROWS * (IMAGE_BYTES + 100))
    storage = StorageConfig(give_up_after_seconds=give_up_after_seconds, hedge_after_seconds=None)
    source = Source(config, build_manifest(config), storage)
    window = source.order(1).window(0)
    assert window is not None
    assert len(window.groups) == WINDOW_GROUPS
    return source


def layout_of(steps: range = range(NUM_IMAGES // BATCH)) -> Layout:
    return Layout(steps.start, steps.stop, world_size=2, batch_size_per_worker=16, steps_per_block=2)


def reader_of(source: Source, *, num_actors: int = 2) -> GroupReader:
    sharing = share_reading(
        source.manifest, source.order(1), most_actors=num_actors, cpus_per_actor=1, rows_per_block=32
    )
    assert sharing is not None
    return GroupReader(source, sharing.cache_bytes)


def read_by_actors(
    reader: GroupReader, source: Source, layout: Layout, *, num_actors: int
) -> Iterator[tuple[int, Fetched]]:
    """(position, image) of all blocks, each of which is asked for by one of the actors that has a call to spare."""
    order = source.order(1)

    def make(number: int) -> list[tuple[int, Fetched]]:
        positions = layout.block(number)
        ahead = groups_ahead(order, int(positions[-1]), layout.stop)
        if ahead is not None:
            ahead_of.append(background.submit(reader.read_ahead, ahead))
        return list(zip(positions.tolist(), reader.fetch(order.locate(positions)[1].tolist()), strict=True))

    ahead_of: list = []
    with ThreadPoolExecutor(4) as background, ThreadPoolExecutor(2 * num_actors) as actors:
        for block in actors.map(make, range(layout.num_blocks)):
            yield from block
    for done in ahead_of:
        done.result()


def expected(source: Source, positions: range) -> list[tuple[int, Fetched]]:
    """Each image read by itself."""
    images = source.order(1).locate(positions)[1].tolist()
    return list(zip(positions, source.fetch(images), strict=True))


@pytest.mark.parametrize("num_actors", [1, 2, 4])
def test_actors_get_the_images_of_direct_reading_and_the_store_sends_each_byte_once(
    proxy: FaultProxy, path: str, num_actors: int
) -> None:
    source = source_at(path)
    before = proxy.bytes_answered
    layout = layout_of(range(2 * NUM_IMAGES // BATCH))
    found = sorted(
        read_by_actors(reader_of(source, num_actors=num_actors), source, layout, num_actors=num_actors)
    )
    assert (proxy.bytes_answered - before) / (2 * NUM_IMAGES * IMAGE_BYTES) <= 1.1
    assert found == expected(source, range(2 * NUM_IMAGES))


def test_who_resumes_in_a_window_reads_no_more_than_that_window_again(proxy: FaultProxy, path: str) -> None:
    source = source_at(path)
    layout = layout_of(range(7, NUM_IMAGES // BATCH))
    assert layout.first_step * BATCH % WINDOW not in (0, WINDOW - 1)
    before = proxy.bytes_answered
    found = sorted(read_by_actors(reader_of(source), source, layout, num_actors=2))
    used = (NUM_IMAGES - 7 * BATCH) * IMAGE_BYTES
    assert proxy.bytes_answered - before <= 1.1 * used + WINDOW * IMAGE_BYTES
    assert found == expected(source, range(7 * BATCH, NUM_IMAGES))


def test_nothing_is_read_past_the_end_of_a_run(proxy: FaultProxy, path: str) -> None:
    source = source_at(path)
    before = proxy.bytes_answered
    list(read_by_actors(reader_of(source), source, layout_of(range(3)), num_actors=2))
    footers = 2 * SHARDS * (128 << 10)  # each is read with what is before it, and by two that ask at once
    assert proxy.bytes_answered - before <= 1.05 * WINDOW * IMAGE_BYTES + footers < 1.8 * WINDOW * IMAGE_BYTES


def test_rows_of_a_damaged_shard_are_bad_as_by_direct_reading(
    proxy: FaultProxy, s3: S3Server, bucket: str, path: str
) -> None:
    source = source_at(path)
    damaged = bytearray(FILES["2.parquet"])
    damaged[1_000_000:1_000_400] = bytes(400)
    put_all(s3, bucket, {"theirs/2.parquet": bytes(damaged[:2_000_000])})
    source = Source(
        source.config.model_copy(update={"if_overwritten": "use"}), source.manifest, source.storage
    )
    found = sorted(read_by_actors(reader_of(source), source, layout_of(), num_actors=2))
    bad = {fetched.key for _, fetched in found if fetched.status is Status.CORRUPT}
    assert len(bad) >= ROWS_PER_SHARD / 2
    assert {key.partition("-")[0].partition("#")[0] for key in bad} <= {"theirs/2.parquet"}
    direct = expected(source, range(NUM_IMAGES))
    assert [(p, f.key, f.data, f.status) for p, f in found] == [
        (p, f.key, f.data, f.status) for p, f in direct
    ]


def test_an_outage_costs_no_image_and_one_that_lasts_ends_with_its_error(
    proxy: FaultProxy, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_at(path)
    calm = expected(source, range(NUM_IMAGES))
    monkeypatch.setattr(waiting, "NOTED_SECONDS", 0.2)
    told, number = threading.Event(), count()

    def report(_: str, is_over: bool) -> None:
        told.set()

    waiting.report_outages(report)
    found = []
    images = read_by_actors(reader_of(source), source, layout_of(), num_actors=2)
    for position, fetched in images:
        found.append((position, fetched))
        if next(number) == WINDOW + 5:
            proxy.go_down()
            comes_back = threading.Thread(target=lambda: (told.wait(60), proxy.come_up()), daemon=True)
            comes_back.start()
    assert sorted(found) == calm
    proxy.go_down()
    impatient = source_at_again(source, give_up_after_seconds=0.5)
    with pytest.raises(Unreachable, match=r"storage\.give_up_after_seconds=0.5"):
        list(read_by_actors(reader_of(impatient), impatient, layout_of(), num_actors=2))


def source_at_again(source: Source, *, give_up_after_seconds: float) -> Source:
    storage = source.storage.model_copy(update={"give_up_after_seconds": give_up_after_seconds})
    return Source(source.config, source.manifest, storage)


def test_read_ahead_is_no_error_and_no_second_reading(proxy: FaultProxy, path: str) -> None:
    source = source_at(path)
    reader, order = reader_of(source), source.order(1)
    ahead = groups_ahead(order, 0, NUM_IMAGES)
    assert ahead is not None
    reader.read_ahead(ahead)
    requests = len(proxy.requests)
    reader.read_ahead(ahead)
    images = order.locate(np.arange(2 * WINDOW))[1].tolist()
    assert all(fetched.data for fetched in reader.fetch(images))
    assert len(proxy.requests) == requests
    impatient = source_at_again(source, give_up_after_seconds=0.1)
    proxy.go_down()
    reader = reader_of(impatient)
    reader.read_ahead(ahead)
    with pytest.raises(DinorayError):
        reader.fetch([0])
