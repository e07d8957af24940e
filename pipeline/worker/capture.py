"""What a step that went wrong leaves behind for `dinoray replay`: who was in the batch, and what was measured.

Costs a healthy step nothing. What goes wrong here is a warning, and never ends a run. No Ray here.
"""

import contextlib
import platform
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from dinoray.models.commands import command
from dinoray.models.errors import one_line
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.tracking.capture_files import CaptureFiles
from dinoray.pipeline.training.distributed import rank, world_size
from dinoray.pipeline.training.skips import LAG, Skip
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import drop_path_seed

if TYPE_CHECKING:
    from dinoray.pipeline.worker.spec import WorkerSpec

Batch = TypeVar("Batch")

NOT_FINITE, EXCEPTION = "non-finite step", "exception"
_PACKAGES = ("dinoray", "torch", "timm", "numpy", "ray")
_WAIT_SECONDS = 10.0
"""Longest wait for the capture of an exception, by a rank that has no thread for writes."""
_TRACEBACK_LINES = 40


@dataclass
class Capture:
    """Watches the steps of one rank; rank 0 writes what all ranks see, and each rank its own exceptions."""

    state: TrainState
    files: CaptureFiles
    order: Order
    source: Callable[[], Source]
    """Called for the first capture only: a manifest may be large."""
    last_checkpoint: Callable[[], int]
    """Returns the step of the last checkpoint, 0 before the first."""
    note: Callable[[str], None]
    """Takes a line for the user."""
    write: Callable[[Callable[[], None]], None] | None = None
    """Rank 0's thread for writes; None: exceptions alone are captured, on a thread of their own."""
    run: str = ""
    """The run's address, for the command that is printed."""
    check: Callable[[], None] = lambda: None
    """Raises where this run may not write into its directory any more."""
    _step: int | None = field(default=None, init=False)
    """The step under way, counted from 1; None between two steps."""
    _latest: deque[tuple[int, Mapping[str, Any]]] = field(
        default_factory=lambda: deque(maxlen=LAG + 1), init=False
    )
    """Metrics of the steps that may still turn out to be skipped."""
    _noted: set[str] = field(default_factory=set, init=False)
    _has_warned: bool = field(default=False, init=False)

    @classmethod
    def of(
        cls,
        spec: "WorkerSpec",
        state: TrainState,
        *,
        write: Callable[[Callable[[], None]], None] | None,
        source: Callable[[], Source],
        last_checkpoint: Callable[[], int],
    ) -> "Capture":
        """Return that of a train worker."""
        return cls(
            state,
            CaptureFiles(spec.run.patient(None)),
            spec.stream.order,
            source=source,
            last_checkpoint=last_checkpoint,
            note=lambda text: spec.channel.post("note", text=text),
            write=write,
            run=spec.run.uri,
            check=spec.fence.check if spec.fence else lambda: None,
        )

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield `batches`; the step of each is under way until `after_step`."""
        for batch in batches:
            self._step = self.state.step + 1
            yield batch

    def after_step(self, metrics: Mapping[str, Any], skips: Iterable[Skip]) -> None:
        """Capture the steps that were skipped because they are not finite, of which the host has now learnt."""
        self._step = None
        self._latest.append((self.state.step, metrics))
        for skip in skips if self.write else ():
            counts = {"skipped": skip.total, "skipped_in_a_row": skip.in_a_row}
            self._capture(skip.step, NOT_FINITE, metrics=dict(self._latest).get(skip.step, {}), **counts)

    def collapse(self, verdict: str, metrics: Mapping[str, Any]) -> None:
        """Capture the step whose verdict changed to a collapse."""
        if self.write:
            self._capture(self.state.step, verdict, metrics=metrics)

    @contextlib.contextmanager
    def of_errors(self) -> Iterator[None]:
        """Capture an exception of the step under way, and let it pass. Not that of a collective whose peer is lost."""
        try:
            yield
        except Exception as error:
            if self._step is not None and not _is_lost_peer(error):
                lines = "".join(traceback.format_exception(error)).splitlines()[-_TRACEBACK_LINES:]
                self._capture(self._step, EXCEPTION, error=one_line(error, limit=500), traceback=lines)
            raise

    def _capture(self, step: int, reason: str, **seen: Any) -> None:
        try:
            seen["metrics"] = {
                k: v if isinstance(v, str) else float(v) for k, v in seen.get("metrics", {}).items()
            }
            record = self._record(step, reason) | seen
            if self.write:
                self.write(lambda: self._write(record))
                return
            thread = threading.Thread(target=self._write, args=(record,), name="dinoray-capture", daemon=True)
            thread.start()
            thread.join(_WAIT_SECONDS)
        except Exception as error:
            self._warn(step, error)

    def _record(self, step: int, reason: str) -> dict[str, Any]:
        state, config, ranks = self.state, self.state.config, world_size()
        last = self.last_checkpoint()
        return {
            "step": step,
            "reason": reason,
            "time": time.time(),
            "rank": rank(),
            "world_size": ranks,
            "global_batch_size": config.train.global_batch_size,
            "device": str(state.device),
            "seed": config.train.seed,
            "drop_path_seeds": [drop_path_seed(config.train.seed, step - 1, each) for each in range(ranks)],
            "checkpoint": checkpoint_name(last) if last else None,
            "skipped": state.skipped,
            "skipped_in_a_row": state.skipped_in_a_row,
        }

    def _write(self, record: dict[str, Any]) -> None:
        """Add the images and write the file, on a thread. Never raises."""
        step = record["step"]
        try:
            self.check()
            first = (step - 1) * record["global_batch_size"]
            positions = range(first, first + record["global_batch_size"])
            _, rows = self.order.locate(positions)
            source = self.source()
            record["positions"] = [positions.start, positions.stop]
            record["rows"] = source.in_manifest(rows).tolist()
            record["keys"] = [source.key(row) for row in rows.tolist()]
            record["versions"] = {name: _version(name) for name in _PACKAGES}
            record["versions"]["python"] = platform.python_version()
            if self.files.write(record) and record["reason"] not in self._noted:
                self._noted.add(record["reason"])
                repeat = command("replay", self.run, "--step", str(step))
                self.note(f"step {step} is captured ({record['reason']}): `{repeat}` repeats it")
        except Exception as error:
            self._warn(step, error)

    def _warn(self, step: int, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        with contextlib.suppress(Exception):
            self.note(f"warning: step {step} went wrong and could not be captured: {one_line(error)}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # code that a job has sent with it
        return None


def _is_lost_peer(error: Exception) -> bool:
    """Return True if a collective failed, which it does once another rank has ended: that rank knows why."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text
