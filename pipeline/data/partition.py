"""Assign positions to steps, ranks and blocks: a pure function of a few integers.

Step s consumes positions [s * global_batch_size, (s + 1) * global_batch_size). After any step the images seen
are a prefix of the position stream, for any number of ranks, so the step is the whole data state. Rank r
takes the r-th slice of each step. A block holds several steps of one rank; blocks alternate over ranks in the
order in which the stream is split.

A stream may be divided into several: stream j of k serves the ranks r with r % k == j. Blocks are the same for any k,
so batches are too, and each row group of a packed set stays within the block that it is in. No images and no Ray here.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dinoray.models.errors import ConfigError

BLOCK_BYTES = 100 << 20
"""Bytes of a block, unless an object store is small. Below 60 MB, scheduling a block costs more than its bytes."""
_BLOCKS_IN_STORE = 12
"""Augment actors begin some blocks before any is read: with fewer in a store, Ray spills the first ones to disk."""
_MAX_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Layout:
    """The stream of steps [first_step, last_step) over `world_size` ranks; one of `num_streams`, for some of them."""

    first_step: int
    last_step: int
    world_size: int
    batch_size_per_worker: int
    steps_per_block: int
    stream: int = 0
    num_streams: int = 1

    @property
    def ranks(self) -> range:
        """The ranks that this stream serves."""
        return range(self.stream, self.world_size, self.num_streams)

    @property
    def num_blocks(self) -> int:
        """Blocks in the stream; a multiple of the number of its ranks."""
        return -(-(self.last_step - self.first_step) // self.steps_per_block) * len(self.ranks)

    @property
    def rows_per_block(self) -> int:
        """Images in each block but the last of a rank."""
        return self.steps_per_block * self.batch_size_per_worker

    @property
    def stop(self) -> int:
        """The position after the last one of all streams."""
        return self.last_step * self.world_size * self.batch_size_per_worker

    def block(self, index: int) -> NDArray[np.int64]:
        """Return the positions of block `index` in order of use, [steps in block * batch_size_per_worker]."""
        turn, place = divmod(index, len(self.ranks))
        rank = self.ranks[place]
        start = self.first_step + turn * self.steps_per_block
        stop = min(start + self.steps_per_block, self.last_step)
        return np.concatenate([self.positions(step, rank) for step in range(start, stop)])

    def positions(self, step: int, rank: int) -> NDArray[np.int64]:
        """Return the positions that `rank` consumes at `step`, [batch_size_per_worker]."""
        first = (step * self.world_size + rank) * self.batch_size_per_worker
        return np.arange(first, first + self.batch_size_per_worker)

    def divided(self, num_streams: int) -> "list[Layout]":
        """Return the streams into which this undivided one is divided, at most one per rank."""
        return [replace(self, stream=stream, num_streams=num_streams) for stream in range(num_streams)]


def block_bytes_for(store_bytes: int | None) -> int:
    """Return the bytes of a block where the smallest object store has `store_bytes`; None: it is not known yet."""
    return BLOCK_BYTES if store_bytes is None else min(BLOCK_BYTES, store_bytes // _BLOCKS_IN_STORE)


def lay_out(
    steps: range,
    *,
    world_size: int,
    global_batch_size: int,
    image_bytes: int,
    block_bytes: int = BLOCK_BYTES,
) -> Layout:
    """Return the layout of `steps` over the ranks of a run; `steps_per_block` chooses the block size."""
    per_worker = batch_size_per_worker(global_batch_size, world_size)
    return Layout(
        first_step=steps.start,
        last_step=steps.stop,
        world_size=world_size,
        batch_size_per_worker=per_worker,
        steps_per_block=steps_per_block(per_worker, image_bytes, block_bytes),
    )


def batch_size_per_worker(global_batch_size: int, train_workers: int) -> int:
    """Return each worker's equal share.

    Otherwise raise ConfigError with the nearest divisible batch sizes.
    """
    if global_batch_size % train_workers:
        low = global_batch_size // train_workers * train_workers
        near = " or ".join(str(n) for n in (low, low + train_workers) if n)
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} must be divisible by "
            f"resources.train_workers={train_workers}; try {near}"
        )
    return global_batch_size // train_workers


def check_streams(num_streams: int, *, train_workers: int, most_actors: int | None) -> None:
    """Raise ConfigError where a stream would have no train worker to serve, or no augment actor; None: no limit."""
    most = train_workers if most_actors is None else min(train_workers, most_actors)
    if num_streams > most:
        limit = f"resources.train_workers={train_workers}"
        if most < train_workers:
            limit = f"the {most} actors of resources.augment_actors"
        raise ConfigError(
            f"data.streams={num_streams} must be at most {limit}, because each stream has train workers and augment "
            f"actors of its own; set data.streams={most}"
        )


def check_accumulation(batch_size: int, num_parts: int) -> None:
    """Raise ConfigError unless a worker's `batch_size` images per step are `num_parts` equal microbatches."""
    if batch_size % num_parts:
        nearest = max(n for n in range(1, min(num_parts, batch_size) + 1) if batch_size % n == 0)
        raise ConfigError(
            f"train.accumulate_steps={num_parts} must divide each worker's {batch_size} images of a step; "
            f"set train.accumulate_steps={nearest}, or change train.global_batch_size"
        )


def dividing_workers(global_batch_size: int, accumulate_steps: int, least: int, most: int) -> list[int]:
    """Return the numbers of train workers from `least` to `most` among which a batch and its microbatches divide."""
    numbers = range(least, most + 1)
    return [n for n in numbers if global_batch_size % (n * accumulate_steps) == 0]


def num_microbatches(batch_size: int, accumulate_steps: int, most_images: int | None) -> int:
    """Return into how many equal microbatches a worker divides its `batch_size` images of a step.

    The least multiple of `accumulate_steps` that leaves at most `most_images` in each; None: no limit.
    """
    check_accumulation(batch_size, accumulate_steps)
    parts = range(accumulate_steps, batch_size + 1, accumulate_steps)
    limit = most_images or batch_size
    return next(n for n in parts if batch_size % n == 0 and batch_size // n <= limit)


def steps_per_block(batch_size_per_worker: int, image_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Return the number of steps per block: as many as fit in `block_bytes` and 256 images, at least one.

    Above 256 images of a small recipe, the first batch would wait seconds until its block is augmented.
    """
    rows = min(_MAX_BLOCK_ROWS, block_bytes // image_bytes)
    return max(1, rows // batch_size_per_worker)
