"""Log a run to every sink: JSON lines, pictures, TensorBoard, gauges, trackers.

Only rank 0 writes. In a local run directory, files are appended in place. S3 cannot append, so there files
are staged in a temporary folder and uploaded by `sync`. A resumed run first drops the lines and pictures of
steps after its checkpoint, because it repeats those steps.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject, is_s3
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.tracking.records import attention_figures
from dinoray.pipeline.tracking.sink import Embedding, MetricSink
from dinoray.pipeline.tracking.tensorboard import TensorBoard


class JsonLines:
    """A file with one JSON object per line that can be appended to, local or on S3."""

    def __init__(
        self, run: Directory, name: str, *, keep: Callable[[dict[str, Any]], bool], staging: Path
    ) -> None:
        self._run, self._name, self._path = run, name, staging / name
        try:
            old = run.read(name).decode()
        except MissingObject:
            old = ""
        # The text after the last line end was cut off by a kill, unless only its line end is missing.
        whole, _, last = old.rpartition("\n")
        kept = [line for line in [*whole.split("\n"), *_if_whole(last)] if line and keep(json.loads(line))]
        self._path.write_text("".join(f"{line}\n" for line in kept))
        self._dirty = bool(old)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one object as a line. Non-finite numbers become strings, since JSON has none."""
        with self._path.open("a") as file:
            file.write(json.dumps({k: _json_number(v) for k, v in record.items()}) + "\n")
        self._dirty = True

    def sync(self) -> None:
        """Upload the file if it changed; a local run directory needs no upload."""
        if self._dirty and is_s3(self._run.uri):
            self._run.write(self._name, self._path.read_bytes())
        self._dirty = False


def _if_whole(line: str) -> list[str]:
    try:
        return [line] if isinstance(json.loads(line), dict) else []
    except ValueError:
        return []


class RunFiles(MetricSink):
    """metrics.jsonl of a run that starts or resumes at `first_step`, and its pictures as files."""

    def __init__(self, run: Directory, *, first_step: int, staging: Path) -> None:
        self._run = run
        self._metrics = JsonLines(
            run, run_dir.METRICS, keep=lambda r: 0 < first_step >= r["step"], staging=staging
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

    The sinks are its files, TensorBoard and then `others`.
    """

    def __init__(
        self, run: Directory, *, first_step: int, first_position: int, others: Sequence[MetricSink] = ()
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="dinoray-log-") if is_s3(run.uri) else None
        staging = Path(self._temporary.name if self._temporary else run.uri)
        staging.mkdir(parents=True, exist_ok=True)
        self._quarantine = JsonLines(
            run, run_dir.QUARANTINE, keep=lambda r: r["position"] < first_position, staging=staging
        )
        files = RunFiles(run, first_step=first_step, staging=staging)
        events = TensorBoard(run, staging=staging, purge_step=first_step + 1 if first_step else 0)
        self._sinks, self._closed = [files, events, *others], False
        if not first_step:
            with contextlib.suppress(MissingObject):  # trials of a study have none
                crops = run.read(run_dir.CROPS)
                for sink in self._sinks[1:]:
                    sink.picture("crops", 0, crops)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log `values` after `step` steps."""
        for sink in self._sinks:
            sink.log(step, values)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Log a picture after `step` steps."""
        for sink in self._sinks:
            sink.picture(name, step, png)

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Log features after `step` steps."""
        for sink in self._sinks:
            sink.embedding(step, embedding)

    def quarantine(self, records: list[dict[str, Any]]) -> None:
        """Append records of bad images to quarantine.jsonl."""
        for record in records:
            self._quarantine.append(record)

    def sync(self) -> None:
        """Write everything logged so far to the run directory."""
        self._quarantine.sync()
        for sink in self._sinks:
            sink.sync()

    def close(self, *, failed: bool = False) -> None:
        """Sync and close all sinks; later calls do nothing. `failed`: the run ended with an error."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as last:  # each sink is closed even if another raises
            if self._temporary:
                last.callback(self._temporary.cleanup)
            for sink in reversed(self._sinks):
                last.callback(sink.close, failed=failed)
            self._quarantine.sync()


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
