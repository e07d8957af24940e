"""How much of a data set is read for the images of a block: requests, and bytes beside those of the images.

An object is read for its image alone. Of Parquet whole row groups are read, by each block that needs a row of them.
Counted from the run's own order and layout; nothing is read. No Ray here.
"""

from typing import NamedTuple

import numpy as np

from dinoray.pipeline.data.manifest import Manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import lay_out

_MOST_BLOCKS = 64


class Reads(NamedTuple):
    """Mean of some blocks of a run's first epoch, if no actor still has what it read for an earlier block."""

    images_per_request: float
    bytes_per_image: float
    """Bytes read per image."""
    times_read: float
    """Bytes read per byte of the images."""


def count_reads(
    manifest: Manifest, order: Order, *, train_workers: int, global_batch_size: int, image_bytes: int
) -> Reads:
    """Return what the blocks of an epoch read, by some of them that are spaced evenly.

    The blocks are those of `lay_out` with these arguments.
    """
    sizes, group_bytes = manifest.group_sizes, manifest.group_bytes
    if sizes is None or group_bytes is None:
        return Reads(1.0, float(manifest.table["size"].to_numpy().mean()), 1.0)
    steps = range(max(1, manifest.num_images // global_batch_size))
    layout = lay_out(
        steps, world_size=train_workers, global_batch_size=global_batch_size, image_bytes=image_bytes
    )
    ends = np.cumsum(sizes)
    num_images, num_requests, read, used = 0, 0, 0, 0.0
    for number in np.unique(np.linspace(0, layout.num_blocks - 1, _MOST_BLOCKS).astype(int)).tolist():
        _, images = order.locate(layout.block(number))
        groups, rows = np.unique(np.searchsorted(ends, images, side="right"), return_counts=True)
        num_images, num_requests = num_images + len(images), num_requests + len(groups)
        read += int(group_bytes[groups].sum())
        used += float((group_bytes[groups] / sizes[groups] * rows).sum())
    return Reads(num_images / num_requests, read / num_images, read / max(1.0, used))
