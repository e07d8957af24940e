"""Reads that wait while the storage does not answer, because an outage is never a property of an object.

Stands between retry.py, which tells the kinds of failures apart, and the readers of images. A read waits up to
a limit of time. Two kinds of failures may be those of one object: it is refused, or each of its requests fails
while the store is well. Both are decided by reading one byte of other objects. No images and no Ray here.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.retry import (
    RETRIED,
    ArchivedObject,
    ChangedObject,
    DeniedObject,
    FailingObject,
    MissingObject,
    Unreachable,
    is_of_a_disk,
    is_throttling,
    jitter,
    judge,
    remedy,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

BASE_SECONDS = 0.2
"""Longest first pause of a read; it doubles with each failure."""
MAX_SECONDS = 5.0
"""Longest pause of a read."""
NOTED_SECONDS = 5.0
"""Time without an answer after which a line about it is due."""
LONE_FAILURES = 10
"""Failures of one object, none of them throttling, after which other objects are read for comparison."""
LONE_ANSWERS = 8
"""Answers for other objects, each between two failures of one object, after which that object is bad."""
_OTHERS_PER_TURN = 3
_REASON_LENGTH = 200

Probe = Callable[[], object]
"""Reads one byte of an object, in a single attempt. Raises the client's own errors."""
Report = Callable[[str, bool], None]
"""(line for the user, True if the storage answers again)."""
Once = Callable[[Callable[[], Any]], Any]
"""Calls an operation, and returns or raises as it does."""


def _call(operation: Callable[[], T]) -> T:
    return operation()


class Watch(Protocol):
    """Is told of the attempts of reads or writes. `what`: the object's name."""

    def failed(self, what: str, reason: str, give_up_after_seconds: float) -> None:
        """Record a failed attempt."""
        ...

    def answered(self, what: str) -> None:
        """Record an attempt that was answered, or the last that will be made."""
        ...


class OutageWatch:
    """The time since the storage last answered this process. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.report: Report = lambda text, _: logger.warning("%s", text)
        self._clock, self._lock = clock, threading.Lock()
        self._since: float | None = None
        self._is_reported = False

    def failed(self, what: str, reason: str, give_up_after_seconds: float) -> None:
        """Record a failed request; report once that the storage has not answered for some seconds."""
        with self._lock:
            now = self._clock()
            self._since = now if self._since is None else self._since
            waited = now - self._since
            if self._is_reported or waited < NOTED_SECONDS:
                return
            self._is_reported = True
        limit, reason = duration(give_up_after_seconds), shortened(f"{what}: {reason}")
        self.report(
            f"storage has not answered for {waited:.0f} s ({reason}): waiting, at most {limit}", False
        )

    def answered(self, what: str) -> None:
        """Record an answer, for any object; report it after a reported failure."""
        if self._since is None:
            return
        with self._lock:
            since, is_reported = self._since, self._is_reported
            self._since, self._is_reported = None, False
        if since is not None and is_reported:
            self.report(f"storage answers again after {self._clock() - since:.0f} s", True)


WATCH = OutageWatch()
"""Of this process: all its reads share it, so that one line stands for all of them."""


def report_outages(report: Report) -> None:
    """Set the function that gets the lines about outages of this process; by default they are logged."""
    WATCH.report = report


class _Answer(Enum):
    READ = "read"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class Patient:
    """Retries reads of one object until the storage answers.

    `others` returns probes of other objects, the likeliest to be readable first. `is_wanted` returns False once
    nobody awaits the read any more. `once` calls the operation for one attempt; hedging.py replaces it.
    """

    give_up_after_seconds: float
    others: Callable[[], Iterable[Probe]] = tuple
    is_wanted: Callable[[], bool] = lambda: True
    once: Once = _call
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic
    rng: Callable[[], float] = jitter
    watch: Watch | None = None
    """Is told of each attempt; None: WATCH."""

    def __call__(self, operation: Callable[[], T], *, what: str) -> T:
        """Return the operation's result.

        Raises Unreachable `give_up_after_seconds` after the first failure. Raises DeniedObject, ArchivedObject
        or FailingObject only if the store answers for another object; a store that refuses all of them raises
        a plain DataError.
        """
        first_failure: float | None = None
        doubts, watch = _Doubts(self.others), self.watch or WATCH
        for attempt in itertools.count():
            try:
                result = self.once(operation)
            except RETRIED as error:
                failure: Exception = error
            except DataError:
                watch.answered(what)
                raise
            else:
                watch.answered(what)
                return result
            try:
                reason = doubts.reason(failure, what)
            except Exception:
                if self.watch is not None:
                    self.watch.answered(what)
                raise
            watch.failed(what, reason, self.give_up_after_seconds)
            now = self.clock()
            first_failure = now if first_failure is None else first_failure
            left = first_failure + self.give_up_after_seconds - now
            if self.is_wanted() and (left > 0 or doubts.is_last_attempt_due()):
                pause = self.rng() * min(MAX_SECONDS, BASE_SECONDS * 2.0 ** min(attempt, 30))
                self.sleep(max(0.0, min(pause, left)))
                continue
            lack = "no success" if is_of_a_disk(failure) else "no answer"
            raise Unreachable(
                f"{what}: {lack} for {duration(now - first_failure)}, the last of {attempt + 1} attempts failed with "
                f"{reason}; {remedy(failure)}, or raise "
                f"storage.give_up_after_seconds={self.give_up_after_seconds:g}"
            ) from failure
        raise AssertionError("unreachable")


class _Doubts:
    """Whether the failures of one read are those of its object alone."""

    def __init__(self, others: Callable[[], Iterable[Probe]]) -> None:
        self._others = others
        self._probes: Sequence[Probe] | None = None
        self._next, self._failures, self._answers, self._is_throttled = 0, 0, 0, False

    def reason(self, failure: Exception, what: str) -> str:
        """Return why the read failed, if waiting may help; else raise the error that stands for it."""
        try:
            reason = judge(failure, what)
        except (DeniedObject, ArchivedObject) as refusal:
            self._raise_if_certain(refusal)
            return str(refusal)
        if is_throttling(failure):
            self._failures, self._answers, self._is_throttled = 0, 0, True
            return reason
        self._failures += 1
        if self._answers >= LONE_ANSWERS:
            raise FailingObject(
                f"{what}: all of its last {self._failures} requests failed, the last with {reason}, while the store "
                "answered for other objects; upload it again or remove it"
            ) from failure
        if self._failures >= LONE_FAILURES:
            self._answers = self._answers + 1 if self._does_another_answer() else 0
        return reason

    def is_last_attempt_due(self) -> bool:
        """Return True once, at the limit of time, if another object can be read: a last failure is then the object's.

        A short limit would otherwise end a run because of one object. False if the read was ever throttled.
        """
        if self._is_throttled or self._answers >= LONE_ANSWERS or not self._does_another_answer():
            return False
        self._answers = LONE_ANSWERS
        return True

    def _raise_if_certain(self, refusal: DataError) -> None:
        """Raise the refusal as that of one object or as that of the store; return if neither is certain."""
        answers = set()
        for probe in self._others():
            answers.add(_answer_of(probe))
            if _Answer.READ in answers:
                WATCH.answered("another object")
                raise refusal
        if _Answer.FAILED not in answers:
            raise DataError(str(refusal)) from refusal

    def _does_another_answer(self) -> bool:
        """Read other objects, another one first each time, until one of a few is read."""
        if self._probes is None:
            self._probes = list(self._others())
        for _ in range(min(len(self._probes), _OTHERS_PER_TURN)):
            probe = self._probes[self._next % len(self._probes)]
            self._next += 1
            if _answer_of(probe) is _Answer.READ:
                WATCH.answered("another object")
                return True
        return False


def _answer_of(probe: Probe) -> _Answer:
    """Read one byte of another object. Raises DataError for credentials or a bucket that no retry mends."""
    try:
        probe()
    except RETRIED as error:
        try:
            judge(error, "another object")
        except ChangedObject:  # it is empty now
            return _Answer.READ
        except (OSError, DeniedObject, ArchivedObject, MissingObject):
            return _Answer.REFUSED
        return _Answer.FAILED
    return _Answer.READ


def duration(seconds: float) -> str:
    """Return a time for a sentence: `42 s`, from two minutes on `15 minutes`."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


def shortened(reason: str) -> str:
    """Return a reason in a length that fits into a line with other words."""
    return reason[:_REASON_LENGTH]
