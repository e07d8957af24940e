"""The work of one augment actor: positions in, columns of crops out. No Ray here.

This module stands between the source and the blocks that Ray Data carries (stream/ray_data.py). It fetches
images ahead and crops them on threads. The kernels release the interpreter's lock, so one actor with n CPUs
crops on n threads while other threads fetch. Each cropping thread has its own scratch memory. All threads
write a block in place. A node therefore needs few actors.
"""

import json
import math
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinoray.models.errors import DataError
from dinoray.pipeline.augment.config import NUM_PHOTOMETRIC, CropsConfig, crop_shapes
from dinoray.pipeline.augment.multicrop import Crops, cut, decode_for
from dinoray.pipeline.augment.params import Photometric, photometric_columns, sample_image
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decoder_process import thread_seconds
from dinoray.pipeline.data.decoding.jpeg import open_image
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.source import DataConfig, Fetched, Status

_MAX_SUBSTITUTES = 16

STAGES = ("fetch", "decode", "crop")
"""Stages timed in the column `cpu_ms`: CPU milliseconds per image, of the thread that did the work."""


def crop_threads(cpus: float) -> int:
    """Return the number of cropping threads of an actor: one per whole CPU, at least one."""
    return max(1, int(cpus))


class CropThreadPool:
    """Threads of an actor that decode and crop."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "crop")

    def for_each(self, work: Any, items: Iterator[Any]) -> None:
        """Call `work` with each item as it arrives, on all threads; stop at the first error and raise it."""
        turn, failed = threading.Lock(), threading.Event()

        def loop() -> None:
            while not failed.is_set():
                with turn:
                    item = next(items, None)
                if item is None:
                    return
                try:
                    work(*item)
                except BaseException:
                    failed.set()
                    raise

        for done in [self._pool.submit(loop) for _ in range(self.num_threads)]:
            done.result()


class BusyTimer:
    """Measures the seconds in which an actor had a call in progress; the rest is its spare capacity."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls, self._since, self._seconds = 0, 0.0, 0.0

    def begin(self) -> None:
        """Record that a call has started."""
        self._count(+1)

    def end(self) -> float:
        """Record that a call has ended; return the busy seconds since the previous call ended."""
        self._count(-1)
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self, calls: int) -> None:
        with self._lock:
            now = time.perf_counter()
            self._seconds += (now - self._since) * bool(self._calls)
            self._calls, self._since = self._calls + calls, now


class BufferPool:
    """Reuses the memory of released blocks, because fresh memory costs one page fault per page.

    An array is handed out again once nothing else refers to it. A view of the array is such a reference, and
    so is an Arrow block made from it without a copy. Several threads may call `take` at once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return an array with arbitrary content. The pool keeps as many arrays as were in use at once."""
        new = np.empty(0, np.uint8)
        with self._lock:
            # `new` has two references: this function and the list. A free array also has two: its pool and
            # the list.
            counts = [sys.getrefcount(array) for array in [*self._arrays, new]]
            free = [array for array, count in zip(self._arrays, counts, strict=False) if count <= counts[-1]]
            for array in free:
                if len(array) == num_bytes:
                    return array
            # All blocks but the last have one size, so free arrays of another size are of no more use.
            self._arrays = [array for array in self._arrays if not any(array is other for other in free)]
            self._arrays.append(np.empty(num_bytes, np.uint8))
            return self._arrays[-1]


class Images(Protocol):
    """What an Augmenter fetches: a Source, or the same images from elsewhere."""

    @property
    def config(self) -> DataConfig:
        """The settings of the images."""
        ...

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """As `Source.fetch`."""
        ...

    def arrivals(self, indices: Sequence[int]) -> Iterator[tuple[int, Fetched]]:
        """As `Source.arrivals`."""
        ...

    def take_cpu_seconds(self) -> float:
        """As `Source.take_cpu_seconds`."""
        ...


class Augmenter:
    """Crops the images at given positions of the stream. Output is a function of (seed, epoch, key)."""

    def __init__(
        self, source: Images, order: Order, crops: CropsConfig, *, seed: int, num_threads: int
    ) -> None:
        self._source, self._order, self._crops, self._seed = source, order, crops, seed
        self._croppers, self._memory, self._busy = CropThreadPool(num_threads), BufferPool(), BusyTimer()

    def block(self, positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the columns of crops for `positions` [n].

        The crops are `global_crops` uint8 [n, G, H, W, 3] and `local_crops` uint8 [n, L, h, w, 3]. Beside
        them are `position` int64, `status` int8, `note`, `cpu_ms` float32 [n, 3] (see STAGES) and `busy_ms`
        float32 (see BusyTimer). `note` is JSON of key, reason and bytes read where status is not OK, else
        empty. The means of `cpu_ms` and `busy_ms` hold for the block. With `crops.photometric=device` the crops
        are only cut and flipped. `global_photometric` float32 [n, G, 11] and `local_photometric` [n, L, 11] have
        what is still to be done to them; `kernels/torch_colour.adjust` does it.

        A bad image is replaced by the next readable image in the epoch's order, and its row records that.
        Raises DataError if none of the next 16 images is readable either. Several calls may run at once.
        """
        self._busy.begin()
        try:
            columns = self._block(positions)
        finally:
            busy_seconds = self._busy.end()
        columns["busy_ms"] = np.full(len(positions), 1000 * busy_seconds / max(1, len(positions)), np.float32)
        return columns

    def _block(self, positions: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        c, n = self._crops, len(positions)
        epochs, images = self._order.locate(positions)
        global_shape, local_shape = crop_shapes(c)
        split = n * math.prod(global_shape)
        memory = self._memory.take(split + n * math.prod(local_shape))
        crops = Crops(memory[:split].reshape(n, *global_shape), memory[split:].reshape(n, *local_shape))
        columns: dict[str, NDArray[Any]] = {
            "global_crops": crops.global_crops,
            "local_crops": crops.local_crops,
            "position": positions,
            "status": np.zeros(n, np.int8),
            "note": np.full(n, "", dtype=object),
            "cpu_ms": np.zeros((n, len(STAGES)), np.float32),
        }
        changes = np.zeros((n, c.num_global_crops + c.num_local_crops, NUM_PHOTOMETRIC), np.float32)
        left_to_device = changes if c.photometric == "device" else [None] * n

        def crop(row: int, fetched: Fetched) -> None:
            out = Crops(crops.global_crops[row], crops.local_crops[row])
            cpu_ms, epoch = columns["cpu_ms"][row], int(epochs[row])
            later = left_to_device[row]
            reason = self._crop(fetched, fetched.key, epoch, out, later, cpu_ms)
            if reason is None:
                return
            for attempt in range(1, _MAX_SUBSTITUTES + 1):
                other = self._source.fetch([self._order.substitute(int(positions[row]), attempt)])[0]
                # The key of the requested image seeds the crops, so a substitute never repeats its own crops.
                if self._crop(other, fetched.key, epoch, out, later, cpu_ms) is None:
                    break
            else:
                raise DataError(
                    f"{self._source.config.path}: {fetched.key} and the {_MAX_SUBSTITUTES} images after it are "
                    f"unreadable ({reason}); check {self._source.config.setting}"
                )
            columns["status"][row] = fetched.status if fetched.data is None else Status.CORRUPT
            size = None if fetched.data is None else len(fetched.data)
            columns["note"][row] = json.dumps({"key": fetched.key, "reason": reason, "bytes": size})

        self._croppers.for_each(crop, self._source.arrivals(images.tolist()))
        columns["cpu_ms"][:, 0] = 1000 * self._source.take_cpu_seconds() / max(1, n)
        if c.photometric == "device":
            columns |= photometric_columns(changes, c)
        return columns

    def _crop(
        self,
        image: Fetched,
        key: str,
        epoch: int,
        out: Crops,
        later: Photometric | None,
        cpu_ms: NDArray[np.float32],
    ) -> str | None:
        """Crop an image into `out` with the random numbers of `key`; return the reason if it fails.

        `later` receives the changes of pixel values that are left to the device.
        """
        if image.data is None:
            return image.reason
        begin = thread_seconds()
        try:
            config = self._source.config
            encoded = open_image(image.data, max_pixels=config.max_pixels, config=config)
            params = sample_image(self._seed, epoch, key, encoded.width, encoded.height, self._crops)
            picture = decode_for(params, encoded)
        except BadImage as error:
            return error.reason
        decoded = thread_seconds()
        if later is not None:
            params, later[:] = params.split_photometric()
        cut(picture, params, out)
        cpu_ms[1:] += (1000 * (decoded - begin), 1000 * (thread_seconds() - decoded))
        return None
