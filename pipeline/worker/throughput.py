"""Rates of a train worker: throughput in images per second, data wait, and CPU time per image."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.augment.augmenter import STAGES
from dinoray.pipeline.cluster.pool_size import TrainerReading

_PACE_SECONDS = 2.0
_WORK_SECONDS = 30.0


class ThroughputMeter:
    """Measures throughput, data wait (share of time) and CPU time per image since the last reading."""

    def __init__(self) -> None:
        self.reading = TrainerReading()
        self.restart()

    def restart(self) -> None:
        """Reset the meter after a pause without training, such as an evaluation."""
        self._since = time.perf_counter()
        self._images = 0
        self._wait_seconds = 0.0
        self._cpu_ms: NDArray[np.float64] = np.zeros(len(STAGES))
        self._busy_ms = 0.0
        self._cropped = 0

    @property
    def seconds(self) -> float:
        """Time since the last reading."""
        return time.perf_counter() - self._since

    def add(
        self,
        num_images: int,
        wait_seconds: float,
        cpu_ms: NDArray[np.float32],
        busy_ms: NDArray[np.float32],
    ) -> None:
        """Add one step of `num_images` images over all workers, which waited `wait_seconds` for its batch.

        `cpu_ms` [n, 3]: CPU time of this worker's n images on the augment actors, per stage in STAGES.
        `busy_ms` [n]: time that each image kept an actor busy.
        """
        self._images += num_images
        self._wait_seconds += wait_seconds
        self._cpu_ms += cpu_ms.sum(axis=0)
        self._busy_ms += float(busy_ms.sum())
        self._cropped += len(cpu_ms)

    def read(self) -> dict[str, float]:
        """Return `images_per_second`, `data_wait` (share of wall time, 0 to 1) and `fetch_cpu_ms` and so on.

        The CPU times are per image. `reading` keeps the totals behind the first two.
        """
        seconds = max(self.seconds, 1e-9)
        busy_seconds = self._busy_ms / max(1, self._cropped) / 1000 * self._images
        self.reading = TrainerReading(seconds, min(seconds, self._wait_seconds), self._images, busy_seconds)
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


class PoolThroughput(ThroughputMeter):
    """A meter that passes its reading to `tell` every few seconds, independent of the logged steps."""

    def __init__(self, tell: Callable[[TrainerReading], None]) -> None:
        super().__init__()
        self._tell = tell

    def add(self, *step: Any) -> None:
        """Add one step (see ThroughputMeter) and pass on the reading if it is due."""
        super().add(*step)
        if self.seconds >= _PACE_SECONDS:
            self.read()
            self._tell(self.reading)


class WorkMeter:
    """Passes the CPU time per image of this rank's stream, in milliseconds, to `tell` every half a minute."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._restart()

    def _restart(self) -> None:
        self._since, self._cpu_ms, self._images = time.perf_counter(), 0.0, 0

    def add(self, cpu_ms: NDArray[np.float32]) -> None:
        """Add the images of a batch. `cpu_ms` [n, 3] is as in ThroughputMeter."""
        self._cpu_ms += float(cpu_ms.sum())
        self._images += len(cpu_ms)
        if time.perf_counter() - self._since >= _WORK_SECONDS:
            self._tell(self._cpu_ms / self._images)
            self._restart()
