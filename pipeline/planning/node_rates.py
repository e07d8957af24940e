"""Rates of one node: cropping, fetching, storing blocks, sending, receiving. Arithmetic for forecast.py.

One of four limits holds an augmenting node: its CPUs, requests in flight to storage, the object store that
holds waiting blocks, or its link. A GPU node's link must carry the incoming crops and gradients. No Ray.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dinoray.pipeline.data.partition import batch_size_per_worker, steps_per_block
from dinoray.pipeline.planning.prices import NodeType
from dinoray.pipeline.training.config import CheckpointConfig

Limit = Literal["training step", "augmentation", "network", "S3 latency", "object store"]


STREAM_SHARE = 0.92
"""Ray throughput over bare-CPU throughput, by the clock (benchmarks/RESULTS.md, "The stream's cost")."""
STREAM_IMAGES_PER_SECOND = 7000
"""Images/s of one execution of Ray Data, whose coordinator is one busy Python process: measured 7,000 to 8,000 where
neither crops nor training were the limit."""
LINK_SHARE = 0.8
"""Share of a link's rate available to crops: an assumption, for headers and because blocks come in bursts."""
STORE_SHARE = 0.3
"""Share of a node's memory that Ray takes for its object store."""
BLOCKS_PER_ACTOR = 3
"""Blocks per augment actor in the object store: two in progress, one waiting to be taken."""


class Figures(NamedTuple):
    """Averages, measured or given. `images_per_second_per_gpu` is per CPU if training is on CPUs."""

    images_per_second_per_cpu: float
    images_per_second_per_gpu: float
    bytes_per_image: float
    images_per_request: float
    latency_ms: float


@dataclass(frozen=True)
class Run:
    """Numbers of a run from its config. `most_actors` is the ceiling on augment actors, if there is one."""

    total_steps: int
    global_batch_size: int
    train_workers: int
    crop_bytes: int
    gradient_bytes: int
    forwards_per_image: float
    evaluations: int
    pausing_evaluations: int
    """Those for which training stands."""
    images_per_evaluation: int
    checkpoints: int
    """Number at given steps, without those by time."""
    checkpoint: CheckpointConfig
    prefetch_batches: int
    cpus_per_train_worker: float
    cpus_per_augment_actor: float
    most_actors: int | None
    fetch_concurrency: int

    @property
    def images(self) -> int:
        """Return the number of images over all epochs."""
        return self.total_steps * self.global_batch_size

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block of crops, as partitioned by data/partition.py."""
        per_worker = batch_size_per_worker(self.global_batch_size, self.train_workers)
        return steps_per_block(per_worker, self.crop_bytes) * per_worker * self.crop_bytes


class Augmenting(NamedTuple):
    """Cropping rate of one node in images/s, its limit, its actors, and the CPUs that are then busy."""

    images_per_second: float
    limit: Limit
    actors: int
    busy_cpus: float


def carried(gbit: float, crop_bytes: int) -> float:
    """Return the images/s whose crops a link of `gbit` Gbit/s carries."""
    return LINK_SHARE * gbit * 1e9 / 8 / crop_bytes


def augmenting(node: NodeType, cpus: float, run: Run, figures: Figures, *, sends: bool) -> Augmenting:
    """Return the cropping rate of a node on `cpus` of its CPUs; with `sends`, all crops leave the node."""
    actors = math.floor(cpus / run.cpus_per_augment_actor + 1e-9)
    if not actors:
        return Augmenting(0.0, "augmentation", 0, 0.0)
    per_actor = STREAM_SHARE * run.cpus_per_augment_actor * figures.images_per_second_per_cpu
    room = math.floor(STORE_SHARE * node.memory_gib * 2**30 / (BLOCKS_PER_ACTOR * run.block_bytes))
    limits: dict[Limit, float] = {
        "augmentation": actors * per_actor,
        "S3 latency": actors * fetched_per_actor(run, figures),
        "object store": max(1, room) * per_actor,
    }
    if sends:  # images come in while crops go out, at full rate in each direction
        limits["network"] = carried(node.gbit, max(run.crop_bytes, math.ceil(figures.bytes_per_image)))
    limit = min(limits, key=lambda name: limits[name])
    busy = limits[limit] / limits["augmentation"] * actors * run.cpus_per_augment_actor
    return Augmenting(limits[limit], limit, actors, busy)


def streams_for(images_per_second: float, train_workers: int) -> int:
    """Return the least number of streams that brings `images_per_second`, of those that divide the train workers.

    Streams with equally many train workers have equal work. At most one for each train worker.
    """
    dividing = [number for number in range(1, train_workers + 1) if train_workers % number == 0]
    enough = (number for number in dividing if number * STREAM_IMAGES_PER_SECOND >= images_per_second)
    return next(enough, train_workers)


def fetched_per_actor(run: Run, figures: Figures) -> float:
    """Return the images/s fetched by the requests that one augment actor has in flight."""
    if not figures.latency_ms:
        return math.inf
    return run.fetch_concurrency * figures.images_per_request * 1000 / figures.latency_ms


def bytes_into_a_gpu_node(run: Run, figures: Figures, *, share: float, made: float, home: float) -> float:
    """Return the bytes into one GPU node for each image that the run trains on.

    `share` is the share of workers on the node; `home` of the `made` crops are made there. Gradients travel
    in a ring of all workers, which enters each node once.
    """
    local = home / made if made else 0.0
    crops = share * (1 - local) * run.crop_bytes
    images = local * figures.bytes_per_image
    passes = 2 * (1 - 1 / run.train_workers) if share < 1 else 0.0
    gradients = passes * run.gradient_bytes / run.global_batch_size
    return crops + images + gradients
