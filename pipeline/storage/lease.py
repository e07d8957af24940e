"""Who may write into a run directory: a lease that one driver holds, renews, and gives back or loses.

    watching -> free -> taking -> held -> giving -> given back
       |                  |         |
       +---> refused <----+         +---> lost

The record of the lease is replaced only by a conditional write: it succeeds if the record is still the one that was
read. A holder renews it every few seconds. Whoever wants the lease watches the record: one renewal shows that the
holder lives, and a record that has not changed for a whole term is free. Each process measures time with its own
clock, and only between events that it has seen itself, so the clocks of two machines are never compared. A holder's
term begins when it sends a renewal, a watcher's when it has seen it: so the first ends before the second.

Pure logic: `request` returns the next request to the store, `answer` takes its reply. No threads, no clock and no
storage here.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import NamedTuple

from dinoray.models.errors import ResourceError


class Timing(NamedTuple):
    """Times of a lease, in seconds."""

    term: float = 30.0
    """How long a holder keeps the lease after the last renewal that succeeded."""
    margin: float = 2.0
    """How much longer a watcher waits: two clocks may differ by 3 % in rate."""
    renew: float = 4.0
    """Between two renewals."""
    poll: float = 1.0
    """Between two reads of a watcher, and before a renewal that failed is sent again."""


TIMING = Timing()


class InUseError(ResourceError):
    """Another driver holds the lease."""


class LostLeaseError(ResourceError):
    """Another driver has taken the lease over: nothing more may be written into the directory."""


@dataclass(frozen=True)
class Holder:
    """A driver: `id` differs for each lease that was ever taken, the rest is for people and for `is_gone`."""

    id: str
    host: str
    pid: int
    machine: str
    """What processes that can see each other's pids have in common; empty if unknown."""
    started: str
    """When the process was started, in the kernel's own unit: the next process with this pid has another."""
    job: str
    """The submitted job; empty for none."""
    since: float
    """When the lease was taken, in seconds since 1970; only printed."""

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid}" + (f" (job {self.job})" if self.job else "")

    @property
    def taken(self) -> str:
        """When the lease was taken, for people."""
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))


@dataclass(frozen=True)
class Record:
    """Content of the record in the store."""

    holder: Holder
    renewals: int = 0
    is_given_back: bool = False

    def encode(self) -> bytes:
        """Return the record as JSON."""
        return json.dumps(asdict(self), indent=1).encode()

    @staticmethod
    def decode(data: bytes) -> "Record | None":
        """Return the record; None for bytes that are none: they are being written, or their writer was killed."""
        try:
            tree = json.loads(data)
            return Record(Holder(**tree["holder"]), int(tree["renewals"]), bool(tree["is_given_back"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None


class Read(NamedTuple):
    """Request: read the record."""


class Write(NamedTuple):
    """Request: write the record if the store still has what `token` stands for; None: if it has none."""

    record: Record
    token: str | None


class Found(NamedTuple):
    """Reply to Read: the record, or None if it is unreadable; and its token, or None if there is no record."""

    record: Record | None
    token: str | None


class Written(NamedTuple):
    """Reply to Write: the record was written and has this token."""

    token: str


class Failed(Enum):
    """Reply to a request that did not succeed."""

    CONFLICT = "the record is another one"
    NO_ANSWER = "the request may have been carried out, now or later, or not"


Request = Read | Write
Reply = Found | Written | Failed


class State(Enum):
    """Where a Lease is in the diagram above."""

    WATCHING, FREE, TAKING, HELD, GIVING = "watching", "free", "taking", "held", "giving"
    REFUSED, LOST, GIVEN_BACK = "refused", "lost", "given back"


class Lease:
    """One driver's way to a lease and through it. All times are of that driver's clock, in seconds."""

    def __init__(
        self, me: Holder, *, is_gone: Callable[[Holder], bool | None], timing: Timing = TIMING
    ) -> None:
        """`is_gone`: True if the process of a holder has ended, False if it lives, None if that cannot be known."""
        self._me, self._is_gone = me, is_gone
        self._timing = timing
        self.state = State.WATCHING
        self.other: Record | None = None
        """The record of another driver that was seen last."""
        self.valid_until = float("-inf")
        """Until when nobody else can hold the lease."""
        self.due = float("-inf")
        """When the next request is due."""
        self._token: str | None = None
        self._seen_at: float | None = None
        self._record = Record(me)
        self._sent_at: float | None = None
        """When `_record` was first sent, until it is known to be written."""
        self._is_unsure = False
        """Whether the record must be read before the next write."""

    @property
    def free_at(self) -> float | None:
        """When the lease of another driver ends that is being watched, unless it is renewed."""
        return None if self._seen_at is None else self._seen_at + self._timing.term + self._timing.margin

    @property
    def record(self) -> Record:
        """The record that was written last, or is to be written."""
        return self._record

    def is_valid(self, now: float) -> bool:
        """Return True if nobody else can hold the lease at `now`."""
        return self.state is State.HELD and now < self.valid_until

    def take(self) -> None:
        """Begin to take the lease, which is free."""
        assert self.state is State.FREE
        self.state, self.due = State.TAKING, float("-inf")

    def give_back(self) -> None:
        """Begin to give the lease back."""
        if self.state is State.HELD:
            self.state, self.due = State.GIVING, float("-inf")
            self._record = replace(self._record, is_given_back=True)
            self._sent_at = None

    def request(self, now: float) -> Request | None:
        """Return the request that is to be sent now; None if none is due, before `due` or at an end."""
        if now < self.due or self.state not in (State.WATCHING, State.TAKING, State.HELD, State.GIVING):
            return None
        if self.state is State.WATCHING or self._is_unsure:
            return Read()
        if self._sent_at is None:
            self._sent_at = now
            if self.state is State.HELD:
                self._record = replace(self._record, renewals=self._record.renewals + 1)
        return Write(self._record, self._token)

    def answer(self, reply: Reply, *, now: float) -> None:
        """Take the reply to the last request, which arrived at `now`."""
        if self.state is State.WATCHING:
            self._watch(reply, now)
        elif isinstance(reply, Written):
            self._confirm(reply.token)
        elif isinstance(reply, Failed):
            # After no answer, a taker reads what has become of it; a holder sends the same renewal again.
            self._is_unsure |= reply is Failed.CONFLICT or self.state is not State.HELD
            self.due = now if reply is Failed.CONFLICT else now + self._timing.poll
        else:
            self._compare(reply, now)

    def _watch(self, reply: Reply, now: float) -> None:
        self.due = now + self._timing.poll
        if not isinstance(reply, Found):
            return
        record, token = reply
        self.other = record or self.other
        gone = self._is_gone(record.holder) if record else None
        is_over = self.free_at is not None and now > self.free_at
        if token is None or gone or (record and record.is_given_back):
            self._token, self.state = token, State.FREE
        elif gone is False or (self._seen_at is not None and token != self._token):
            self.state = State.REFUSED
        elif self._seen_at is None:
            self._token, self._seen_at = token, now
        elif is_over:
            self.state = State.FREE

    def _confirm(self, token: str) -> None:
        """Note that `_record` has been written."""
        assert self._sent_at is not None
        self._token, self._is_unsure = token, False
        if self.state is State.GIVING:
            self.state = State.GIVEN_BACK
            return
        self.state = State.HELD
        # It may have been written as soon as it was first sent.
        self.valid_until = self._sent_at + self._timing.term
        self.due = self._sent_at + self._timing.renew
        self._sent_at = None

    def _compare(self, found: Found, now: float) -> None:
        """Note what has become of a write."""
        record, token = found
        self.due = now
        if record is not None and record.holder.id == self._me.id:
            if record == self._record and self._sent_at is not None:
                assert token is not None
                self._confirm(token)
            else:
                self._token, self._is_unsure = token, False
        elif token is None or (token == self._token and self.state is State.TAKING):
            # It is as it was, or a person has deleted it.
            self._token, self._is_unsure = token, False
        elif record is None and self.state is not State.TAKING:
            self.due = now + self._timing.poll  # another is writing it, and may be killed before it is whole
        else:
            self.other = record
            ends = {State.TAKING: State.REFUSED, State.HELD: State.LOST, State.GIVING: State.GIVEN_BACK}
            self.state = ends[self.state]
