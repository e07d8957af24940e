"""The Ray Data plan: block numbers -> CPU actor pool (fetch, decode, crop) -> one split per train worker.

One fused actor fetches, decodes and crops. Only blocks of uint8 crops are transferred, never full-size
images. data/partition.py cuts the blocks so that splits alternate over ranks and each rank receives the batch
of its step. `batches` checks this.

The coordinator of an execution is one Python process, which limits the images per second of an execution. A run may
therefore have several streams: executions with coordinators and pools of their own, each for some of the ranks. Ray
Data's own coordinator of resources divides the object store of each node equally among executions, and CPUs are
requested for each pool by itself (cluster/pool_control.py), so no stream takes what another one needs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataIterator

from dinoray.models.errors import DinorayError
from dinoray.pipeline.augment.augmenter import Augmenter, crop_threads
from dinoray.pipeline.augment.config import CropsConfig, crop_bytes
from dinoray.pipeline.augment.multicrop import limit_threads, prepare_kernel
from dinoray.pipeline.cluster.channel import RunChannel
from dinoray.pipeline.cluster.pool_control import DrainPolicy, PoolControl, PoolFollower, not_resized
from dinoray.pipeline.cluster.pool_mailbox import PoolMailbox, PoolPlan
from dinoray.pipeline.cluster.pool_size import PoolSize, share_actors
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import BLOCK_BYTES, Layout
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.ray_private import data as private
from dinoray.pipeline.storage.waiting import report_outages
from dinoray.pipeline.stream.readers import Readers, SharedImages, note_unchecked

_LEG_BLOCKS = 4096
"""Blocks per execution of the plan: Ray plans all blocks before it starts, at about 1.3 ms per block."""

_CALLS_PER_ACTOR = 2
"""One fetches the images of the next block while the other crops its block."""
_of_strategy: dict[str, Any] = {}
_of_actors: dict[str, Any] = {}
# The strategy has an argument for the calls at once since Ray 2.59; before, it was an option of the actors.
if "max_concurrent_calls_per_actor" in signature(ActorPoolStrategy).parameters:
    _of_strategy["max_concurrent_calls_per_actor"] = _CALLS_PER_ACTOR
else:
    _of_actors["max_concurrency"] = _CALLS_PER_ACTOR


@dataclass(frozen=True)
class StreamPlan:
    """Definition of the stream, without the steps that it covers; sent to each augment actor."""

    source: "ray.ObjectRef[Source]"
    channel: RunChannel
    order: Order
    crops: CropsConfig
    seed: int
    augment_actors: tuple[int, int]
    """Least and most of all streams; cluster/pool_size.py chooses the number within this range."""
    cpus_per_augment_actor: float
    cool_down_seconds: float
    num_streams: int = 1
    """Executions of Ray Data; they share the augment actors, the readers and the ranks among them."""
    readers: Readers | None = None
    """Readers that fetch for all augment actors; None: each actor fetches its images itself."""
    block_bytes: int = BLOCK_BYTES
    """Most bytes of a block of crops, unless one step has more."""


class BlockMaker:
    """The work of an augment actor on blocks of a plan; ready for its first image once it is made.

    Also limits the whole process's threads, prepares the crop kernel and posts outages of the storage. `layout`: that
    of the stream, if the blocks are those of one of several.
    """

    def __init__(self, plan: StreamPlan, layout: Layout | None = None) -> None:
        limit_threads()
        self._channel = plan.channel
        report_outages(plan.channel.note_outage)
        prepare_kernel(plan.crops)
        threads = crop_threads(plan.cpus_per_augment_actor)
        self._shared = (
            None if plan.readers is None else SharedImages(plan.readers, plan.source, plan.order, layout)
        )
        images: Source | SharedImages = self._shared or ray.get(plan.source)
        self._augmenter = Augmenter(images, plan.order, plan.crops, seed=plan.seed, num_threads=threads)

    def block(self, positions: NDArray[np.int64], *, stop: int) -> dict[str, NDArray[Any]]:
        """Return Augmenter.block's columns for `positions`. The stream's positions end at `stop`."""
        if self._shared is not None:
            self._shared.expect(positions, stop)
        made = self._augmenter.block(positions)
        note_unchecked(self._channel)
        return made


class MultiCropActor:
    """Map block numbers to crops.

    The crops are a function of (seed, epoch, key), so retries and other actors return the same bytes. Ray
    makes two concurrent calls: one call fetches the images of the next block while the other crops its block.
    """

    def __init__(self, plan: StreamPlan, layout: Layout) -> None:
        self._channel, self._layout = plan.channel, layout
        self._blocks = BlockMaker(plan, layout)

    def __call__(self, blocks: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        positions = np.concatenate([self._layout.block(int(i)) for i in blocks["id"]])
        try:
            return self._blocks.block(positions, stop=self._layout.stop)
        except DinorayError as error:
            error.raised_by_all_ranks = True  # they stop once the stream has failed
            # Posted from here because Ray forwards only the text of an actor's error, not the error itself.
            self._channel.post_fatal(error)
            raise


def open_splits(
    plan: StreamPlan, layout: Layout, *, locality_hints: list[str] | None = None
) -> list[DataIterator]:
    """Start the streams of `layout` and return one picklable iterator per rank. Call on one rank only."""
    streams, (low, high) = layout.divided(plan.num_streams), plan.augment_actors
    # If earlier pools have sent their plan, the new ones start from it.
    pools = PoolMailbox(plan.channel).begin() or PoolPlan(
        PoolSize(low, high, target=low, cool_down_seconds=plan.cool_down_seconds),
        tuple(float(len(stream.ranks)) for stream in streams),
    )
    if private.MISSING is not None:
        plan.channel.post("note", text=not_resized(private.MISSING))
    splits: dict[int, DataIterator] = {}
    for stream in streams:
        splits |= zip(stream.ranks, _open(plan, stream, pools, locality_hints), strict=True)
    return [splits[rank] for rank in range(layout.world_size)]


def _open(
    plan: StreamPlan, layout: Layout, pools: PoolPlan, locality_hints: list[str] | None
) -> list[DataIterator]:
    """Start one stream and return an iterator for each of its ranks; `pools` is the plan for those of all streams."""
    ranks = [len(stream.ranks) for stream in layout.divided(plan.num_streams)]
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # splits alternate over ranks only in this order
    context.enable_progress_bars = False
    # Ray must not cut a block of the plan: a limit of twice the block's bytes is never reached.
    context.target_max_block_size = max(128 << 20, 2 * layout.rows_per_block * crop_bytes(plan.crops))
    least, most = (share_actors(number, pools.work)[layout.stream] for number in plan.augment_actors)
    if private.MISSING is None:
        control = PoolControl if layout.stream == 0 else PoolFollower
        private.add_control(context, partial(control, plan.channel, pools, ranks, layout.stream), DrainPolicy)
        least = most = share_actors(pools.size.target, pools.work)[layout.stream]
    # Not ray.data.range(): it runs one task per block to make a number, a fifth of Ray's overhead for a
    # block.
    numbers = [{"id": i} for i in range(layout.num_blocks)]
    with ray.data.DataContext.current(context):
        blocks = ray.data.from_items(numbers, override_num_blocks=len(numbers))
        crops = blocks.map_batches(
            MultiCropActor,
            batch_size=1,
            fn_constructor_args=(plan, layout),
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                enable_true_multi_threading=True,
                **_of_strategy,
            ),
            **_of_actors,
            num_cpus=plan.cpus_per_augment_actor,
            # Otherwise Ray also requests the bytes of a block, and never starts a node type that declares no
            # memory.
            memory=0,
        )
        return crops.streaming_split(len(layout.ranks), equal=True, locality_hints=locality_hints)


def legs(layout: Layout, num_streams: int = 1) -> Iterator[Layout]:
    """Yield `layout` cut into consecutive executions with a bounded number of blocks in each stream."""
    ranks = len(layout.divided(num_streams)[0].ranks)
    steps = max(1, _LEG_BLOCKS // ranks) * layout.steps_per_block
    for first in range(layout.first_step, layout.last_step, steps):
        yield replace(layout, first_step=first, last_step=min(first + steps, layout.last_step))


def batches(
    split: DataIterator, layout: Layout, *, rank: int, prefetch_batches: int
) -> Iterator[dict[str, Any]]:
    """Return one batch of columns per step for `rank`, as read-only numpy views of the object store.

    Each batch is checked by `in_step`.
    """
    received = split.iter_batches(
        batch_size=layout.batch_size_per_worker,
        batch_format="numpy",
        drop_last=True,
        prefetch_batches=prefetch_batches,
    )
    return in_step(received, layout, rank=rank)


def in_step(received: Iterable[dict[str, Any]], layout: Layout, *, rank: int) -> Iterator[dict[str, Any]]:
    """Check and yield the batches that `rank` received.

    Raises DinorayError if a batch does not hold the positions of its step: without this check, a lost or
    repeated image would not be noticed.
    """
    step = layout.first_step
    for batch in received:
        if not np.array_equal(batch["position"], layout.positions(step, rank)):
            raise DinorayError(
                f"step={step} rank={rank} received positions {batch['position'][:3]}..., "
                f"not {layout.positions(step, rank)[:3]}...: the stream is out of order"
            )
        yield batch
        del batch  # the store may release its block while the next one is awaited
        step += 1
    if step != layout.last_step:
        raise DinorayError(f"the stream ended at step={step}, before step={layout.last_step}")
