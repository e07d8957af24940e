"""Hold the lease of a run directory: wait until it is free, take it, renew it in a thread, give it back.

The driver of a run or study has the LeaseKeeper. Other processes that write for it have a Fence, which reads the
record. No Ray here.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.files import Directory, Unreachable
from dinoray.pipeline.storage.lease import (
    TIMING,
    Failed,
    Found,
    Holder,
    InUseError,
    Lease,
    LostLeaseError,
    Read,
    Record,
    State,
    Timing,
)
from dinoray.pipeline.storage.lease_store import LeaseStore, lease_store

logger = logging.getLogger(__name__)

_GIVE_BACK_SECONDS = 10.0
"""Longest time for which a driver that ends tries to give the lease back."""
_LOOK_SECONDS = 3 * TIMING.renew
"""How long the record is watched for a renewal, for people."""

_held: set[str] = set()
"""Ids of the leases that this process holds."""


def clock() -> float:
    """Return seconds since some moment; the time for which the machine sleeps counts where the kernel counts it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def this_process(job: str = "") -> Holder:
    """Return a holder with a new id that stands for this process; `job`: what it was submitted as."""
    return Holder(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=process_started(os.getpid()) or "",
        job=job,
        since=time.time(),
    )


def is_gone(holder: Holder) -> bool | None:
    """Return True if the process of a holder has ended, False if it lives, None if it is not of this machine."""
    if not holder.machine or holder.machine != _machine():
        return None
    if holder.pid == os.getpid() and holder.started == process_started(holder.pid):
        return holder.id not in _held
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, whose start /proc may hide
        pass
    return process_started(holder.pid) not in (None, holder.started)


def _machine() -> str:
    """Return what processes have in common whose pids mean the same; empty where the kernel does not tell it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process_started(pid: int) -> str | None:
    """Return when a process was started, in ticks since the boot; "ended" for one that is not yet reaped; None if the
    kernel does not tell it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Fence:
    """What may write into `directory` as long as the lease `id` is there; picklable."""

    directory: Directory
    id: str

    def check(self, *, is_strict: bool = False) -> None:
        """Raise LostLeaseError if another driver has taken the lease, or this one has given it back.

        A storage that does not answer is no reason: what is to be written would fail too. Unless `is_strict`: then it
        raises Unreachable after one attempt, because the storage may answer again at that moment.
        """
        try:
            reply = lease_store(self.directory).perform(Read(), attempts=1 if is_strict else 2)
        except Unreachable:
            if is_strict:
                raise
            return
        except DataError:
            return
        record = reply.record if isinstance(reply, Found) else None
        if record is not None and record.holder.id != self.id:
            raise _lost(self.directory, record)
        if record is not None and record.is_given_back:
            raise LostLeaseError(
                f"{self.directory.uri}: this run has ended; run the same command to resume it"
            )


class LeaseKeeper:
    """The lease of one directory. `await_free`, then `with keeper:` holds it; the keeper is used once."""

    def __init__(
        self,
        directory: Directory,
        *,
        tell: Callable[[str], object],
        job: str = "",
        timing: Timing = TIMING,
    ) -> None:
        """`tell` prints a line for the user."""
        self.directory, self._tell = directory, tell
        self._me = this_process(job)
        self.fence = Fence(directory, self._me.id)
        self._store: LeaseStore = lease_store(directory)
        self._lease = Lease(self._me, is_gone=is_gone, timing=timing)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def await_free(self) -> None:
        """Return once nobody holds the lease; nothing is written.

        Raises InUseError as soon as its holder is known to live, and DataError if the storage cannot be read.
        """
        self._step()
        if self._lease.state is State.WATCHING and self._lease.free_at is not None:
            self._tell(self._waiting(self._lease.free_at - clock()))
        while self._lease.state is State.WATCHING:
            self._pause()
            self._step()
        self._raise_if_refused()

    @property
    def is_sure(self) -> bool:
        """Whether the renewals exclude that another driver holds the lease by now."""
        return self._lease.is_valid(clock())

    def check(self) -> None:
        """Raise LostLeaseError if a renewal has shown that another driver has taken the lease over; sends nothing."""
        if self._lease.state is State.LOST:
            assert self._lease.other is not None
            raise _lost(self.directory, self._lease.other)

    def __enter__(self) -> "LeaseKeeper":
        """Take the lease. Raises InUseError if another driver was first, and DataError."""
        if self._lease.state is State.WATCHING:
            self.await_free()
        self._lease.take()
        while self._lease.state is State.TAKING:
            self._step()
        self._raise_if_refused()
        _held.add(self._me.id)
        try:
            if not self._store.is_conditional(self._lease.record):
                self._tell(
                    f"warning: the storage of {self.directory.uri} has no conditional writes: two drivers that are "
                    "started at once are not kept apart there"
                )
        except BaseException:
            _held.discard(self._me.id)
            self._give_back()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> Literal[False]:
        """Give the lease back."""
        self._ends.set()
        self._thread.join(_GIVE_BACK_SECONDS)
        _held.discard(self._me.id)
        if not self._thread.is_alive():  # else a renewal hangs, and the lease ends by itself
            self._give_back()
        return False

    def _renew(self) -> None:
        while self._lease.state is State.HELD and not self._ends.is_set():
            # Without an answer the run goes on: its own reads and writes wait or fail as they are configured to.
            self._try()
            self._ends.wait(max(0.0, self._lease.due - clock()))

    def _give_back(self) -> None:
        deadline = clock() + _GIVE_BACK_SECONDS
        self._lease.give_back()
        while self._lease.state is State.GIVING and clock() < deadline:
            self._try()
            if self._lease.state is State.GIVING:
                self._pause()

    def _try(self) -> None:
        """Do one step in a single attempt; any failure is no answer."""
        try:
            self._step(attempts=1)
        except Exception as failure:
            logger.debug("%s: no answer about its lease: %s", self.directory.uri, failure)
            self._lease.answer(Failed.NO_ANSWER, now=clock())

    def _step(self, *, attempts: int = 5) -> None:
        """Send the request that is due, if any, and take its reply."""
        request = self._lease.request(clock())
        if request is not None:
            self._lease.answer(self._store.perform(request, attempts=attempts), now=clock())

    def _pause(self) -> None:
        time.sleep(max(0.0, self._lease.due - clock()))

    def _raise_if_refused(self) -> None:
        if self._lease.state is State.REFUSED:
            raise InUseError(
                f"{self.directory.uri} is in use by {self._whose()}; stop that one, or wait until it ends"
            )

    def _waiting(self, seconds: float) -> str:
        until = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
        return (
            f"{self.directory.uri} is held by {self._whose()}, which may have ended: waiting for its lease to be "
            f"renewed or to end, until {until} at the latest"
        )

    def _whose(self) -> str:
        if self._lease.other is None:
            return "another driver"
        holder = self._lease.other.holder
        return f"{holder} since {holder.taken}"


def look(directory: Directory) -> tuple[Holder, bool] | None:
    """Return who holds the lease of a directory, or was the last to, and whether that driver is known to live.

    None if the lease is free. Watches the record for some seconds. Raises DataError.
    """
    lease = Lease(this_process(), is_gone=is_gone)
    deadline = clock() + _LOOK_SECONDS
    while lease.state is State.WATCHING and clock() < deadline:
        request = lease.request(clock())
        if request is not None:
            lease.answer(lease_store(directory).perform(request), now=clock())
        if lease.state is State.WATCHING:
            time.sleep(max(0.0, lease.due - clock()))
    if lease.state is State.FREE or lease.other is None:
        return None
    return lease.other.holder, lease.state is State.REFUSED


def _lost(directory: Directory, other: Record) -> LostLeaseError:
    return LostLeaseError(
        f"{directory.uri} was taken over by {other.holder} at {other.holder.taken}, because this driver could not "
        f"renew its lease for {TIMING.term:.0f} s; leave it to that one, or stop that one and run the same command "
        "again"
    )
