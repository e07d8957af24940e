"""What a run writes of itself, by one way to every sink: JSON lines, pictures, TensorBoard, gauges, trackers.

Written by rank 0 only. For a local run directory the files are appended to in place; for
S3, which cannot append, they are staged in a temporary folder and uploaded by `sync`. A resumed run first drops the
lines and the pictures of steps after its checkpoint, because it is about to repeat those steps.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.storage.files import Directory, MissingObject, is_s3
from pipeline.storage.run_dir import checkpoint_name
from pipeline.tracking.records import attention_figures
from pipeline.tracking.sink import Embedding, Sink
from pipeline.tracking.tensorboard import TensorBoard


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


class RunFiles(Sink):
    """metrics.jsonl of a run that continues at `first_step`, and its pictures as files."""

    def __init__(self, run: Directory, *, first_step: int, staging: Path) -> None:
        self._run = run
        self._metrics = JsonLines(
            run, "metrics.jsonl", keep=lambda r: 0 < first_step >= r["step"], staging=staging
        )
        for step, name in attention_figures(run):
            if not 0 < first_step >= step:
                run.delete(name)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """A line."""
        self._metrics.append({"step": step, **values})

    def picture(self, name: str, step: int, png: bytes) -> None:
        """A file in the folder of this name."""
        self._run.write(f"{name}/{checkpoint_name(step)}.png", png)

    def sync(self) -> None:
        """Upload the lines; pictures are written at once."""
        self._metrics.sync()

    def close(self, *, failed: bool) -> None:
        """Sync."""
        self.sync()


class MetricsLog(Sink):
    """All that a run which continues at `first_step` writes of itself: quarantine.jsonl, and the rest by its sinks.

    These are its files, TensorBoard and, after them, `others`.
    """

    def __init__(
        self, run: Directory, *, first_step: int, first_position: int, others: Sequence[Sink] = ()
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="dinoray-log-") if is_s3(run.uri) else None
        staging = Path(self._temporary.name if self._temporary else run.uri)
        staging.mkdir(parents=True, exist_ok=True)
        self._quarantine = JsonLines(
            run, "quarantine.jsonl", keep=lambda r: r["position"] < first_position, staging=staging
        )
        files = RunFiles(run, first_step=first_step, staging=staging)
        events = TensorBoard(run, staging=staging, purge_step=first_step + 1 if first_step else 0)
        self._sinks, self._closed = [files, events, *others], False
        if not first_step:
            with contextlib.suppress(MissingObject):  # trials of a study have none
                crops = run.read("crops.png")
                for sink in self._sinks[1:]:
                    sink.picture("crops", 0, crops)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write `values` as of `step` steps done."""
        for sink in self._sinks:
            sink.log(step, values)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Show a picture as of `step` steps done."""
        for sink in self._sinks:
            sink.picture(name, step, png)

    def embedding(self, step: int, embedding: Embedding) -> None:
        """Show features as of `step` steps done."""
        for sink in self._sinks:
            sink.embedding(step, embedding)

    def quarantine(self, records: list[dict[str, Any]]) -> None:
        """Name images that could not be used."""
        for record in records:
            self._quarantine.append(record)

    def sync(self) -> None:
        """Make everything written so far safe in the run directory."""
        self._quarantine.sync()
        for sink in self._sinks:
            sink.sync()

    def close(self, *, failed: bool = False) -> None:
        """Sync and let go, once; `failed`: the run did not come to where it wanted to."""
        if self._closed:
            return
        self._closed = True
        with contextlib.ExitStack() as last:  # each is closed whatever another one raises
            if self._temporary:
                last.callback(self._temporary.cleanup)
            for sink in reversed(self._sinks):
                last.callback(sink.close, failed=failed)
            self._quarantine.sync()


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
