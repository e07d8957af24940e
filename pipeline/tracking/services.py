"""MLflow and Weights & Biases beside a run, each on a thread of its own: whatever they do, the run goes on.

A sink of tracking/run_log.py. What is to be sent waits in a queue of bounded length; what fails is told of once, tried
again a few times and then counted; at the end there is a limit to how long the last of it is waited for. What the two
services are told, and how, stands in tracking/mlflow_wandb.py. Knows no Ray.
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

from models.errors import ConfigError, one_line
from pipeline.storage.files import Directory, MissingObject
from pipeline.tracking.config import TrackConfig
from pipeline.tracking.mlflow_wandb import OPEN, TrackedRun, Tracker
from pipeline.tracking.scalar_names import grouped
from pipeline.tracking.sink import Sink, numbers

FILE = "tracking.json"
"""In the run directory: the id by which a service knows the run, so that a resumed run is the same run there; and
whether its curves have names with groups, which runs of earlier versions have not."""
_QUEUE_LENGTH = 1000
_PAUSES = (0.0, 5.0, 60.0)
"""Seconds before each time that something is tried."""
_END_SECONDS = 30.0
"""How long a run that ends waits for what is still to be sent."""


def asked_for(config: TrackConfig) -> list[str]:
    """The names of the services that are to follow the run."""
    return [name for name, asked in (("mlflow", config.mlflow), ("wandb", config.wandb)) if asked]


def check_trackers(config: TrackConfig) -> None:
    """ConfigError when one is asked for that is not installed, or that nothing says the address of."""
    mistakes = [
        f"track.{name}=true needs {name}, which is not installed: pip install 'dinoray[{name}]' here and on the nodes"
        for name in asked_for(config)
        if not _is_installed(name)
    ]
    if config.mlflow and not os.environ.get("MLFLOW_TRACKING_URI"):
        mistakes.append(
            "track.mlflow=true needs MLFLOW_TRACKING_URI in the environment here and of the nodes, "
            "e.g. http://HOST:5000 or sqlite:////FOLDER/mlflow.db"
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # else it is a mere folder of this name


def open_trackers(
    config: TrackConfig,
    run: Directory,
    *,
    name: str,
    params: Mapping[str, object],
    page: Callable[[Directory], str],
    tell: Callable[[str], None],
) -> list[Sink]:
    """The sink for those asked for, in a list; none where there are none.

    `page` makes the page about the run, as HTML; `tell` takes a line for a person.
    """
    names = asked_for(config)
    if not names:
        return []
    is_grouped = True
    try:
        kept = json.loads(run.read(FILE))
        number, is_grouped = str(kept["id"]), bool(kept.get("grouped"))
    except (MissingObject, ValueError, KeyError, TypeError) as error:
        if not isinstance(error, MissingObject):
            tell(f"warning: {run.join(FILE)} is damaged: this run is a new one to {', '.join(names)}")
        number = uuid.uuid4().hex[:12]
        run.write(FILE, json.dumps({"id": number, "grouped": True}).encode())
    about = TrackedRun(name, number, config.project, params, run)
    return [Trackers(about, {name: OPEN[name] for name in names}, page, tell, is_grouped=is_grouped)]


class Trackers(Sink):
    """Hands everything on to services, by name, and waits for none; `end_seconds` at the end, for all together."""

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
        """The numbers among them; a run keeps the names that its curves have begun with."""
        found, now = numbers(values), time.time()
        found = grouped(found) if self._is_grouped else found
        self._put(lambda tracker: tracker.log(step, found, now))

    def picture(self, name: str, step: int, png: bytes) -> None:
        """The picture."""
        self._put(lambda tracker: tracker.picture(name, step, png))

    def close(self, *, failed: bool) -> None:
        """The page about the run, the end, and what is still to be sent, as far as it goes in time."""
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
    """What is to be told to one service, in its order, and the thread that tells it."""

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
        # A daemon: Python waits for the others before it ends.
        self._thread = threading.Thread(target=self._send_all, name=f"dinoray-{name}", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Tracker], None]) -> None:
        """Take a job in, without waiting; where there is no room, the oldest is given up."""
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
        """No job comes any more."""
        self._ending.set()
        self.put(lambda tracker: None)  # wakes the thread

    def wait(self, seconds: float) -> None:
        """Until all is sent or given up, but no longer; tells what was not sent."""
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
                if self._ending.is_set():  # what is left would only meet the same
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
            self._say(f"{text}; the run goes on without it for now")

    def _say(self, text: str) -> None:
        # An address may hold a password, and an error the address.
        self._tell(f"warning: {self._name}: {re.sub(r'//[^/@ ]+@', '//...@', text)}")
