"""One stream for several runs: the bytes of an unshared one, each block made once, whoever comes, goes or dies."""

import hashlib
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from image_files import encode, picture
from paths import ROOT, SUPPORT
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from samples import write_all

from dinoray.models.errors import DataError, DinorayError
from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.source import Fetched, Source
from dinoray.pipeline.stream import ray_data, shared_stream
from dinoray.pipeline.stream.ray_data import StreamPlan, in_step
from dinoray.pipeline.stream.shared_stream import SharedStats, SharedStream

pytestmark = pytest.mark.ray

CROPS = CropsConfig(num_local_crops=2, global_crop_size=64, local_crop_size=16, kernel="torch")
LAYOUT = Layout(first_step=0, last_step=12, world_size=1, batch_size_per_worker=4, steps_per_block=2)
NUM_BLOCKS = 6
BLOCK_BYTES = 8 * crop_bytes(CROPS)  # above the 100 KiB below which Ray would keep a block with its owner
AMPLE = 1000 * BLOCK_BYTES
GOOD = {f"{n}.jpg": encode(np.roll(picture(), 3 * n, axis=1), "JPEG") for n in range(12)}
IMAGES = GOOD | {"bad.jpg": b"no image"}


class DeadlySource(Source):
    """Kills the process that fetches while a file named `deadly` lies beside the images, which goes with it."""

    def __reduce__(self) -> Any:
        return DeadlySource, (self.config, self.manifest)

    def arrivals(self, indices: Any) -> Iterator[tuple[int, Fetched]]:
        mark = Path(self.config.path) / "deadly"
        if mark.exists():
            mark.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().arrivals(indices)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, where consumers run, and a node of four, on which all actors find room."""
    folder = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_health_check_period_ms", "300")  # a lost node is noticed after five of them
        # Workers import what this file defines, and what it imports, by name.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, SUPPORT, Path(__file__).parent))))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            started.add_node(num_cpus=4)
            ray.init(address=started.address, log_to_driver=False)
            yield started
        finally:
            ray.shutdown()
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def plan_of(
    folder: Path, files: dict[str, bytes], kind: type[Source] = Source, *, cpus: float = 1
) -> StreamPlan:
    write_all(folder, files)
    config = DataConfig(path=str(folder))
    source = kind(config, build_manifest(config))
    return StreamPlan(
        source=ray.put(source),
        channel=RunChannel(),
        order=Order(source.num_images, seed=1),
        crops=CROPS,
        seed=1,
        augment_actors=(1, 1),
        cpus_per_augment_actor=cpus,
        cool_down_seconds=60,
    )


@pytest.fixture(scope="module")
def plan(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    return plan_of(tmp_path_factory.mktemp("images"), IMAGES)


@pytest.fixture(scope="module")
def stream(plan: StreamPlan) -> SharedStream:
    """Of two actors, which forgets nothing."""
    return SharedStream(plan, num_actors=2, window_bytes=AMPLE)


@pytest.fixture(scope="module")
def expected(plan: StreamPlan) -> Callable[[int], bytes]:
    """Digest of a step's batch of LAYOUT, made here."""
    augmenter = Augmenter(ray.get(plan.source), plan.order, CROPS, seed=plan.seed, num_threads=1)
    return lambda step: digest(augmenter.block(LAYOUT.positions(step, 0)))


def read(stream: SharedStream, layout: Layout = LAYOUT, rank: int = 0) -> Iterator[dict[str, Any]]:
    return shared_stream.batches(stream, layout, rank=rank, prefetch_batches=2)


def digest(batch: dict[str, Any]) -> bytes:
    """Of all that is the same whenever it is made."""
    parts = [batch[name].tobytes() for name in ("position", "status", "global_crops", "local_crops")]
    return hashlib.sha256(b"".join([*parts, "".join(batch["note"]).encode()])).digest()


def since(stream: SharedStream, before: SharedStats) -> tuple[int, int]:
    """(blocks made, blocks given) since then."""
    now = stream.stats()
    return now.blocks_made - before.blocks_made, now.blocks_given - before.blocks_given


def digests(stream: SharedStream) -> list[bytes]:
    """What a consumer received."""
    return [digest(batch) for batch in read(stream)]


def test_two_ranks_get_what_an_unshared_stream_gives_them(plan: StreamPlan, stream: SharedStream) -> None:
    layout = replace(LAYOUT, first_step=3, last_step=8, world_size=2)
    splits = ray_data.open_splits(plan, layout)
    unshared = [
        ray_data.batches(split, layout, rank=rank, prefetch_batches=1) for rank, split in enumerate(splits)
    ]
    with ThreadPoolExecutor(2) as threads:
        received = list(threads.map(list, unshared))
    bad = 0
    for rank, batches in enumerate(received):
        assert len(batches) == 5
        for ours, theirs in zip(read(stream, layout, rank), batches, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"cpu_ms", "busy_ms"}:
                np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
            assert ours["cpu_ms"].shape == theirs["cpu_ms"].shape == (4, 3)
            assert ours["cpu_ms"].dtype == theirs["cpu_ms"].dtype == np.float32
            assert not ours["global_crops"].flags.writeable
            assert not ours["global_crops"].flags.owndata
            bad += int((ours["status"] != 0).sum())
    assert bad >= 2  # positions 24 to 63 hold two whole epochs of 13 images, one of which is bad


def test_four_consumers_at_once_pay_for_each_block_once(
    stream: SharedStream, expected: Callable[[int], bytes]
) -> None:
    before = stream.stats()
    another_process = ray.remote(num_cpus=0)(digests).remote(stream)
    with ThreadPoolExecutor(3) as threads:
        received = list(threads.map(digests, 3 * [stream]))
    assert [*received, ray.get(another_process)] == 4 * [[expected(step) for step in range(12)]]
    assert since(stream, before) == (NUM_BLOCKS, 4 * NUM_BLOCKS)
    assert stream.stats().cpu_seconds > before.cpu_seconds


def test_who_comes_late_leaves_early_or_begins_within_a_block_is_served_what_is_there(
    stream: SharedStream, expected: Callable[[int], bytes]
) -> None:
    list(read(stream))
    before = stream.stats()
    early = read(stream)
    assert [digest(batch) for batch in islice(early, 3)] == [expected(step) for step in range(3)]
    early.close()
    resumed = replace(LAYOUT, first_step=5)
    assert [digest(batch) for batch in read(stream, resumed)] == [expected(step) for step in range(5, 12)]
    assert list(read(stream, replace(LAYOUT, first_step=12))) == []
    assert since(stream, before)[0] == 0


def test_what_was_forgotten_is_made_again_and_so_it_is_when_the_server_was_killed(
    plan: StreamPlan, expected: Callable[[int], bytes]
) -> None:
    stream = SharedStream(plan, num_actors=1, window_bytes=2 * BLOCK_BYTES)
    laggard = read(stream)
    received = [digest(next(laggard))]
    assert [digest(batch) for batch in read(stream)] == [expected(step) for step in range(12)]
    made = stream.stats().blocks_made
    assert made == NUM_BLOCKS
    received += [digest(batch) for batch in islice(laggard, 7)]
    assert stream.stats().blocks_made > made
    ray.kill(stream._server, no_restart=False)
    received += [digest(batch) for batch in laggard]
    assert received == [expected(step) for step in range(12)]


@pytest.mark.slow
def test_actors_that_die_are_replaced_and_their_blocks_made_again(
    cluster: Cluster, tmp_path: Path, expected: Callable[[int], bytes]
) -> None:
    doomed = cluster.add_node(num_cpus=6)
    plan = plan_of(tmp_path, IMAGES, DeadlySource, cpus=5)
    stream = SharedStream(plan, num_actors=1, window_bytes=AMPLE)
    (tmp_path / "deadly").touch()
    asked = [stream.request(LAYOUT.block(number), stop=LAYOUT.stop) for number in range(NUM_BLOCKS)]
    ray.get([block._answer for block in asked])  # all are made, and lie on the node that made them
    assert not (tmp_path / "deadly").exists()
    before = stream.stats()
    cluster.add_node(num_cpus=6)
    cluster.remove_node(doomed, allow_graceful=False)
    for _ in range(2):
        assert digests(stream) == [expected(step) for step in range(12)]
    assert since(stream, before)[0] == NUM_BLOCKS


def test_an_error_that_a_person_must_mend_reaches_each_consumer_as_it_is(
    cluster: Cluster, tmp_path: Path
) -> None:
    files = GOOD | {f"bad/{n:02d}.jpg": b"no image" for n in range(300)}
    stream = SharedStream(plan_of(tmp_path, files), num_actors=1, window_bytes=AMPLE)
    with ThreadPoolExecutor(3) as threads:
        consumers = [threads.submit(list, read(stream)) for _ in range(3)]
        errors = [consumer.exception() for consumer in consumers]
    with pytest.raises(DataError) as tried_again:
        list(read(stream))
    for error in [*errors, tried_again.value]:
        assert isinstance(error, DataError)
        assert not isinstance(error, RayError)
        assert re.fullmatch(r".* and the 16 images after it are unreadable .*; check data.path", str(error))


def test_a_batch_that_is_not_its_steps_is_refused() -> None:
    batches = [{"position": LAYOUT.positions(step, 0)} for step in range(12)]
    assert list(in_step(batches, LAYOUT, rank=0)) == batches
    with pytest.raises(DinorayError, match=r"step=3 rank=0 received positions .16 17 18.*out of order"):
        list(in_step([*batches[:3], *batches[4:]], LAYOUT, rank=0))
    with pytest.raises(DinorayError, match="ended at step=11, before step=12"):
        list(in_step(batches[:11], LAYOUT, rank=0))
