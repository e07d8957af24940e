"""Writes files of a run on a thread of their own, in order, so that training waits for neither a disk nor a store.

A write that fails for good raises its error on the training thread, at the next call. No Ray here.
"""

import queue
import threading
from collections.abc import Callable
from typing import Protocol

Job = Callable[[], object]


class Writes(Protocol):
    """Runs jobs in order."""

    def put(self, job: Job, *, always: bool = False) -> None:
        """Run a job, now or later; after one that failed only if `always`. Raises the error of an earlier job."""
        ...

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when all jobs are done, or the time is over. Raises the first error of a job."""
        ...


class WriteNow:
    """Runs each job at once."""

    def put(self, job: Job, *, always: bool = False) -> None:
        """Run a job."""
        job()

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return at once."""


class WriteThread:
    """Runs the jobs on a thread; after one that fails, most others are dropped."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Job, bool]] = queue.SimpleQueue()
        self._error: Exception | None = None
        # A daemon, because a process that is ended must not wait for a store that does not answer.
        threading.Thread(target=self._run, name="dinoray-writes", daemon=True).start()

    def put(self, job: Job, *, always: bool = False) -> None:
        """Queue a job without waiting; after one that failed it runs only if `always`. Raises that error."""
        self.check()
        self._jobs.put((job, always))

    def mark(self) -> threading.Event:
        """Return an event that is set once all jobs that were put so far are done or dropped."""
        done = threading.Event()
        self._jobs.put((done.set, True))
        return done

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Return when all jobs are done, or the time is over. Raises the first error of a job."""
        self.mark().wait(timeout_seconds)
        self.check()

    def check(self) -> None:
        """Raise the error of the job that has failed, if one has."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            job, always = self._jobs.get()
            if self._error is None or always:
                try:
                    job()
                except Exception as error:
                    self._error = self._error or error
