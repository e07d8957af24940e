"""Processes that make batches of real crops in shared memory, as augment actors do in an object store. No Ray.

They are forked, so they must be started before anything uses a GPU. A batch is made by one process; the batches come
in the order in which they are done.
"""

import contextlib
import math
import mmap
import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoray.models.errors import ResourceError
from dinoray.pipeline.augment.config import CropsConfig, crop_bytes, crop_shapes
from dinoray.pipeline.augment.multicrop import Crops, apply, limit_threads, prepare_kernel
from dinoray.pipeline.augment.params import sample_image
from dinoray.pipeline.data.decoding.jpeg import open_image

_SLOTS = 2
"""Batches in memory for each process: one is read while it makes the next one."""
_PATIENCE_SECONDS = 120.0


class CropProcesses:
    """Makes batches of `batch_size` images out of JPEG files, over and over, on `number` processes."""

    def __init__(self, files: Sequence[bytes], crops: CropsConfig, *, batch_size: int, number: int) -> None:
        self._files, self._crops, self._batch_size = files, crops, batch_size
        prepare_kernel(crops)  # once, before the fork
        fork = multiprocessing.get_context("fork")
        self._todo, self._done = fork.Queue(), fork.Queue()
        self._slots = [self._memory() for _ in range(_SLOTS * number)]
        self._next = 0
        for slot in range(len(self._slots)):
            self._order(slot)
        self._processes = [fork.Process(target=self._work, daemon=True) for _ in range(number)]
        for process in self._processes:
            process.start()

    def _memory(self) -> Crops:
        memory = np.frombuffer(mmap.mmap(-1, self._batch_size * crop_bytes(self._crops)), np.uint8)
        of_global, of_local = crop_shapes(self._crops)
        split = self._batch_size * math.prod(of_global)
        return Crops(
            memory[:split].reshape(self._batch_size, *of_global),
            memory[split:].reshape(self._batch_size, *of_local),
        )

    def _order(self, slot: int) -> None:
        self._todo.put((slot, self._next))
        self._next += self._batch_size

    def _work(self) -> None:
        limit_threads()
        with contextlib.suppress(KeyboardInterrupt):
            while (task := self._todo.get()) is not None:
                slot, first = task
                try:
                    self._make(self._slots[slot], first)
                    self._done.put((slot, first))
                except Exception as error:
                    self._done.put(f"a crop process failed: {error}")

    def _make(self, out: Crops, first: int) -> None:
        for row in range(self._batch_size):
            epoch, number = divmod(first + row, len(self._files))
            image = open_image(self._files[number])
            params = sample_image(0, epoch, str(number), image.width, image.height, self._crops)
            apply(image, params, out=Crops(out.global_crops[row], out.local_crops[row]))

    def batches(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield batches without end, as read-only views; the memory of one is used again once the next is asked for."""
        while True:
            try:
                found = self._done.get(timeout=_PATIENCE_SECONDS)
            except Exception:  # queue.Empty
                found = f"no crops for {_PATIENCE_SECONDS:g} s"
            if isinstance(found, str):
                raise ResourceError(f"{found}; check the images, or take fewer --processes")
            slot, first = found
            batch = dict(
                zip(("global_crops", "local_crops"), map(_read_only, self._slots[slot]), strict=True)
            )
            try:
                yield {**batch, "position": np.arange(first, first + self._batch_size)}
            finally:
                self._order(slot)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        for queue in (self._todo, self._done):
            queue.cancel_join_thread()
            queue.close()


def _read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = array.view()
    view.flags.writeable = False
    return view
