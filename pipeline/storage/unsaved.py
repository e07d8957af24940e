"""What a run could not write yet: since when, and the line about it for the user.

Stands beside waiting.py, whose watch is over reads. A write may fail alone, because writes are refused or a disk is
full, so it is watched file by file. The run continues meanwhile. No Ray here.
"""

import logging
import threading
import time
from collections.abc import Callable

from dinoray.pipeline.storage.waiting import NOTED_SECONDS, Patient, Report, duration, shortened

logger = logging.getLogger(__name__)


class UnsavedWatch:
    """The files that this process could not write yet. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.report: Report = lambda text, _: logger.warning("%s", text)
        self._clock, self._lock = clock, threading.Lock()
        self._since: dict[str, float] = {}
        self._reported: float | None = None
        """Since when the file could not be written that was reported first."""

    def failed(self, what: str, reason: str, give_up_after_seconds: float) -> None:
        """Record a failed write; report the first file that could not be written for some seconds."""
        with self._lock:
            since = self._since.setdefault(what, self._clock())
            waited = self._clock() - since
            if self._reported is not None or waited < NOTED_SECONDS:
                return
            self._reported = since
        limit = duration(give_up_after_seconds)
        self.report(
            f"{what} could not be written for {waited:.0f} s ({shortened(reason)}): "
            f"the run continues, and it is tried again, at most {limit}",
            False,
        )

    def answered(self, what: str) -> None:
        """Record that a file is written, or not awaited any more; report it once no other is left."""
        if not self._since:
            return
        with self._lock:
            self._since.pop(what, None)
            reported = self._reported
            if self._since or reported is None:
                return
            self._reported = None
        self.report(f"all files are written again, after {self._clock() - reported:.0f} s", True)

    def unsaved(self) -> dict[str, float]:
        """Return the files that could not be written for some seconds -> for how many."""
        with self._lock:
            now = self._clock()
            waited = {what: now - since for what, since in self._since.items()}
        return {what: seconds for what, seconds in waited.items() if seconds >= NOTED_SECONDS}


UNSAVED = UnsavedWatch()
"""Of this process: all that it writes for a run."""


def report_unsaved(report: Report) -> None:
    """Set the function that gets the lines about files that cannot be written; by default they are logged."""
    UNSAVED.report = report


def patient_write(give_up_after_seconds: float) -> Patient:
    """Return what repeats a write of this process until it succeeds, at most for so long."""
    return Patient(give_up_after_seconds, watch=UNSAVED)
