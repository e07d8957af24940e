"""What one node can do for a run: crop, fetch, hold blocks, send and receive them. The arithmetic under forecast.py.

A node that augments is held by the first of four things: its CPUs, requests in flight to storage, the object store
that blocks wait in, its link. What comes into a GPU node from others, crops and gradients, must fit its link. No Ray.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.data.partition import batch_size_per_worker, steps_per_block
from pipeline.planning.prices import NodeType

Limit = Literal["training step", "augmentation", "network", "S3 latency", "object store"]


STREAM_SHARE = 0.92
"""Of what a bare CPU crops, what comes through Ray (benchmarks/RESULTS.md, "The stream's cost", by the clock)."""
LINK_SHARE = 0.8
"""Of a link's rate, what crops get: an assumption, for headers and because blocks come in bursts."""
STORE_SHARE = 0.3
"""Of a node's memory, what Ray takes for its object store."""
BLOCKS_PER_ACTOR = 3
"""Blocks of an augment actor that lie in the store: two under way, one that waits to be taken."""


class Figures(NamedTuple):
    """Averages, measured or given. `images_per_second_per_gpu` is that of a CPU where training is on CPUs."""

    images_per_second_per_cpu: float
    images_per_second_per_gpu: float
    bytes_per_image: float
    images_per_request: float
    latency_ms: float


@dataclass(frozen=True)
class Run:
    """What the config says of a run, in numbers. `most_actors`: the ceiling on augment actors, if there is one."""

    total_steps: int
    global_batch_size: int
    train_workers: int
    crop_bytes: int
    gradient_bytes: int
    forwards_per_image: float
    evaluations: int
    images_per_evaluation: int
    checkpoints: int
    prefetch_batches: int
    cpus_per_train_worker: float
    cpus_per_augment_actor: float
    most_actors: int | None
    fetch_concurrency: int

    @property
    def images(self) -> int:
        """Images over all epochs."""
        return self.total_steps * self.global_batch_size

    @property
    def block_bytes(self) -> int:
        """Of one block of crops, as data/partition.py cuts them."""
        per_worker = batch_size_per_worker(self.global_batch_size, self.train_workers)
        return steps_per_block(per_worker, self.crop_bytes) * per_worker * self.crop_bytes


class Augmenting(NamedTuple):
    """What one node crops: images/s, what holds it there, its actors, and the CPUs that are then busy."""

    images_per_second: float
    limit: Limit
    actors: int
    busy_cpus: float


def carried(gbit: float, crop_bytes: int) -> float:
    """Images/s whose crops a link of so many Gbit/s carries."""
    return LINK_SHARE * gbit * 1e9 / 8 / crop_bytes


def augmenting(node: NodeType, cpus: float, run: Run, figures: Figures, *, sends: bool) -> Augmenting:
    """What a node crops on `cpus` of its CPUs; it `sends` all of it elsewhere, or uses it."""
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
    if sends:  # images come in while crops go out, each way as fast
        limits["network"] = carried(node.gbit, max(run.crop_bytes, math.ceil(figures.bytes_per_image)))
    limit = min(limits, key=lambda name: limits[name])
    busy = limits[limit] / limits["augmentation"] * actors * run.cpus_per_augment_actor
    return Augmenting(limits[limit], limit, actors, busy)


def fetched_per_actor(run: Run, figures: Figures) -> float:
    """Images/s that the requests which an augment actor has in flight bring."""
    if not figures.latency_ms:
        return math.inf
    return run.fetch_concurrency * figures.images_per_request * 1000 / figures.latency_ms


def bytes_into_a_gpu_node(run: Run, figures: Figures, *, share: float, made: float, home: float) -> float:
    """Bytes into one GPU node for each image that the run trains on.

    `share` of the workers are on it, and `home` of the `made` crops; gradients go round in a ring of all workers, which
    enters each node once.
    """
    local = home / made if made else 0.0
    crops = share * (1 - local) * run.crop_bytes
    images = local * figures.bytes_per_image
    passes = 2 * (1 - 1 / run.train_workers) if share < 1 else 0.0
    gradients = passes * run.gradient_bytes / run.global_batch_size
    return crops + images + gradients
