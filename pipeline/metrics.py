"""Metrics sinks of a run: JSON lines, TensorBoard, and the throughput meter.

Written by rank 0 only. For a local run directory the files are appended to in place; for S3, which cannot
append, they are staged in a temporary folder and uploaded by `sync`. A resumed run first drops the lines that
lie after its checkpoint, because it is about to repeat those steps.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from models.settings import Settings
from pipeline.augment import STAGES
from pipeline.pool_size import Reading
from pipeline.storage import Directory, MissingObject, is_s3


class LogConfig(Settings):
    """How often metrics are written."""

    every_steps: int = Field(default=10, ge=1)
    """Steps between logged steps; metrics are those of the step, rates are means since the last one."""


class JsonLines:
    """A file of one JSON object per line that can be appended to, wherever it is kept."""

    def __init__(
        self, run: Directory, name: str, *, keep: Callable[[dict[str, Any]], bool], staging: Path
    ) -> None:
        self._run, self._name, self._path = run, name, staging / name
        try:
            old = run.read(name).decode()
        except MissingObject:
            old = ""
        # What follows the last line end was cut off by a kill, unless only the line end was.
        whole, _, last = old.rpartition("\n")
        kept = [line for line in [*whole.split("\n"), *_if_whole(last)] if line and keep(json.loads(line))]
        self._path.write_text("".join(f"{line}\n" for line in kept))
        self._dirty = bool(old)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one object as a line. Non-finite numbers become strings, since JSON has none."""
        with self._path.open("a") as file:
            file.write(json.dumps({k: _json_number(v) for k, v in record.items()}) + "\n")
        self._dirty = True

    def sync(self) -> None:
        """Upload if anything changed; nothing to do for a local run directory."""
        if self._dirty and is_s3(self._run.uri):
            self._run.write(self._name, self._path.read_bytes())
        self._dirty = False


def _if_whole(line: str) -> list[str]:
    try:
        return [line] if isinstance(json.loads(line), dict) else []
    except ValueError:
        return []


class MetricsLog:
    """metrics.jsonl, quarantine.jsonl and tensorboard/ of a run that continues at `first_step`."""

    def __init__(self, run: Directory, *, first_step: int, first_position: int) -> None:
        self._run = run
        self._temporary = tempfile.TemporaryDirectory(prefix="dinoray-log-") if is_s3(run.uri) else None
        self._staging = Path(self._temporary.name if self._temporary else run.uri)
        self._staging.mkdir(parents=True, exist_ok=True)
        self._metrics = JsonLines(
            run, "metrics.jsonl", keep=lambda r: 0 < first_step >= r["step"], staging=self._staging
        )
        self._quarantine = JsonLines(
            run, "quarantine.jsonl", keep=lambda r: r["position"] < first_position, staging=self._staging
        )
        self._events = SummaryWriter(
            str(self._staging / "tensorboard"), purge_step=first_step + 1 if first_step else 0
        )

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write `values` as of `step` steps done; TensorBoard gets the numbers among them."""
        self._metrics.append({"step": step, **values})
        for name, value in values.items():
            if not isinstance(value, str):
                self._events.add_scalar(name, value, step)

    def quarantine(self, records: list[dict[str, Any]]) -> None:
        """Name images that could not be used."""
        for record in records:
            self._quarantine.append(record)

    def sync(self) -> None:
        """Make everything written so far safe in the run directory."""
        self._events.flush()
        self._metrics.sync()
        self._quarantine.sync()
        if is_s3(self._run.uri):
            for path in (self._staging / "tensorboard").iterdir():
                self._run.write(f"tensorboard/{path.name}", path.read_bytes())

    def close(self) -> None:
        """Sync and let go."""
        self.sync()
        self._events.close()
        if self._temporary:
            self._temporary.cleanup()


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
        seconds = max(time.perf_counter() - self._since, 1e-9)
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


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
