"""The rates of a train worker: images per second, the wait for data, and what an image costs the CPUs."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.augmenter import STAGES
from pipeline.cluster.pool_size import Reading

_PACE_SECONDS = 2.0


class Meter:
    """Images per second, the share of time spent waiting for data, and what an image costs the CPUs, since the last
    reading."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.restart()

    def restart(self) -> None:
        """Start over: after a pause that is not training, such as an evaluation."""
        self._since = time.perf_counter()
        self._images = 0
        self._wait_seconds = 0.0
        self._cpu_ms: NDArray[np.float64] = np.zeros(len(STAGES))
        self._busy_ms = 0.0
        self._cropped = 0

    @property
    def seconds(self) -> float:
        """Since the last reading."""
        return time.perf_counter() - self._since

    def add(
        self,
        num_images: int,
        wait_seconds: float,
        cpu_ms: NDArray[np.float32],
        busy_ms: NDArray[np.float32],
    ) -> None:
        """One step of `num_images` images over all workers, which waited `wait_seconds` for its batch.

        `cpu_ms` [n, 3] is what this worker's part of it took in each of STAGES on the augment actors, `busy_ms` [n]
        how long it kept one busy.
        """
        self._images += num_images
        self._wait_seconds += wait_seconds
        self._cpu_ms += cpu_ms.sum(axis=0)
        self._busy_ms += float(busy_ms.sum())
        self._cropped += len(cpu_ms)

    def read(self) -> dict[str, float]:
        """`images_per_second`, `data_wait` (share of wall time, 0 to 1), `fetch_cpu_ms` and so on (per image).

        What the first two are made of stays in `reading`.
        """
        seconds = max(self.seconds, 1e-9)
        busy_seconds = self._busy_ms / max(1, self._cropped) / 1000 * self._images
        self.reading = Reading(seconds, min(seconds, self._wait_seconds), self._images, busy_seconds)
        rates = {
            "images_per_second": self.reading.images_per_second,
            "data_wait": self.reading.data_wait,
        }
        if self._cropped:
            rates |= {
                f"{stage}_cpu_ms": float(ms / self._cropped)
                for stage, ms in zip(STAGES, self._cpu_ms, strict=True)
            }
        self.restart()
        return rates


class Pace(Meter):
    """A meter that tells what it read, every few seconds, however seldom steps are logged."""

    def __init__(self, tell: Callable[[Reading], None]) -> None:
        super().__init__()
        self._tell = tell

    def add(self, *step: Any) -> None:
        """See Meter."""
        super().add(*step)
        if self.seconds >= _PACE_SECONDS:
            self.read()
            self._tell(self.reading)
