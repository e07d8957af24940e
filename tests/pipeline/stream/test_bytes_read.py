"""Bytes of Parquet, counted at a proxy before a real store: read once an epoch by any number of actors."""

import random
import shutil
import tempfile

import numpy as np
import pytest
import ray
from faults import fault_proxy
from image_files import jpeg, scene
from paths import ROOT
from servers import S3Server, aws_environment, use_aws
from storage_sets import PUTS, ROWS_OF_OTHERS, Images

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.sharing import share_reading
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.stream import ray_data
from dinoray.pipeline.stream.readers import Readers

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.nightly]

CROPS = CropsConfig(num_local_crops=1, global_crop_size=96, local_crop_size=16)
STORE_BYTES = 90_000_000
"""Ray's store: so small for these crops that no actor gets far ahead of a slow one, as with crops of usual size."""
FILES = [jpeg(scene(96, 64)) + random.Random(number).randbytes(18_000) for number in range(100)]
IMAGES = Images(FILES, 3200)
"""Of 20 kB: 64 MB in all. Of others, they are in 32 row groups of 2 MB."""
EPOCHS = 1
LAYOUT = Layout(
    first_step=0,
    last_step=EPOCHS * IMAGES.count // 64,
    world_size=1,
    batch_size_per_worker=64,
    steps_per_block=2,
)


@pytest.mark.parametrize("num_actors", [1, 2, 4])
@pytest.mark.parametrize("layout", ["packed", "others"])
def test_each_byte_is_read_once_an_epoch(
    layout: str, num_actors: int, s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for written in dict.fromkeys(("objects" if layout == "packed" else layout, layout)):
        PUTS[written](IMAGES, s3.client(), bucket)
    folder = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with fault_proxy(s3.endpoint) as proxy:
        use_aws(monkeypatch, aws_environment(proxy.endpoint))
        # A cache, and so a window, of three row groups, as with a real set: a small part of it.
        config = DataConfig(path=f"s3://{bucket}/{layout}", row_group_cache_bytes=3 * ROWS_OF_OTHERS * 21_000)
        source = Source(config, build_manifest(config))
        order = source.order(0)
        try:
            ray.init(
                num_cpus=6, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False
            )
            channel = RunChannel()
            sharing = share_reading(
                source.manifest,
                order,
                most_actors=num_actors,
                cpus_per_actor=1,
                rows_per_block=LAYOUT.rows_per_block,
            )
            assert (sharing is not None) == (layout == "others")
            plan = ray_data.StreamPlan(
                source=ray.put(source),
                channel=channel,
                order=order,
                crops=CROPS,
                seed=0,
                augment_actors=(num_actors, num_actors),
                cpus_per_augment_actor=1,
                cool_down_seconds=60,
                readers=None if sharing is None else Readers.start(sharing, channel),
            )
            before = proxy.bytes_answered
            (split,) = ray_data.open_splits(plan, LAYOUT)
            positions = [
                batch["position"]
                for batch in ray_data.batches(split, LAYOUT, rank=0, prefetch_batches=1)
                if not batch["status"].any()
            ]
            num_bytes = proxy.bytes_answered - before
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
    assert len(np.concatenate(positions)) == EPOCHS * IMAGES.count
    listed = s3.client().list_objects_v2(Bucket=bucket, Prefix=f"{layout}/")["Contents"]
    stored = sum(found["Size"] for found in listed if found["Key"].endswith(".parquet"))
    ratio = num_bytes / (EPOCHS * stored)
    print(f"{layout}, {num_actors} actors: read / used = {ratio:.3f}")
    assert 0.98 < ratio <= 1.1
