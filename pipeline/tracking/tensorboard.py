"""TensorBoard's event files: scalars, crops and attention as images, and the projector's embeddings.

A sink of tracking/run_log.py. The files of the run `runs/demo` are in `runs/demo/tensorboard/demo`, because
TensorBoard names a run after the folder below `--logdir`. Event files are written to a local folder. For a
run directory on S3 this is a staging folder whose files `sync` uploads. No Ray here.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, is_s3
from dinoray.pipeline.tracking.projector import CONFIG, FOLDERS, write_projector
from dinoray.pipeline.tracking.scalar_names import grouped, with_group
from dinoray.pipeline.tracking.sink import Embedding, MetricSink, numbers

_FULL_BYTES = 4 << 20
"""On S3, size at which a new event file is started, because each upload transfers a whole file."""


class TensorBoard(MetricSink):
    """Events of a run. Events of earlier starts at `purge_step` or later are no longer shown."""

    def __init__(self, run: Directory, *, staging: Path, purge_step: int) -> None:
        self._run, self._place = run, f"{run_dir.TENSORBOARD}/{run.uri.rpartition('/')[2]}"
        self._folder = staging / self._place
        _move_old_files(run.child(run_dir.TENSORBOARD), run.child(self._place))
        self._events = SummaryWriter(str(self._folder), purge_step=purge_step)
        self._uploaded: dict[Path, int] = {}

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write each number as a scalar, in sections by group."""
        for name, value in grouped(numbers(values)).items():
            self._events.add_scalar(name, value, step)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write an image; TensorBoard shows a slider over the steps."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._events.add_image(with_group(name), pixels, step, dataformats="HWC")

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Write a set for the projector; the sets of the first and the newest evaluation are kept."""
        write_projector(self._run.child(self._place), step, embedding)

    def sync(self) -> None:
        """Flush; on S3, upload the files that have grown."""
        self._events.flush()
        if not is_s3(self._run.uri):
            return
        grown = [p for p in sorted(self._folder.iterdir()) if p.stat().st_size != self._uploaded.get(p)]
        for path in grown:
            data = path.read_bytes()
            self._run.write(f"{self._place}/{path.name}", data)
            self._uploaded[path] = len(data)
        if any(self._uploaded[path] >= _FULL_BYTES for path in grown):
            self._events.close()
            self._events = SummaryWriter(str(self._folder))

    def close(self, *, failed: bool) -> None:
        """Sync and close the event file."""
        self.sync()
        self._events.close()


def _move_old_files(old: Directory, new: Directory) -> None:
    """Move an earlier version's files out of tensorboard/ itself; TensorBoard shows them as a run `.`."""
    names = [name for name in old.list() if name == CONFIG or name.startswith("events.out.")]
    if CONFIG in names:
        names += [f"{folder}/{name}" for folder in FOLDERS for name in old.child(folder).list()]
    for name in names:
        new.write(name, old.read(name))
        old.delete(name)
