"""The Ray Data plan: block numbers -> CPU actor pool (fetch, decode, crop) -> one split per train worker.

One fused actor does fetch, decode and multi-crop, so full-size images never travel; what travels is uint8 crops, a
block of them at a time. Blocks are cut by data/partition.py so that splits
alternate over ranks and every batch a rank receives is the one its step calls for: `batches` checks that.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataIterator

from models.errors import DinorayError
from pipeline.augment.augmenter import Augmenter, crop_threads
from pipeline.augment.config import CropsConfig, crop_bytes
from pipeline.augment.multicrop import limit_threads, prepare_kernel
from pipeline.cluster.channel import Board
from pipeline.cluster.pool_control import DrainPolicy, PoolControl, not_resized
from pipeline.cluster.pool_size import PoolSize
from pipeline.data.order import Order
from pipeline.data.partition import Layout
from pipeline.data.source import Source
from pipeline.ray_private import data as private

_LEG_BLOCKS = 4096
"""Blocks per execution of the plan: Ray plans every block up front, at some 1.3 ms each."""


@dataclass(frozen=True)
class StreamPlan:
    """All that defines the stream but the steps it covers; sent to each augment actor."""

    source: "ray.ObjectRef[Source]"
    board: Board
    order: Order
    crops: CropsConfig
    seed: int
    augment_actors: tuple[int, int]
    """Least and most; in between, cluster/pool_size.py decides."""
    cpus_per_augment_actor: float
    cool_down_seconds: float


def open_augmenter(plan: StreamPlan) -> Augmenter:
    """What an actor's process needs to crop, ready for its first image. Sets up the whole process."""
    limit_threads()
    prepare_kernel(plan.crops)
    threads = crop_threads(plan.cpus_per_augment_actor)
    source: Source = ray.get(plan.source)
    return Augmenter(source, plan.order, plan.crops, seed=plan.seed, num_threads=threads)


class MultiCropActor:
    """Block numbers in, crops out. A function of (seed, epoch, key): retries and other actors give the same bytes.

    Ray calls it twice at once: while one block is cropped, the next one's images are fetched.
    """

    def __init__(self, plan: StreamPlan, layout: Layout) -> None:
        self._board, self._layout = plan.board, layout
        self._augmenter = open_augmenter(plan)

    def __call__(self, blocks: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        positions = np.concatenate([self._layout.block(int(i)) for i in blocks["id"]])
        try:
            return self._augmenter.block(positions)
        except DinorayError as error:
            # Told here, where it is known: Ray passes on the text of an actor's error, not the error.
            self._board.post_fatal(error)
            raise


def open_splits(
    plan: StreamPlan, layout: Layout, *, locality_hints: list[str] | None = None
) -> list[DataIterator]:
    """Start the plan for `layout` and return one iterator per rank, picklable. Call on one rank."""
    # A pool that was opened before goes on with what it had come to know.
    low, high = plan.augment_actors
    size = plan.board.pool_size() or PoolSize(low, high, target=low, cool_down_seconds=plan.cool_down_seconds)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # splits alternate over ranks only in this order
    context.enable_progress_bars = False
    # A block of the plan must stay one block: twice its bytes never reaches the limit at which Ray cuts.
    rows = layout.steps_per_block * layout.batch_size_per_worker
    context.target_max_block_size = max(128 << 20, 2 * rows * crop_bytes(plan.crops))
    if private.MISSING is None:
        private.add_control(context, partial(PoolControl, plan.board, size), DrainPolicy)
        actors = (size.target, size.target)
    else:
        plan.board.post("note", text=not_resized(private.MISSING))
        actors = plan.augment_actors
    # Not range(): it would run a task per block just to make a number, at a fifth of what Ray takes for a block.
    numbers = [{"id": i} for i in range(layout.num_blocks)]
    with ray.data.DataContext.current(context):
        blocks = ray.data.from_items(numbers, override_num_blocks=len(numbers))
        crops = blocks.map_batches(
            MultiCropActor,
            batch_size=1,
            fn_constructor_args=(plan, layout),
            compute=ActorPoolStrategy(
                min_size=actors[0],
                max_size=actors[1],
                enable_true_multi_threading=True,
                max_concurrent_calls_per_actor=2,
            ),
            num_cpus=plan.cpus_per_augment_actor,
            # Else Ray asks for the bytes of a block too, and starts no node of a type that states no memory.
            memory=0,
        )
        return crops.streaming_split(layout.world_size, equal=True, locality_hints=locality_hints)


def legs(layout: Layout) -> Iterator[Layout]:
    """`layout` cut into consecutive executions of a bounded number of blocks."""
    steps = max(1, _LEG_BLOCKS // layout.world_size) * layout.steps_per_block
    for first in range(layout.first_step, layout.last_step, steps):
        yield replace(layout, first_step=first, last_step=min(first + steps, layout.last_step))


def batches(
    split: DataIterator, layout: Layout, *, rank: int, prefetch_batches: int
) -> Iterator[dict[str, Any]]:
    """One batch of columns per step for `rank`, as read-only numpy views of the object store; see `in_step`."""
    received = split.iter_batches(
        batch_size=layout.batch_size_per_worker,
        batch_format="numpy",
        drop_last=True,
        prefetch_batches=prefetch_batches,
    )
    return in_step(received, layout, rank=rank)


def in_step(received: Iterable[dict[str, Any]], layout: Layout, *, rank: int) -> Iterator[dict[str, Any]]:
    """The batches that `rank` received, each checked.

    Raises DinorayError when a batch is not the one that its step calls for: an image lost or repeated on the
    way would otherwise pass unseen.
    """
    step = layout.first_step
    for batch in received:
        if not np.array_equal(batch["position"], layout.positions(step, rank)):
            raise DinorayError(
                f"step={step} rank={rank} received positions {batch['position'][:3]}..., "
                f"not {layout.positions(step, rank)[:3]}...: the stream is out of order"
            )
        yield batch
        step += 1
    if step != layout.last_step:
        raise DinorayError(f"the stream ended at step={step}, before step={layout.last_step}")
