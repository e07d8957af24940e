"""Images of a source as pixels, in batches, each made while the one before it is used. No Ray here.

Stands between source.py (bytes by index) and a frozen backbone: fetch, decode, prepare, on threads. An image
that cannot be used is a row with a reason, never an exception.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.decode import BadImage, decode
from pipeline.data.source import Fetched, Source, Status

Prepare = Callable[[NDArray[np.uint8], str], NDArray[np.uint8]]
"""(uint8 [H, W, 3], key) -> what the network is to see of it."""


class Loaded(NamedTuple):
    """One image: `pixels` as prepared, or None and the `status` and `reason` why not."""

    key: str
    label: str | None
    pixels: NDArray[np.uint8] | None
    status: Status
    reason: str


def load_batches(
    source: Source, indices: Sequence[int], prepare: Prepare, *, batch_size: int
) -> Iterator[list[Loaded]]:
    """The images at `indices`, in that order, `batch_size` at a time; the next batch is under way meanwhile.

    DataError, naming the object, when storage refuses us.
    """
    starts = range(0, len(indices), batch_size)
    with ThreadPoolExecutor(os.cpu_count()) as decoders, ThreadPoolExecutor(1) as ahead:

        def load(start: int) -> list[Loaded]:
            fetched = source.fetch(indices[start : start + batch_size])
            return list(decoders.map(one, fetched))

        def one(fetched: Fetched) -> Loaded:
            if fetched.data is None:
                return Loaded(fetched.key, fetched.label, None, fetched.status, fetched.reason)
            try:
                image = decode(fetched.data, max_pixels=source.config.max_pixels)
            except BadImage as error:
                return Loaded(fetched.key, fetched.label, None, Status.CORRUPT, error.reason)
            return Loaded(fetched.key, fetched.label, prepare(image, fetched.key), Status.OK, "")

        coming = [ahead.submit(load, start) for start in starts[:1]]
        for following in range(1, len(starts) + 1):
            batch = coming.pop().result()
            if following < len(starts):
                coming.append(ahead.submit(load, starts[following]))
            yield batch
