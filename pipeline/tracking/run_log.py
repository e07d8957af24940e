"""Log a run to every sink: JSON lines, pictures, TensorBoard, gauges, trackers.

Only rank 0 writes. In a local run directory, files are appended in place. S3 cannot append, so there files
are staged in a temporary folder and uploaded by `sync`. A resumed run first drops the lines and pictures of
steps after its checkpoint, because it repeats those steps. Files are written by `writes`, which may be a thread: then
neither a disk nor a store holds up the caller.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.tracking.bad_image_file import BadImageFile
from dinoray.pipeline.tracking.json_lines import JsonLines
from dinoray.pipeline.tracking.records import attention_figures
from dinoray.pipeline.tracking.sink import Embedding, MetricSink
from dinoray.pipeline.tracking.tensorboard import TensorBoard
from dinoray.pipeline.tracking.write_thread import WriteNow, Writes

_FAILED_SECONDS = 10.0
"""Longest time that a run waits for its files after an error; they may be what failed."""


class RunFiles(MetricSink):
    """metrics.jsonl of a run that starts or resumes at `first_step`, and its pictures as files."""

    def __init__(self, run: Directory, *, first_step: int, staging: Path) -> None:
        self._run = run
        self._metrics = JsonLines(
            run, run_dir.METRICS, keep=lambda r: 0 < first_step >= r.get("step", math.inf), staging=staging
        )
        for step, name in attention_figures(run):
            if not 0 < first_step >= step:
                run.delete(name)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Append a line."""
        self._metrics.append({"step": step, **values})

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write a file in the folder `name`."""
        self._run.write(f"{name}/{checkpoint_name(step)}.png", png)

    def sync(self) -> None:
        """Upload the lines; pictures are already written."""
        self._metrics.sync()

    def close(self, *, failed: bool) -> None:
        """Upload the lines."""
        self.sync()


class MetricsLog(MetricSink):
    """The log of a run that starts or resumes at `first_step`: quarantine.jsonl, and sinks for all the rest.

    The sinks are its files, TensorBoard and then `others`, which wait for nothing. `tell` takes a line for the user.
    """

    def __init__(
        self,
        run: Directory,
        *,
        num_images: int,
        first_step: int = 0,
        resume_position: int = 0,
        others: Sequence[MetricSink] = (),
        tell: Callable[[str], None] = print,
        writes: Writes | None = None,
    ) -> None:
        self._writes = writes or WriteNow()
        self._temporary = tempfile.TemporaryDirectory(prefix="dinoray-log-") if is_s3(run.uri) else None
        staging = Path(self._temporary.name if self._temporary else run.uri)
        staging.mkdir(parents=True, exist_ok=True)
        self._bad_images = BadImageFile(
            run, num_images=num_images, resume_position=resume_position, staging=staging, tell=tell
        )
        files = RunFiles(run, first_step=first_step, staging=staging)
        purge_step = first_step + 1 if first_step else 0
        events = TensorBoard(run, staging=staging, purge_step=purge_step, tell=tell)
        self._files: list[MetricSink] = [files, events]
        self._others, self._closed = others, False
        if not first_step:
            with contextlib.suppress(MissingObject):  # trials of a study have none
                crops = run.read(run_dir.CROPS)
                for sink in (events, *others):
                    sink.picture("crops", 0, crops)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log `values` after `step` steps."""
        self._each(lambda sink: sink.log(step, values))

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Log a picture after `step` steps."""
        self._each(lambda sink: sink.picture(name, step, png))

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Log features after `step` steps."""
        self._each(lambda sink: sink.embedding(step, embedding))

    def add_bad_images(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records of images that were replaced to quarantine.jsonl."""
        self._writes.put(partial(self._bad_images.add, records))

    def sync(self, *, then: Callable[[], object] = lambda: None) -> None:
        """Write everything logged so far to the run directory, and call `then`, also if that has failed."""
        self._writes.put(self._bad_images.sync)
        self._each(lambda sink: sink.sync())
        self._writes.put(then, always=True)

    def close(self, *, failed: bool = False) -> None:
        """Sync and close all sinks; later calls do nothing. `failed`: the run ended with an error.

        Files of a run that failed are waited for some seconds only.
        """
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as last:  # each sink is closed even if another raises
            if self._temporary:
                last.callback(self._temporary.cleanup)
            for sink in reversed(self._others):
                last.callback(sink.close, failed=failed)
            last.callback(self._writes.wait, _FAILED_SECONDS if failed else None)
            for sink in reversed(self._files):
                last.callback(self._writes.put, partial(sink.close, failed=failed))
            self._writes.put(self._bad_images.sync)

    def _each(self, call: Callable[[MetricSink], None]) -> None:
        for sink in self._files:
            self._writes.put(partial(call, sink))
        for sink in self._others:
            call(sink)
