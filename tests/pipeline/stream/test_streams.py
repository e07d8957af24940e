"""Several streams of a run: the batches of one, whoever dies, and pools that together have as many actors as one."""

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest
import ray
from image_files import encode, picture
from ray_head import ray_here
from samples import write_all

from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox
from dinoray.pipeline.cluster.pool_size import TrainerReading
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import Layout
from dinoray.pipeline.data.reading.source import Fetched, Source
from dinoray.pipeline.stream import ray_data
from dinoray.pipeline.stream.ray_data import StreamPlan

pytestmark = pytest.mark.ray

CROPS = CropsConfig(num_local_crops=2, global_crop_size=64, local_crop_size=16, kernel="torch")
LAYOUT = Layout(first_step=0, last_step=12, world_size=4, batch_size_per_worker=4, steps_per_block=2)
IMAGES = {f"{n}.jpg": encode(np.roll(picture(), 3 * n, axis=1), "JPEG") for n in range(12)}
IMAGES["bad.jpg"] = b"no image"


class DeadlySource(Source):
    """Kills the process that fetches while a file named `deadly` lies beside the images, which goes with it."""

    def __reduce__(self) -> Any:
        return DeadlySource, (self.config, self.manifest)

    def arrivals(self, indices: Any) -> Iterator[tuple[int, Fetched]]:
        try:
            (Path(self.config.path) / "deadly").unlink()
        except FileNotFoundError:
            return super().arrivals(indices)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with ray_here(Path(__file__).parent, num_cpus=5):
        yield


@pytest.fixture(scope="module")
def plan(_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    folder = tmp_path_factory.mktemp("images")
    write_all(folder, IMAGES)
    config = DataConfig(path=str(folder))
    source = DeadlySource(config, build_manifest(config))
    return StreamPlan(
        source=ray.put(source),
        channel=RunChannel(),
        order=Order(source.num_images, seed=1),
        crops=CROPS,
        seed=1,
        augment_actors=(1, 1),
        cpus_per_augment_actor=1,
        cool_down_seconds=60,
    )


@pytest.fixture(scope="module")
def everything(plan: StreamPlan) -> list[list[bytes]]:
    """Digests of the batches of each rank, made here."""
    augmenter = Augmenter(ray.get(plan.source), plan.order, CROPS, seed=plan.seed, num_threads=1)
    return [
        [digest(augmenter.block(LAYOUT.positions(step, rank))) for step in range(LAYOUT.last_step)]
        for rank in range(LAYOUT.world_size)
    ]


def with_streams(plan: StreamPlan, num_streams: int, *, most_actors: int | None = None) -> StreamPlan:
    """The plan of a run of its own, with an augment actor for each stream, and more if they may be more."""
    actors = num_streams, most_actors or num_streams
    return replace(plan, num_streams=num_streams, augment_actors=actors, channel=RunChannel())


def digest(batch: dict[str, Any]) -> bytes:
    """Of all that is the same whenever it is made."""
    parts = [batch[name].tobytes() for name in ("position", "status", "global_crops", "local_crops")]
    return hashlib.sha256(b"".join([*parts, "".join(batch["note"]).encode()])).digest()


@ray.remote(num_cpus=0)
class Ranks:
    """The process of the ranks.

    Not that of the tests: Ray Data reads ahead in threads, which outlive an iterator that was left early, and Ray
    crashes a process that leaves it while one of its threads waits for an object.
    """

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@pytest.fixture(scope="module")
def in_ranks(_cluster: None) -> Callable[..., Any]:
    """`in_ranks(function, *arguments)` is what the function returns there."""
    ranks = Ranks.remote()  # type: ignore[attr-defined]
    return lambda function, *arguments: ray.get(ranks.run.remote(function, *arguments))


def received(plan: StreamPlan, layout: Layout = LAYOUT, num_steps: int | None = None) -> list[list[bytes]]:
    """Digests of what each rank receives in its first steps, all ranks at once."""
    splits = ray_data.open_splits(plan, layout)

    def of_rank(rank: int) -> list[bytes]:
        batches = ray_data.batches(splits[rank], layout, rank=rank, prefetch_batches=1)
        return [digest(batch) for batch in islice(batches, num_steps)]

    assert len(splits) == layout.world_size
    with ThreadPoolExecutor(layout.world_size) as threads:
        return list(threads.map(of_rank, range(layout.world_size)))


@pytest.mark.nightly  # beside the runs of tests/end_to_end, which have one
def test_one_stream_gives_each_rank_the_crops_of_its_steps(
    plan: StreamPlan, everything: list[list[bytes]], in_ranks: Callable[..., Any]
) -> None:
    assert in_ranks(received, with_streams(plan, 1)) == everything


def test_two_and_four_streams_give_the_same_also_to_a_run_that_resumes_within_a_block(
    plan: StreamPlan, everything: list[list[bytes]], in_ranks: Callable[..., Any]
) -> None:
    before = in_ranks(received, with_streams(plan, 2), LAYOUT, 5)
    after = in_ranks(received, with_streams(plan, 4), replace(LAYOUT, first_step=5))
    assert [first + rest for first, rest in zip(before, after, strict=True)] == everything


def test_a_stream_that_loses_an_actor_gives_the_same_and_so_does_the_other(
    plan: StreamPlan, everything: list[list[bytes]], in_ranks: Callable[..., Any]
) -> None:
    mark = Path(ray.get(plan.source).config.path) / "deadly"
    mark.touch()
    found = in_ranks(received, with_streams(plan, 2))
    assert not mark.exists()
    assert found == everything


def test_a_leg_has_a_limited_number_of_blocks_in_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "_LEG_BLOCKS", 4)
    for num_streams, steps in ((1, 2), (2, 4), (3, 4), (4, 8)):  # of three streams one has two ranks
        legs = list(ray_data.legs(LAYOUT, num_streams))
        assert [leg.first_step for leg in legs] == list(range(0, 12, steps))
        assert {leg.num_blocks for stream in legs for leg in stream.divided(num_streams)} <= {2, 4}


def metrics_until_four_actors(plan: StreamPlan) -> list[dict[str, float]]:
    """What the pools tell a trainer that waits for crops half of its time, at each step until there are 4 actors."""
    layout, mailbox = replace(LAYOUT, last_step=3000), PoolMailbox(plan.channel)
    starved = TrainerReading(seconds=40, wait_seconds=20, images=1000, busy_seconds=80)
    splits = ray_data.open_splits(plan, layout)
    seen: list[dict[str, float]] = []
    step, is_done = Barrier(layout.world_size), Event()

    def train(rank: int) -> None:
        for _ in ray_data.batches(splits[rank], layout, rank=rank, prefetch_batches=1):
            if rank == 0:
                mailbox.send_reading(starved)
                seen.append(mailbox.metrics())
                if seen[-1].get("augment_actors") == 4:
                    is_done.set()
            step.wait()
            if is_done.is_set():
                return

    with ThreadPoolExecutor(layout.world_size) as threads:
        list(threads.map(train, range(layout.world_size)))
    return [metrics for metrics in seen if metrics]


@pytest.mark.nightly  # beside tests/pipeline/cluster/test_pool_size.py
def test_pools_grow_together_up_to_the_actors_of_the_run_and_the_next_leg_begins_with_them(
    plan: StreamPlan, in_ranks: Callable[..., Any]
) -> None:
    plan = with_streams(plan, 2, most_actors=4)
    known = in_ranks(metrics_until_four_actors, plan)
    assert known[0]["augment_target"] == 2
    assert known[-1]["augment_target"] == 4
    assert max(metrics["augment_actors"] for metrics in known) == 4
    kept = PoolMailbox(plan.channel).begin()
    assert kept is not None
    assert (kept.size.target, kept.work) == (4, (2, 2))
