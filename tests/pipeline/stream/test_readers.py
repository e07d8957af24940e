"""Readers that all augment actors share: the same crops as without them, and each byte of others' Parquet read once."""

import os
import random
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import ray
from faults import FaultProxy, fault_proxy
from image_files import jpeg, scene
from paths import ROOT, SUPPORT
from ray.cluster_utils import Cluster
from samples import parquet, put_all
from servers import S3Server, aws_environment, use_aws

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.sharing import share_reading
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.stream import ray_data
from dinoray.pipeline.stream.ray_data import StreamPlan
from dinoray.pipeline.stream.readers import Readers, SharedImages

pytestmark = [pytest.mark.ray, pytest.mark.s3]

CROPS = CropsConfig(num_local_crops=2, global_crop_size=64, local_crop_size=16, kernel="torch")
NUM_IMAGES, ROWS, WINDOW_GROUPS, BATCH = 800, 10, 12, 32
WINDOW = ROWS * WINDOW_GROUPS
LAYOUT = Layout(
    first_step=0, last_step=NUM_IMAGES // BATCH, world_size=2, batch_size_per_worker=16, steps_per_block=2
)
PICTURE = jpeg(scene(96, 64))
SHARDS = {
    f"{shard}.parquet": parquet(
        {
            "key": [f"{shard}-{row}" for row in range(NUM_IMAGES // 4)],
            "image": [
                PICTURE + random.Random(1000 * shard + row).randbytes(20_000)
                for row in range(NUM_IMAGES // 4)
            ],
        },
        row_group_size=ROWS,
        compression="none",
    )
    for shard in range(4)
}
USED = NUM_IMAGES * (len(PICTURE) + 20_000)


@pytest.fixture(scope="module")
def store(s3: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the store, which this process and all of Ray read through."""
    folder = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch, fault_proxy(s3.endpoint) as running:
        use_aws(patch, aws_environment(running.endpoint))
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, SUPPORT))))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=8)
            ray.init(address=cluster.address, log_to_driver=False)
            yield running
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def path(store: FaultProxy, s3: S3Server) -> str:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3.client().create_bucket(Bucket=bucket)
    put_all(s3, bucket, {f"theirs/{name}": data for name, data in SHARDS.items()})
    return f"s3://{bucket}/theirs"


@pytest.fixture(scope="module")
def source(path: str) -> Source:
    return source_at(path)


def source_at(path: str, *, give_up_after_seconds: float = 60) -> Source:
    config = DataConfig(path=path, row_group_cache_bytes=WINDOW_GROUPS * ROWS * (len(PICTURE) + 20_100))
    storage = StorageConfig(give_up_after_seconds=give_up_after_seconds, hedge_after_seconds=None)
    source = Source(config, build_manifest(config), storage)
    window = source.order(1).window(0)
    assert window is not None
    assert len(window.groups) == WINDOW_GROUPS
    return source


def plan_of(source: Source, *, num_actors: int = 1, cpus: float = 1) -> StreamPlan:
    order, channel = source.order(1), RunChannel()
    sharing = share_reading(
        source.manifest,
        order,
        most_actors=num_actors,
        cpus_per_actor=cpus,
        rows_per_block=LAYOUT.rows_per_block,
    )
    assert sharing is not None
    return StreamPlan(
        source=ray.put(source),
        channel=channel,
        order=order,
        crops=CROPS,
        seed=1,
        augment_actors=(num_actors, num_actors),
        cpus_per_augment_actor=1,
        cool_down_seconds=60,
        readers=Readers.start(sharing, channel),
    )


def images_of(plan: StreamPlan) -> SharedImages:
    assert plan.readers is not None
    return SharedImages(plan.readers, plan.source, plan.order)


def received(plan: StreamPlan, layout: Layout) -> list[list[dict[str, Any]]]:
    """The batches of each rank."""
    splits = ray_data.open_splits(plan, layout)

    def of(rank: int) -> list[dict[str, Any]]:
        return list(ray_data.batches(splits[rank], layout, rank=rank, prefetch_batches=1))

    with ThreadPoolExecutor(layout.world_size) as threads:
        return list(threads.map(of, range(layout.world_size)))


def assert_crops_are_those_of_direct_reading(
    batches: list[list[dict[str, Any]]], source: Source, layout: Layout
) -> None:
    augmenter = Augmenter(source, source.order(1), CROPS, seed=1, num_threads=1)
    for rank, of_rank in enumerate(batches):
        assert len(of_rank) == layout.last_step - layout.first_step
        for step, batch in enumerate(of_rank, start=layout.first_step):
            expected = augmenter.block(layout.positions(step, rank))
            for name in ("position", "status", "note", "global_crops", "local_crops"):
                np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("num_actors", [1, 2, 4])
def test_a_stream_has_the_crops_of_direct_reading_and_reads_each_byte_once(
    store: FaultProxy, source: Source, num_actors: int
) -> None:
    before = store.bytes_answered
    batches = received(plan_of(source, num_actors=num_actors), LAYOUT)
    times_read = (store.bytes_answered - before) / USED
    print(times_read, len(store.requests))
    assert times_read <= 1.1
    assert_crops_are_those_of_direct_reading(batches, source, LAYOUT)
