"""Drivers that want one lease, on a simulated clock, with a store that delays and loses requests and answers."""

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dinoray.pipeline.storage.lease import (
    Failed,
    Found,
    Holder,
    Lease,
    Read,
    Record,
    Reply,
    Request,
    State,
    Written,
)

TIMEOUT_SECONDS = 10.0
"""After which a driver takes a request for unanswered; it may be carried out later."""
_MAX_EVENTS = 50_000


def holder(name: str) -> Holder:
    """A driver on a machine of its own."""
    return Holder(id=name, host=name, pid=1, machine="", started="", job="", since=0.0)


class Fate(NamedTuple):
    """What becomes of one request."""

    request_seconds: float = 0.0
    """Until it is carried out."""
    answer_seconds: float = 0.0
    """From then until its answer arrives."""
    is_lost: bool = False
    """It is never carried out."""
    is_answer_lost: bool = False


class Life(NamedTuple):
    """One driver: when it starts and how it ends, in seconds; how fast its clock is; when it is stopped for a while."""

    starts: float = 0.0
    ends: float = 1e9
    gives_back: bool = False
    """At its end, in place of being killed."""
    rate: float = 1.0
    sleeps: float = 1e9
    wakes: float = 1e9
    faults: tuple[Fate, ...] = ()
    """Of its first requests."""
    cut_off: float = 1e9
    """From when on the store gets none of its requests."""


class Store:
    """A record that is replaced by conditional writes."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.version = 0

    @property
    def token(self) -> str | None:
        return str(self.version) if self.record else None

    def perform(self, request: Request) -> Reply:
        """Carry a request out."""
        if isinstance(request, Read):
            return Found(self.record, self.token)
        if request.token != self.token:
            return Failed.CONFLICT
        self.record, self.version = request.record, self.version + 1
        return Written(str(self.version))


@dataclass
class Driver:
    """A driver in the simulation. It takes the lease as soon as it is free."""

    name: str
    life: Life
    lease: Lease
    is_alive: bool = True
    awaited: int | None = None
    """The request whose reply it waits for."""
    num_requests: int = 0

    def clock(self, now: float) -> float:
        """What its own clock shows."""
        return 1000.0 * len(self.name) + self.life.rate * now

    def is_valid(self, now: float) -> bool:
        """Whether it may think at `now` that it alone holds the lease."""
        return self.is_alive and self.lease.is_valid(self.clock(now))


class Simulation:
    """Runs drivers to `ends`, and calls `check(now)` after each event."""

    def __init__(
        self,
        lives: list[Life],
        fates: Iterator[Fate],
        *,
        same_machine: bool = False,
        store: Store | None = None,
    ) -> None:
        self.store, self._fates = store or Store(), fates
        self.drivers = [self._driver(f"{'d' * (i + 1)}", life, same_machine) for i, life in enumerate(lives)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        for driver in self.drivers:
            self._at(driver.life.starts, lambda now, one=driver: self._step(one, now))
            self._at(driver.life.ends, lambda now, one=driver: self._end(one, now))

    def run(self, ends: float, check: Callable[[float], None] = lambda now: None) -> None:
        """Let time pass up to `ends`."""
        while self._events and self._events[0][0] <= ends:
            now, number, event = heapq.heappop(self._events)
            assert number < _MAX_EVENTS, "it does not come to an end"
            event(now)
            check(now)

    def holders(self, now: float) -> list[str]:
        """Names of the drivers that may think that they hold the lease."""
        return [driver.name for driver in self.drivers if driver.is_valid(now)]

    def _driver(self, name: str, life: Life, same_machine: bool) -> Driver:
        def is_gone(other: Holder) -> bool | None:
            return not self._of(other).is_alive if same_machine else None

        return Driver(name, life, Lease(holder(name), is_gone=is_gone))

    def _of(self, other: Holder) -> Driver:
        return next(driver for driver in self.drivers if driver.name == other.id)

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _step(self, driver: Driver, now: float) -> None:
        """Have a driver send the request that is due, if it awaits no reply."""
        if not driver.is_alive or driver.awaited is not None:
            return
        if driver.life.sleeps <= now < driver.life.wakes:
            self._at(driver.life.wakes, lambda then: self._step(driver, then))
            return
        if driver.lease.state is State.FREE:
            driver.lease.take()
        request = driver.lease.request(driver.clock(now))
        if request is not None:
            self._send(driver, request, now)
        elif driver.lease.state in (State.WATCHING, State.TAKING, State.HELD, State.GIVING):
            pause = (driver.lease.due - driver.clock(now)) / driver.life.rate
            self._at(now + max(pause, 1e-3), lambda then: self._step(driver, then))

    def _send(self, driver: Driver, request: Request, now: float) -> None:
        number = driver.awaited = next(self._order)
        fate = self._fate_of(driver, now)

        def receive(reply: Reply, then: float) -> None:
            if driver.awaited != number or not driver.is_alive:
                return
            if driver.life.sleeps <= then < driver.life.wakes:
                self._at(driver.life.wakes, lambda later: receive(reply, later))
                return
            driver.awaited = None
            driver.lease.answer(reply, now=driver.clock(then))
            self._step(driver, then)

        def carry_out(then: float) -> None:
            reply = self.store.perform(request)
            if not fate.is_answer_lost:
                self._at(then + fate.answer_seconds, lambda later: receive(reply, later))

        if not fate.is_lost:
            self._at(now + fate.request_seconds, carry_out)
        self._at(now + TIMEOUT_SECONDS, lambda then: receive(Failed.NO_ANSWER, then))

    def _fate_of(self, driver: Driver, now: float) -> Fate:
        driver.num_requests += 1
        if now >= driver.life.cut_off:
            return Fate(is_lost=True)
        own = driver.life.faults[driver.num_requests - 1 : driver.num_requests]
        return own[0] if own else next(self._fates)

    def _end(self, driver: Driver, now: float) -> None:
        if driver.life.gives_back and driver.awaited is not None:
            self._at(now + 0.1, lambda then: self._end(driver, then))
            return
        if driver.life.gives_back and driver.is_alive:
            driver.lease.give_back()
            if driver.lease.state is State.GIVING:
                self._step(driver, now)
                return
        driver.is_alive = False
