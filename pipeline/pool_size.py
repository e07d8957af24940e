"""How many augment actors there should be: up when the trainer waits for data, down when actors have nothing to do.

Pure: readings in, a number out; no Ray here (pipeline/pool.py brings the two together). Ray Data's own signal, how
many blocks lie queued at the pool, knows nothing of the trainer: while buffers fill it asks for every actor allowed,
and lets them go once they are full. The share of time that the trainer waits is what a missing actor costs.
"""

import math
from dataclasses import dataclass, field

STARVED = 0.05
"""Share of time spent waiting for data from which on there are too few actors."""
FED = 0.02
"""Share below which there may be too many."""
_HEADROOM = 1.25
"""Actors that are kept for each one that is busy."""
_MOST_GROWTH = 4
"""Times that the pool may grow at once: from one reading, far away, the way is only guessed."""
_LEAST_GAIN = 0.25
"""Share of what more actors should have brought, below which they are no remedy: the network or the disk is full."""


@dataclass(frozen=True)
class Actors:
    """What there is of the pool at one moment."""

    running: int
    pending: int
    active: int
    """Those of the running ones that have something to do."""


@dataclass(frozen=True)
class Reading:
    """What the trainer measured since the reading before."""

    data_wait: float
    """Share of time, 0 to 1, that it waited for data."""
    images_per_second: float


@dataclass
class PoolSize:
    """The number of actors to have, within [low, high]. All times in seconds of one monotonic clock.

    Up: with R actors the trainer works 1 - w of the time, so it takes R / (1 - w) for it to work all the time.
    Decided on readings alone that began when all actors asked for were up. Down: after `cool_down_seconds` in which
    the trainer never waited, to what was busy then and some headroom. So sizes come in steps and do not swing.
    """

    low: int
    high: int
    target: int
    cool_down_seconds: float
    note: str | None = field(default=None, init=False)
    """What a person should hear of the latest decision."""
    _seen: Actors = field(default=Actors(0, 0, 0), init=False)
    _settled_at: float | None = field(default=None, init=False)
    _changed_at: float = field(default=-math.inf, init=False)
    _read_at: float | None = field(default=None, init=False)
    _fed_since: float | None = field(default=None, init=False)
    _busy: list[float] = field(default_factory=list, init=False)
    _grown_from: tuple[int, float] | None = field(default=None, init=False)
    _is_stuck: bool = field(default=False, init=False)

    def see(self, actors: Actors, now: float) -> None:
        """The pool as it is; called every second or so."""
        self._seen = actors
        if actors.pending or actors.running < self.target:
            self._settled_at = None
        elif self._settled_at is None:
            self._settled_at = now
        if actors.running:
            self._busy.append(actors.active / actors.running)

    def heed(self, reading: Reading, now: float) -> None:
        """Decide on a reading, which covers the time since the last one."""
        self.note = None
        began, self._read_at = self._read_at, now
        if began is None or began < self._changed_at:
            return
        if reading.data_wait >= STARVED:
            self._fed_since = None
            if self._settled_at is not None and began >= self._settled_at:
                self._grow(reading, now)
        elif reading.data_wait > FED:
            self._fed_since = None
        else:
            self._is_stuck, self._grown_from = False, None
            if self._fed_since is None:
                self._fed_since, self._busy = now, []
            elif now - self._fed_since >= self.cool_down_seconds and self._busy:
                self._shrink(now)

    def _grow(self, reading: Reading, now: float) -> None:
        running = self._seen.running
        if self._grown_from is not None and not self._is_stuck:
            before, images_per_second = self._grown_from
            hoped = running / before - 1
            gain = reading.images_per_second / max(images_per_second, 1e-9) - 1
            if hoped > 0 and gain < _LEAST_GAIN * hoped:
                self._is_stuck = True
                self.note = (
                    f"{running} augment actors instead of {before} brought {gain:+.0%} images/s: it is not "
                    "CPUs that are short; look at the network of the train nodes and at the storage"
                )
        if self._is_stuck:
            return
        share = max(1 - reading.data_wait, 1 / _MOST_GROWTH)
        self._change(min(self.high, math.ceil(running / share)), now)
        self._grown_from = (running, reading.images_per_second)

    def _shrink(self, now: float) -> None:
        busy = sum(self._busy) / len(self._busy)
        needed = max(self.low, math.ceil(self._seen.running * busy * _HEADROOM))
        self._change(min(self.target, needed), now)
        self._fed_since, self._busy = now, []

    def _change(self, target: int, now: float) -> None:
        if target != self.target:
            self.target, self._changed_at, self._settled_at = target, now, None
