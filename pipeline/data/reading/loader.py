"""Load images of a source as pixels, in batches; the next batch loads while the current one is used.

Stands between source.py (bytes by index) and a frozen backbone: fetches, decodes and prepares on threads. An
unusable image is a row with a reason, never an exception. No Ray here.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.reading.source import Fetched, Source, Status

Prepare = Callable[[NDArray[np.uint8], str], NDArray[np.uint8]]
"""(uint8 [H, W, 3], key) -> the network's input image, uint8."""


class Loaded(NamedTuple):
    """One image: prepared `pixels`, or None with `status` and `reason`."""

    key: str
    label: str | None
    pixels: NDArray[np.uint8] | None
    status: Status
    reason: str


def load_batches(
    source: Source, indices: Sequence[int], prepare: Prepare, *, batch_size: int
) -> Iterator[list[Loaded]]:
    """Yield the images at `indices`, in that order, `batch_size` at a time; the next batch loads meanwhile.

    Raises DataError with the object's name if storage denies access.
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
                image = decode(fetched.data, max_pixels=source.config.max_pixels, config=source.config)
            except BadImage as error:
                return Loaded(fetched.key, fetched.label, None, Status.CORRUPT, error.reason)
            return Loaded(fetched.key, fetched.label, prepare(image, fetched.key), Status.OK, "")

        coming = [ahead.submit(load, start) for start in starts[:1]]
        for following in range(1, len(starts) + 1):
            batch = coming.pop().result()
            if following < len(starts):
                coming.append(ahead.submit(load, starts[following]))
            yield batch
