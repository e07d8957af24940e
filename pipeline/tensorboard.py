"""TensorBoard's event files: scalars, crops and attention as images, and the projector's embeddings.

A sink of pipeline/metrics.py. Event files are written to a folder of this machine, which for a run directory on S3 is
a staging folder whose files `sync` uploads. No Ray here.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipeline.projector import write_projector
from pipeline.sink import Embedding, Sink, numbers
from pipeline.storage import Directory, is_s3

_NAME = "tensorboard"
_FULL_BYTES = 4 << 20
"""On S3, an event file of this size is not added to: each upload is of the whole file."""


class TensorBoard(Sink):
    """tensorboard/ of a run; events of an earlier life at `purge_step` and after it are not shown any more."""

    def __init__(self, run: Directory, *, staging: Path, purge_step: int) -> None:
        self._run, self._folder = run, staging / _NAME
        self._events = SummaryWriter(str(self._folder), purge_step=purge_step)
        self._uploaded: dict[Path, int] = {}

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """The numbers among them, a scalar each."""
        for name, value in numbers(values).items():
            self._events.add_scalar(name, value, step)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """An image; the slider above it goes through the steps."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._events.add_image(name, pixels, step, dataformats="HWC")

    def embedding(self, step: int, embedding: Embedding) -> None:
        """For the projector: that of the first evaluation and the newest are kept."""
        write_projector(self._run.child(_NAME), step, embedding)

    def sync(self) -> None:
        """Flush; on S3, upload the files that have grown."""
        self._events.flush()
        if not is_s3(self._run.uri):
            return
        grown = [p for p in sorted(self._folder.iterdir()) if p.stat().st_size != self._uploaded.get(p)]
        for path in grown:
            data = path.read_bytes()
            self._run.write(f"{_NAME}/{path.name}", data)
            self._uploaded[path] = len(data)
        if any(self._uploaded[path] >= _FULL_BYTES for path in grown):
            self._events.close()
            self._events = SummaryWriter(str(self._folder))

    def close(self, *, failed: bool) -> None:
        """Sync and let go."""
        self.sync()
        self._events.close()
