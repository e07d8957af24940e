"""Readers in processes of their own: the same crops as without them, whoever dies."""

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from image_files import jpeg, scene
from ray.exceptions import RayError
from ray_head import ray_here
from samples import parquet, write_all

from dinoray.models.errors import DataError, ResourceError
from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.sharing import share_reading
from dinoray.pipeline.data.reading.source import Fetched, Source
from dinoray.pipeline.stream import ray_data, readers, shared_stream
from dinoray.pipeline.stream.ray_data import StreamPlan
from dinoray.pipeline.stream.readers import Readers, SharedImages
from dinoray.pipeline.stream.shared_stream import SharedStream

pytestmark = pytest.mark.ray

CROPS = CropsConfig(num_local_crops=2, global_crop_size=64, local_crop_size=16, kernel="torch")
NUM_IMAGES, ROWS = 120, 5
PICTURE = jpeg(scene(96, 64))
IMAGES = [
    b"no image" if number == 40 else PICTURE + random.Random(number).randbytes(3000)
    for number in range(NUM_IMAGES)
]
LAYOUT = Layout(first_step=1, last_step=12, world_size=2, batch_size_per_worker=8, steps_per_block=2)
"""Begins within a window of 20 images and ends in the second epoch."""


class FailingSource(Source):
    """Refuses all images, in any process."""

    def __reduce__(self) -> Any:
        return FailingSource, (self.config, self.manifest)

    def with_cache(self, _: Any) -> Source:
        return self

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        raise DataError("all is refused; ask for access")


class DeadlySource(FailingSource):
    """Kills whoever fetches."""

    def __reduce__(self) -> Any:
        return DeadlySource, (self.config, self.manifest)

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        os._exit(1)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with ray_here(Path(__file__).parent, num_cpus=4):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("theirs")
    rows = {"key": [f"{number}" for number in range(NUM_IMAGES)], "image": IMAGES}
    write_all(folder, {"all.parquet": parquet(rows, row_group_size=ROWS, compression="none")})
    return DataConfig(path=str(folder), row_group_cache_bytes=4 * ROWS * (len(PICTURE) + 3100))


def plan_of(config: DataConfig, kind: type[Source] = Source, *, most_actors: int = 2) -> StreamPlan:
    source, channel = kind(config, build_manifest(config)), RunChannel()
    order = source.order(1)
    window = order.window(0)
    assert window is not None
    assert len(window.groups) == 4
    sharing = share_reading(
        source.manifest, order, most_actors=most_actors, cpus_per_actor=1, rows_per_block=16
    )
    assert sharing is not None
    return StreamPlan(
        source=ray.put(source),
        channel=channel,
        order=order,
        crops=CROPS,
        seed=1,
        augment_actors=(2, 2),
        cpus_per_augment_actor=1,
        cool_down_seconds=60,
        readers=Readers.start(sharing, channel),
    )


def images_of(plan: StreamPlan) -> SharedImages:
    assert plan.readers is not None
    return SharedImages(plan.readers, plan.source, plan.order)


def assert_as_by_direct_reading(batches: list[dict[str, Any]], plan: StreamPlan, *, rank: int) -> None:
    augmenter = Augmenter(ray.get(plan.source), plan.order, CROPS, seed=1, num_threads=1)
    assert len(batches) == LAYOUT.last_step - LAYOUT.first_step
    for step, batch in enumerate(batches, start=LAYOUT.first_step):
        expected = augmenter.block(LAYOUT.positions(step, rank))
        for name in ("position", "status", "note", "global_crops", "local_crops"):
            np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("num_streams", [2, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.usefixtures("_cluster")
def test_a_stream_has_the_crops_of_direct_reading(config: DataConfig, num_streams: int) -> None:
    plan = replace(plan_of(config), num_streams=num_streams)
    splits = ray_data.open_splits(plan, LAYOUT)

    def received(rank: int) -> list[dict[str, Any]]:
        return list(ray_data.batches(splits[rank], LAYOUT, rank=rank, prefetch_batches=1))

    with ThreadPoolExecutor(2) as threads:
        batches = list(threads.map(received, range(2)))
    bad = sum(int((batch["status"] != 0).sum()) for of_rank in batches for batch in of_rank)
    assert bad >= 1
    for rank in range(2):
        assert_as_by_direct_reading(batches[rank], plan, rank=rank)


@pytest.mark.usefixtures("_cluster")
def test_actors_of_a_stream_wait_for_one_that_is_two_windows_behind(config: DataConfig) -> None:
    plan = plan_of(config)
    assert plan.readers is not None
    first, second = (
        SharedImages(plan.readers, plan.source, plan.order, stream) for stream in LAYOUT.divided(2)
    )
    windows = [np.array([20 * window]) for window in range(4)]
    first.expect(windows[0], 1000)
    first.expect(windows[1], 1000)
    with ThreadPoolExecutor(1) as threads:
        third = threads.submit(first.expect, windows[2], 1000)
        with pytest.raises(FutureTimeoutError):
            third.result(timeout=1)
        second.expect(windows[0], 1000)
        third.result(timeout=20)  # well before the longest wait
    alone = SharedImages(plan.readers, plan.source, plan.order, LAYOUT)
    alone.expect(windows[3], 1000)  # the only one of its run


@pytest.mark.usefixtures("_cluster")
def test_a_shared_stream_has_them_too_and_readers_that_are_closed_end(config: DataConfig) -> None:
    plan = plan_of(config)
    stream = SharedStream(plan, num_actors=2, window_bytes=1 << 30)
    alone = replace(LAYOUT, world_size=1, batch_size_per_worker=16)

    def received(_: int) -> list[dict[str, Any]]:
        return list(shared_stream.batches(stream, alone, rank=0, prefetch_batches=2))

    with ThreadPoolExecutor(2) as threads:
        for batches in threads.map(received, range(2)):
            halves = [{name: column[:8] for name, column in batch.items()} for batch in batches]
            assert_as_by_direct_reading(halves, plan, rank=0)
    stream.close()
    assert plan.readers is not None
    plan.readers.close()
    with pytest.raises(RayError):
        images_of(plan).fetch([0])


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As ray.nodes() gives it."""
    return {"NodeID": name, "Alive": alive, "Resources": {"memory": 1e9, **resources}}


@pytest.mark.parametrize(
    ("nodes", "places"),
    [
        ([node("head"), node("b", CPU=4), node("a", CPU=4)], ["b", "b", "a", "b"]),
        ([node("head", CPU=0.0), node("b", CPU=4), node("g", CPU=8, GPU=1)], ["g"] * 4),
        ([node("h", CPU=8, GPU=1), node("g", CPU=8, GPU=1), node("b", CPU=4)], ["g", "h", "g", "h"]),
        ([node("g", CPU=8, GPU=1, alive=False), node("b", CPU=4)], ["b"] * 4),
        ([node("g", GPU=1)], ["b"] * 4),  # no CPU: who asks knows best
    ],
)
def test_readers_are_where_nodes_stay(nodes: list[dict[str, Any]], places: list[str]) -> None:
    assert [readers.reader_node(number, "b", nodes) for number in range(4)] == places


@pytest.mark.usefixtures("_cluster")
def test_a_reader_that_dies_is_replaced_and_so_are_all_with_their_host(config: DataConfig) -> None:
    plan = plan_of(config, most_actors=24)  # of three readers
    assert plan.readers is not None
    assert plan.readers.sharing.num_readers == 3
    images, others = images_of(plan), images_of(plan)
    expected = ray.get(plan.source).fetch(range(NUM_IMAGES))
    assert images.fetch(range(NUM_IMAGES)) == others.fetch(range(NUM_IMAGES)) == expected
    assert images.take_cpu_seconds() > 0
    ray.kill(images._lent[0].reader)
    assert images.fetch(range(NUM_IMAGES)) == others.fetch(range(NUM_IMAGES)) == expected
    assert images._lent[0] == others._lent[0]
    ray.kill(plan.readers.host, no_restart=False)
    assert images.fetch(range(NUM_IMAGES)) == others.fetch(range(NUM_IMAGES)) == expected


@pytest.mark.usefixtures("_cluster")
def test_an_error_of_reading_reaches_who_asks_as_it_is(config: DataConfig) -> None:
    with pytest.raises(DataError, match="all is refused; ask for access") as caught:
        images_of(plan_of(config, FailingSource)).fetch([0])
    assert not isinstance(caught.value, RayError)


@pytest.mark.usefixtures("_cluster")
def test_readers_that_die_again_and_again_end_with_a_remedy(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_TRIES", 2)
    with pytest.raises(ResourceError, match=r"2 readers of .* in a row died .*; if memory ran out, give"):
        images_of(plan_of(config, DeadlySource)).fetch([0])


def test_calls_are_of_one_reader_each_and_limited_in_rows_and_bytes(config: DataConfig) -> None:
    source = Source(config, build_manifest(config))
    sharing = share_reading(
        source.manifest, source.order(1), most_actors=24, cpus_per_actor=1, rows_per_block=16
    )
    assert sharing is not None
    groups = np.arange(NUM_IMAGES) // ROWS
    calls = readers.cut_in_calls(
        np.arange(NUM_IMAGES), sharing.reader_of(groups), np.full(NUM_IMAGES, 1 << 20)
    )
    places = sorted(place for call in calls for place in call.places)
    assert places == list(range(NUM_IMAGES))
    for call in calls:
        assert call.images == call.places
        assert {place // ROWS % 3 for place in call.places} == {call.reader}
        assert len(call.places) <= 16
    assert len(calls) == 9
    assert [len(call.places) for call in readers.cut_in_calls(*np.zeros((3, 70), np.int64))] == [32, 32, 6]
