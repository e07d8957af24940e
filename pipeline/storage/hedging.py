"""A second request for the same bytes when the first is slow; the first to end is taken.

Stands between waiting.py, which repeats reads, and one attempt of a read. A few answers of a store take far longer
than the others, mostly by chance, so that a second request is often answered sooner. No client and no Ray here.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

MAX_SECOND_REQUESTS = 16
"""Reads of this process that may have two requests at once: so that a slow store does not get twice the load."""

_second_requests = threading.BoundedSemaphore(MAX_SECOND_REQUESTS)
_here = threading.local()
"""`_here.read`: the read whose request this thread makes."""


class Abandoned(Exception):  # noqa: N818
    """Another request for the same bytes was answered; nobody awaits this one."""


def check_wanted() -> None:
    """Raise Abandoned in a thread whose request nobody awaits any more."""
    read: _Read | None = getattr(_here, "read", None)
    if read is not None and read.is_over:
        raise Abandoned


def hedged(operation: Callable[[], Any], *, after_seconds: float) -> Any:
    """Return the result of `operation`, which is called a second time if it takes more than `after_seconds`.

    An error of one call counts only if the other fails too. The call that is not needed goes on in a thread until
    `check_wanted` ends it. `operation` must be safe to run twice at once. Raises what the last call raised.
    """
    read = _Read(operation)
    read.begin()
    try:
        result, error = read.ends.get(timeout=after_seconds)
    except queue.Empty:
        has_two = _second_requests.acquire(blocking=False)
        if has_two:
            read.begin(is_second=True)
        result, error = read.ends.get()
        if error is not None and has_two:
            result, error = read.ends.get()
    read.is_over = True
    if error is not None:
        raise error
    return result


class _Read:
    """One read, and the threads that make its requests."""

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.ends: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.is_over = False
        self._operation, self._lock = operation, threading.Lock()
        self._running, self._has_second = 0, False

    def begin(self, *, is_second: bool = False) -> None:
        with self._lock:
            self._running += 1
            self._has_second = is_second
        # A thread of its own, for as long as the request lasts: that which reads has to be free to ask again.
        threading.Thread(target=self._run, name="read", daemon=True).start()

    def _run(self) -> None:
        _here.read = self
        try:
            end: tuple[Any, BaseException | None] = (self._operation(), None)
        except BaseException as error:
            end = (None, error)
        with self._lock:
            self._running -= 1
            if self._has_second and not self._running:
                _second_requests.release()
        self.ends.put(end)
