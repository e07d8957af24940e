"""TensorBoard's event files: scalars, crops and attention as images, and the projector's embeddings.

A sink of tracking/run_log.py. The files of the run `runs/demo` are in `runs/demo/tensorboard/demo`, because
TensorBoard names a run after the folder below `--logdir`. Event files are written to a local folder. For a
run directory on S3 this is a staging folder whose files `sync` uploads. No Ray here.
"""

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from dinoray.models.errors import one_line
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, is_s3
from dinoray.pipeline.tracking.projector import CONFIG, FOLDERS, write_projector
from dinoray.pipeline.tracking.scalar_names import grouped, with_group
from dinoray.pipeline.tracking.sink import Embedding, MetricSink, numbers

_FULL_BYTES = 4 << 20
"""On S3, size at which a new event file is started, because each upload transfers a whole file."""


class TensorBoard(MetricSink):
    """Events of a run. Events of earlier starts at `purge_step` or later are no longer shown.

    metrics.jsonl has all numbers, so a full disk leaves a gap in the curves, and `tell` gets one line.
    """

    def __init__(
        self, run: Directory, *, staging: Path, purge_step: int, tell: Callable[[str], None] = print
    ) -> None:
        self._run, self._place = run, f"{run_dir.TENSORBOARD}/{run.uri.rpartition('/')[2]}"
        self._folder, self._tell = staging / self._place, tell
        _move_old_files(run.child(run_dir.TENSORBOARD), run.child(self._place))
        self._purge_step: int | None = purge_step
        self._open_events: SummaryWriter | None = None
        self._is_full = self._has_told = False
        self._uploaded: dict[Path, int] = {}
        self._write(lambda events: None)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write each number as a scalar, in sections by group."""
        for name, value in grouped(numbers(values)).items():
            self._write(partial(SummaryWriter.add_scalar, tag=name, scalar_value=value, global_step=step))

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write an image; TensorBoard shows a slider over the steps."""
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        self._write(lambda events: events.add_image(with_group(name), pixels, step, dataformats="HWC"))

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Write a set for the projector; the sets of the first and the newest evaluation are kept."""
        write_projector(self._run.child(self._place), step, embedding)

    def sync(self) -> None:
        """Flush; on S3, upload the files that have grown."""
        self._is_full = False  # from here on, it is tried again
        self._write(lambda events: events.flush())
        if not is_s3(self._run.uri) or not self._folder.is_dir():
            return
        grown = [p for p in sorted(self._folder.iterdir()) if p.stat().st_size != self._uploaded.get(p)]
        for path in grown:
            data = path.read_bytes()
            self._run.write(f"{self._place}/{path.name}", data)
            self._uploaded[path] = len(data)
        if any(self._uploaded[path] >= _FULL_BYTES for path in grown):
            self._close()

    def close(self, *, failed: bool) -> None:
        """Sync and close the event file."""
        self.sync()
        self._close()

    def _write(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to the open event file, or to a new one. A writer whose disk was full is of no use any more."""
        if self._is_full:
            return
        try:
            if self._open_events is None:
                self._open_events = SummaryWriter(str(self._folder), purge_step=self._purge_step)
                self._purge_step = None
            write(self._open_events)
        except OSError as error:
            self._open_events, self._is_full = None, True
            if not self._has_told:
                self._has_told = True
                self._tell(
                    f"warning: no events in {self._folder} until they can be written ({one_line(error)})"
                )

    def _close(self) -> None:
        self._write(lambda events: events.close())
        self._open_events = None


def _move_old_files(old: Directory, new: Directory) -> None:
    """Move an earlier version's files out of tensorboard/ itself; TensorBoard shows them as a run `.`."""
    names = [name for name in old.list() if name == CONFIG or name.startswith("events.out.")]
    if CONFIG in names:
        names += [f"{folder}/{name}" for folder in FOLDERS for name in old.child(folder).list()]
    for name in names:
        new.write(name, old.read(name))
        old.delete(name)
