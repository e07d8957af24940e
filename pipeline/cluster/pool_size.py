"""How many augment actors there should be: up when the trainer waits for data, down when actors have nothing to do.

Pure: readings in, a number out; no Ray here (cluster/pool_control.py brings the two together). Ray Data's own signal,
how many blocks lie queued at the pool, knows nothing of the trainer: while buffers fill it asks for every actor
allowed, and lets them go once they are full. The share of time that the trainer waits is what a missing actor costs.
"""

import math
from dataclasses import dataclass, field

STARVED = 0.05
"""Share of time spent waiting for data from which on there are too few actors."""
FED = 0.03
"""Share below which there may be too many."""
_LOOK_SECONDS = 10.0
"""Time to look at before a decision: crops come in blocks, and between two blocks a trainer waits or has plenty."""
_JUDGE_SECONDS = 30.0
"""The same after growth, which is judged by what it brought."""
_LOOKS = 2
"""As many must find that growth brought too little, or that all actors are too few: the first may be of a start."""
_LONG_AGO = 10
"""Cool-downs in a row without waiting after which a size that starved may be tried again."""
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


@dataclass(frozen=True)
class Reading:
    """What the trainer did in some time; readings add up to that of a longer time."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    """Of those, how long it waited for data."""
    images: float = 0.0
    """Over all workers."""
    busy_seconds: float = 0.0
    """How long those images kept actors busy, one actor a second each."""

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(
            self.seconds + other.seconds,
            self.wait_seconds + other.wait_seconds,
            self.images + other.images,
            self.busy_seconds + other.busy_seconds,
        )

    @property
    def data_wait(self) -> float:
        """Share of the time, 0 to 1."""
        return self.wait_seconds / self.seconds

    @property
    def images_per_second(self) -> float:
        """Over all workers."""
        return self.images / self.seconds

    @property
    def busy_actors(self) -> float:
        """As many actors as are kept busy all the time by what the trainer takes."""
        return self.busy_seconds / self.seconds


@dataclass
class PoolSize:
    """The number of actors to have, within [low, high]. All times in seconds of one monotonic clock.

    Up: with R actors the trainer works 1 - w of the time, so it takes R / (1 - w) for it to work all the time.
    Decided on readings alone that began when all actors asked for were up. Down: after `cool_down_seconds` in which
    the trainer never waited, to as many as it kept busy and some headroom. So sizes come in steps and do not swing.
    """

    low: int
    high: int
    target: int
    cool_down_seconds: float
    note: str | None = field(default=None, init=False)
    """What a person should hear of the latest decision."""
    _seen: Actors = field(default=Actors(0, 0), init=False)
    _settled_at: float | None = field(default=None, init=False)
    _changed_at: float = field(default=-math.inf, init=False)
    _reading: Reading = field(default=Reading(), init=False)
    _began: float | None = field(default=None, init=False)
    _fed: Reading = field(default=Reading(), init=False)
    _grown_from: tuple[int, float] | None = field(default=None, init=False)
    _in_vain: int = field(default=0, init=False)
    """Looks in a row at what the last growth brought that found too little."""
    _at_most: int = field(default=0, init=False)
    """Looks that found the trainer starved by all the actors there may be."""
    _too_few: int = field(default=0, init=False)
    """A size that starved, not long ago: shrinking to it would only bring growth again."""
    _calm: int = field(default=0, init=False)

    def see(self, actors: Actors, now: float) -> None:
        """The pool as it is; called every second or so."""
        self._seen = actors
        if actors.pending or actors.running < self.target:
            self._settled_at = None
        elif self._settled_at is None:
            self._settled_at = now

    def heed(self, reading: Reading, now: float) -> None:
        """Decide on what was read since the last decision, `reading` being the latest of it."""
        self.note = None
        if self._began is None or self._began < max(self._changed_at, self._settled_at or -math.inf):
            self._began, self._reading = now, Reading()  # it was of another size
            return
        self._reading += reading
        if self._reading.seconds < (_LOOK_SECONDS if self._grown_from is None else _JUDGE_SECONDS):
            return
        self._began, reading, self._reading = now, self._reading, Reading()
        if reading.data_wait >= STARVED:
            self._fed = Reading()
            if self._settled_at is not None:
                self._grow(reading, now)
        elif reading.data_wait > FED:
            self._fed = Reading()
            if not self._in_vain:
                self._grown_from = None  # it brought what it should
        else:
            self._in_vain, self._grown_from = 0, None
            if self._at_most < _LOOKS:  # beyond, it was told, which is once
                self._at_most = 0
            self._fed += reading
            if self._fed.seconds >= self.cool_down_seconds:
                self._shrink(now)

    def _grow(self, reading: Reading, now: float) -> None:
        running = self._seen.running
        self._too_few, self._calm = max(self._too_few, running), 0
        if self._grown_from is not None and running > self._grown_from[0]:
            before, images_per_second = self._grown_from
            hoped, gain = running / before - 1, reading.images_per_second / max(images_per_second, 1e-9) - 1
            self._in_vain = self._in_vain + 1 if gain < _LEAST_GAIN * hoped else 0
            if self._in_vain == _LOOKS:
                # Not taken back: crops of the new actors may be under way for longer than this was looked at.
                self.note = (
                    f"{running} augment actors instead of {before} brought {gain:+.0%} images/s: it is not "
                    "CPUs that are short; look at the network of the train nodes and at the storage, and lower "
                    "resources.augment_actors to save what they cost"
                )
            if self._in_vain:
                return
        if running >= self.high:
            self._at_most += 1
            if self._at_most == _LOOKS:
                self.note = (
                    f"training waits for data {reading.data_wait:.0%} of the time with all {running} augment actors "
                    "there may be: raise resources.augment_actors, with CPUs for them, or make images smaller once "
                    "with jobs.pack --shrink"
                )
        share = max(1 - reading.data_wait, 1 / _MOST_GROWTH)
        self._change(min(self.high, math.ceil(running / share)), now)
        self._grown_from = (running, reading.images_per_second)

    def _shrink(self, now: float) -> None:
        self._calm += 1
        if self._calm > _LONG_AGO:
            self._too_few = 0
        needed = max(self.low, math.ceil(self._fed.busy_actors * _HEADROOM), self._too_few + 1)
        self._change(min(self.target, needed), now)
        self._fed = Reading()

    def _change(self, target: int, now: float) -> None:
        if target != self.target:
            self.target, self._changed_at, self._settled_at = target, now, None
