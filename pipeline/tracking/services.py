"""Send a run's values to MLflow and W&B, each on its own thread, without blocking or failing the run.

A sink of tracking/run_log.py. Messages wait in a bounded queue. The first failure is printed; a failed
message is retried a few times and then counted as lost. At the end of a run there is a time limit for unsent
messages. tracking/mlflow_wandb.py has the calls to the two services. No Ray here.
"""

import importlib.util
import json
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

from dinoray.models.errors import ConfigError, one_line
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.files import Directory, MissingObject
from dinoray.pipeline.tracking.config import TrackConfig
from dinoray.pipeline.tracking.mlflow_wandb import OPEN, TrackedRun, Tracker
from dinoray.pipeline.tracking.scalar_names import grouped
from dinoray.pipeline.tracking.sink import MetricSink, numbers

"""File in the run directory with the run's id in the services, so that a resumed run continues there, and
`grouped`: true if its curves have names with groups, which runs of earlier versions do not have."""
_QUEUE_LENGTH = 1000
_PAUSES = (0.0, 5.0, 60.0)
"""Seconds before each attempt to send a message."""
_END_SECONDS = 30.0
"""Longest time that a run waits at its end for unsent messages."""


def asked_for(config: TrackConfig) -> list[str]:
    """Return the names of the enabled services."""
    return [name for name, asked in (("mlflow", config.mlflow), ("wandb", config.wandb)) if asked]


def check_trackers(config: TrackConfig) -> None:
    """Raise ConfigError if an enabled service is not installed or has no address."""
    mistakes = [
        f"track.{name}=true needs {name}, which is not installed: pip install 'dinoray[{name}]' here and on the nodes"
        for name in asked_for(config)
        if not _is_installed(name)
    ]
    if config.mlflow and not os.environ.get("MLFLOW_TRACKING_URI"):
        mistakes.append(
            "track.mlflow=true needs MLFLOW_TRACKING_URI; set it in the environment here and of the nodes, "
            "e.g. http://HOST:5000 or sqlite:////FOLDER/mlflow.db"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a mere folder of this name has no origin


def open_trackers(
    config: TrackConfig,
    run: Directory,
    *,
    name: str,
    params: Mapping[str, object],
    page: Callable[[Directory], str],
    tell: Callable[[str], None],
) -> list[MetricSink]:
    """Return a list with the sink for the enabled services; empty if none is enabled.

    `page` returns the HTML report of a run; `tell` prints one line.
    """
    names = asked_for(config)
    if not names:
        return []
    is_grouped = True
    try:
        kept = json.loads(run.read(run_dir.TRACKING))
        number, is_grouped = str(kept["id"]), bool(kept.get("grouped"))
    except (MissingObject, ValueError, KeyError, TypeError) as error:
        if not isinstance(error, MissingObject):
            tell(
                f"warning: {run.join(run_dir.TRACKING)} is damaged: this run is a new one to {', '.join(names)}"
            )
        number = uuid.uuid4().hex[:12]
        run.write(run_dir.TRACKING, json.dumps({"id": number, "grouped": True}).encode())
    about = TrackedRun(name, number, config.project, params, run)
    return [Trackers(about, {name: OPEN[name] for name in names}, page, tell, is_grouped=is_grouped)]


class Trackers(MetricSink):
    """Forwards everything to the services without waiting; at the end it waits `end_seconds` in total."""

    def __init__(
        self,
        run: TrackedRun,
        openers: Mapping[str, Callable[[TrackedRun], Tracker]],
        page: Callable[[Directory], str],
        tell: Callable[[str], None],
        *,
        is_grouped: bool = True,
        pauses: Sequence[float] = _PAUSES,
        end_seconds: float = _END_SECONDS,
    ) -> None:
        self._run, self._page = run, page
        self._end_seconds, self._is_grouped = end_seconds, is_grouped
        self._lines = [_Line(name, run, opener, tell, pauses) for name, opener in openers.items()]

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Send the numbers. A run keeps the names with which its curves began."""
        found, now = numbers(values), time.time()
        found = grouped(found) if self._is_grouped else found
        self._put(lambda tracker: tracker.log(step, found, now))

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Send the picture."""
        self._put(lambda tracker: tracker.picture(name, step, png))

    def close(self, *, failed: bool) -> None:
        """Send the report, the end and all unsent messages, within the time limit."""
        self._put(lambda tracker: tracker.page(self._page(self._run.directory)))
        self._put(lambda tracker: tracker.close(failed))
        deadline = time.monotonic() + self._end_seconds
        for line in self._lines:
            line.end()
        for line in self._lines:
            line.wait(max(0.0, deadline - time.monotonic()))

    def _put(self, job: Callable[[Tracker], None]) -> None:
        for line in self._lines:
            line.put(job)


class _Line:
    """The queue of messages to one service, in order, and the thread that sends them."""

    def __init__(
        self,
        name: str,
        run: TrackedRun,
        opener: Callable[[TrackedRun], Tracker],
        tell: Callable[[str], None],
        pauses: Sequence[float],
    ) -> None:
        self._name, self._run, self._open, self._tell, self._pauses = name, run, opener, tell, pauses
        self._jobs: queue.Queue[Callable[[Tracker], None]] = queue.Queue(_QUEUE_LENGTH)
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._num_lost, self._has_told = 0, False
        self._tracker: Tracker | None = None
        # A daemon thread, because Python waits for all other threads before it exits.
        self._thread = threading.Thread(target=self._send_all, name=f"dinoray-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Tracker], None]) -> None:
        """Queue a job without waiting; if the queue is full, drop the oldest job."""
        while True:
            try:
                return self._jobs.put_nowait(job)
            except queue.Full:
                self._warn("it does not keep up")
            try:
                self._jobs.get_nowait()
                self._lose()
            except queue.Empty:
                pass

    def end(self) -> None:
        """Mark the end of the queue: no job follows."""
        self._ending.set()
        self.put(lambda tracker: None)  # wakes the thread

    def wait(self, seconds: float) -> None:
        """Wait until all jobs are sent or dropped, at most `seconds`; print the number of lost messages."""
        self._thread.join(seconds)
        num_lost = self._num_lost + (self._jobs.qsize() if self._thread.is_alive() else 0)
        if self._thread.is_alive():
            self._say(
                f"it has not answered in time at the end of the run; up to {num_lost + 1} messages are lost"
            )
        elif num_lost:
            self._say(f"{num_lost} messages are lost")

    def _send_all(self) -> None:
        while not (self._ending.is_set() and self._jobs.empty()):
            if not self._send(self._jobs.get()):
                self._lose()
                if self._ending.is_set():  # the remaining jobs would fail in the same way
                    self._num_lost += max(0, self._jobs.qsize() - 1)
                    return

    def _send(self, job: Callable[[Tracker], None]) -> bool:
        for pause in self._pauses:
            self._ending.wait(pause)
            try:
                self._tracker = self._tracker or self._open(self._run)
                job(self._tracker)
                return True
            except (Exception, SystemExit) as error:
                self._warn(one_line(error))
            if self._ending.is_set():
                break
        return False

    def _lose(self) -> None:
        with self._lock:
            self._num_lost += 1

    def _warn(self, text: str) -> None:
        if not self._has_told:
            self._has_told = True
            self._say(f"{text}; the run continues without it")

    def _say(self, text: str) -> None:
        # An error may contain an address, and an address may contain a password.
        self._tell(f"warning: {self._name}: {re.sub(r'//[^/@ ]+@', '//...@', text)}")
