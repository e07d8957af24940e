"""How much of a data set is read for the images of a run: requests, and bytes beside those of the images.

An object is read for its image alone. Of Parquet whole row groups are read: of a packed set by the block that needs
its rows, of others' by readers that all actors share (sharing.py). Counted from the run's own order, layout and
caches; nothing is read. No Ray here.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import Layout, lay_out
from dinoray.pipeline.data.reading.sharing import Sharing, WindowCache, groups_ahead, share_reading

_MOST_BLOCKS = 256
_SHARE_LATE = 0.01
"""Share of blocks of actors that were held up."""


class Reads(NamedTuple):
    """Mean over the first blocks of a run."""

    images_per_request: float
    bytes_per_image: float
    """Bytes read per image."""
    times_read: float
    """Bytes read per byte of the images."""


def count_reads(
    manifest: Manifest,
    order: Order,
    *,
    train_workers: int,
    global_batch_size: int,
    image_bytes: int,
    most_actors: int,
    cpus_per_actor: float = 1,
    num_streams: int = 1,
) -> Reads:
    """Return what the first epoch reads, or its first windows, if the blocks are those of `lay_out`.

    They are the same in any number of streams.
    """
    if manifest.sources:
        return _reads_of_mixture(manifest)
    sizes, group_bytes = manifest.group_sizes, manifest.group_bytes
    if sizes is None or group_bytes is None:
        return Reads(1.0, float(manifest.object_sizes.mean()), 1.0)

    def first_steps(number: int) -> Layout:
        return lay_out(
            range(max(1, number)),
            world_size=train_workers,
            global_batch_size=global_batch_size,
            image_bytes=image_bytes,
        )

    rows_per_block = first_steps(1).rows_per_block
    layout = first_steps(_whole_windows(order, _MOST_BLOCKS * rows_per_block) // global_batch_size)
    sharing = share_reading(
        manifest,
        order,
        most_actors=most_actors,
        cpus_per_actor=cpus_per_actor,
        rows_per_block=rows_per_block,
        num_streams=num_streams,
    )
    if sharing is None:
        read = read_by_blocks(order, layout, sizes)
    else:
        blocks = map(layout.block, _jittered(layout.num_blocks, 2 * most_actors).tolist())
        read = read_by_readers(order, blocks, layout.stop, sizes, group_bytes, sharing)
    images = np.concatenate([order.locate(layout.block(n))[1] for n in range(layout.num_blocks)])
    used = (group_bytes / np.maximum(1, sizes))[_groups_of(np.cumsum(sizes), images)].sum()
    num_bytes = int(group_bytes[read].sum())
    return Reads(len(images) / len(read), num_bytes / len(images), num_bytes / max(1.0, float(used)))


def _reads_of_mixture(manifest: Manifest) -> Reads:
    """Return what an image costs on average, if readers read each row group once in each pass."""
    requests, num_bytes = 0.0, 0.0
    for one, weight in zip(manifest.sources, manifest.weights, strict=True):
        share, group_bytes = weight / sum(manifest.weights), one.group_bytes
        of_source = one.object_sizes if group_bytes is None else group_bytes
        requests += share * len(of_source) / one.num_images
        num_bytes += share * float(of_source.sum()) / one.num_images
    return Reads(1 / requests, num_bytes, 1.0)


def read_by_blocks(order: Order, layout: Layout, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row groups that are read if each block reads those of its rows: one entry per read."""
    ends = np.cumsum(sizes)
    blocks = (order.locate(layout.block(number))[1] for number in range(layout.num_blocks))
    return np.concatenate([np.unique(_groups_of(ends, images)) for images in blocks])


def read_by_readers(
    order: Order,
    blocks: Iterable[NDArray[np.int64]],
    stop: int,
    sizes: NDArray[np.int64],
    group_bytes: NDArray[np.int64],
    sharing: Sharing,
) -> NDArray[np.int64]:
    """Return the row groups that shared readers read, one entry per read.

    `blocks` are the positions of each block, in the order in which they ask; all end at `stop`.
    """
    caches: list[WindowCache[_Size]] = [
        WindowCache(sharing.cache_bytes, sizes) for _ in range(sharing.num_readers)
    ]
    read: list[int] = []
    ends = np.cumsum(sizes)

    def need(groups: NDArray[np.int64]) -> None:
        for group, reader in zip(groups.tolist(), sharing.reader_of(groups).tolist(), strict=True):
            if caches[reader].get(group) is None:
                read.append(group)
                caches[reader].put(group, _Size(int(group_bytes[group])))

    for positions in blocks:
        ahead = groups_ahead(order, int(positions[-1]), stop)
        if ahead is not None and caches[0].begin(ahead):
            for cache in caches[1:]:
                cache.begin(ahead)
            need(ahead.groups)
        images = order.locate(positions)[1]
        groups = _groups_of(ends, images)
        need(np.unique(groups))
        readers = sharing.reader_of(groups)
        for reader in np.unique(readers).tolist():
            caches[reader].give(images[readers == reader])
    return np.array(read, np.int64)


def _whole_windows(order: Order, limit: int) -> int:
    """Return how many positions of the first epoch to look at: to the end of a window, about `limit`."""
    if limit >= order.num_images:
        return order.num_images
    window = order.window(limit)
    return limit if window is None else window.first or window.stop


class _Size(NamedTuple):
    """Stands for a row group in a cache."""

    nbytes: int


def _jittered(num_blocks: int, at_once: int) -> NDArray[np.int64]:
    """Return all block numbers in the order in which they ask, one in a hundred much later than its neighbours.

    The blocks that are under way at once, two per actor, ask in any order.
    """
    chance = np.random.default_rng(0)
    turns = np.arange(num_blocks) // at_once + 3 * (chance.random(num_blocks) < _SHARE_LATE)
    return np.lexsort([chance.random(num_blocks), turns])


def _groups_of(ends: NDArray[np.int64], images: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(ends, images, side="right")
