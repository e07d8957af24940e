"""Choose the number of augment actors: scale up when the trainer waits for data, down when actors are idle.

Pure: readings in, a number out; no Ray here (cluster/pool_control.py applies the number). Ray Data's own
signal, the number of blocks queued at the pool, does not depend on the trainer. It requests every allowed
actor while buffers fill and releases the actors once buffers are full. The trainer's data wait measures the
cost of a missing actor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dinoray.models.commands import command

STARVED = 0.05
"""Data wait, as a share of time, at and above which there are too few actors."""
FED = 0.03
"""Data wait at and below which there may be too many actors."""
_LOOK_SECONDS = 10.0
"""Length of the readings before a decision. Crops arrive in blocks, so data wait varies between blocks."""
_JUDGE_SECONDS = 30.0
"""Length of the readings after scaling up, before its effect is judged."""
_LOOKS = 2
"""Decisions in a row before a note that scaling up did not help, or that the maximum is too small.

One is not enough: its readings may include a start.
"""
_LONG_AGO = 10
"""Cool-downs in a row without data wait, after which a size that was too small may be tried again."""
_HEADROOM = 1.25
"""Actors kept per busy actor."""
_MOST_GROWTH = 4
"""Largest factor of one scale-up: an extrapolation further than this from one reading is a guess."""
_UNEVEN = 1.15
"""How much faster an image must be on the actors of one stream than on those of another before actors are moved."""
_LEAST_GAIN = 0.25
"""Share of the expected gain of a scale-up. A smaller gain means another bottleneck: the network or the
disk."""


@dataclass(frozen=True)
class Actors:
    """Numbers of running and pending actors of the pool at one moment."""

    running: int
    pending: int


@dataclass(frozen=True)
class TrainerReading:
    """Totals of the trainer over a period. The sum of two readings is the reading of both periods."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    """The part of `seconds` that the trainer waited for data."""
    images: float = 0.0
    """Images consumed by all workers."""
    busy_seconds: float = 0.0
    """Time that actors were busy with these images, in actor-seconds."""

    def __add__(self, other: "TrainerReading") -> "TrainerReading":
        return TrainerReading(
            self.seconds + other.seconds,
            self.wait_seconds + other.wait_seconds,
            self.images + other.images,
            self.busy_seconds + other.busy_seconds,
        )

    @property
    def data_wait(self) -> float:
        """Share of the period that the trainer waited for data, 0 to 1."""
        return self.wait_seconds / self.seconds

    @property
    def images_per_second(self) -> float:
        """Throughput of all workers."""
        return self.images / self.seconds

    @property
    def busy_actors(self) -> float:
        """Number of fully busy actors that the trainer's throughput corresponds to."""
        return self.busy_seconds / self.seconds


def share_actors(total: int, work: Sequence[float]) -> list[int]:
    """Divide `total` actors among pools in proportion to their `work`, at least one for each; any unit of work.

    Each next actor goes to the pool with the most work per actor, since the slowest pool limits all. So no pool
    loses an actor when the total grows.
    """
    shares = [1] * len(work)
    for _ in range(total - len(work)):
        shares[max(range(len(work)), key=lambda pool: work[pool] / shares[pool])] += 1
    return shares


def divide_work(
    known: Sequence[float], ranks: Sequence[int], cpu_ms: Mapping[int, float]
) -> tuple[float, ...]:
    """Return the work of each stream's pool, in proportion: that of its `ranks` by the `cpu_ms` of its images.

    That is `known`, unless all streams have a time and theirs differ clearly from those behind it.
    """
    if len(cpu_ms) < len(ranks):
        return tuple(known)
    found = tuple(number * cpu_ms[stream] for stream, number in enumerate(ranks))
    changes = [new / old for new, old in zip(found, known, strict=True)]
    return found if max(changes) > _UNEVEN * min(changes) else tuple(known)


@dataclass
class PoolSize:
    """Target number of actors of all streams, within [low, high]. All times are in seconds of one clock.

    Scale up: with R actors and data wait w the trainer works 1 - w of the time, so R / (1 - w) actors would
    keep it working all the time. Only readings that began when all requested actors were up count. Scale
    down: after `cool_down_seconds` without data wait, to the number of busy actors plus headroom. So the size
    changes in steps and does not oscillate.
    """

    low: int
    high: int
    target: int
    cool_down_seconds: float
    note: str | None = field(default=None, init=False)
    """Message about the latest decision, for the driver's output."""
    _seen: Actors = field(default=Actors(0, 0), init=False)
    _settled_at: float | None = field(default=None, init=False)
    _changed_at: float = field(default=-math.inf, init=False)
    _reading: TrainerReading = field(default=TrainerReading(), init=False)
    _began: float | None = field(default=None, init=False)
    _fed: TrainerReading = field(default=TrainerReading(), init=False)
    _grown_from: tuple[int, float] | None = field(default=None, init=False)
    _in_vain: int = field(default=0, init=False)
    """Decisions in a row that found too small a gain from the last scale-up."""
    _at_most: int = field(default=0, init=False)
    """Decisions that found the trainer starved with the maximum number of actors."""
    _too_few: int = field(default=0, init=False)
    """A size that was recently too small. Scaling down to it would only cause a scale-up again."""
    _calm: int = field(default=0, init=False)

    def observe(self, actors: Actors, now: float) -> None:
        """Record the state of the pool; called about every second."""
        self._seen = actors
        if actors.pending or actors.running < self.target:
            self._settled_at = None
        elif self._settled_at is None:
            self._settled_at = now

    def adjust(self, reading: TrainerReading, now: float) -> None:
        """Add `reading` to the readings since the last decision, and decide once they are long enough."""
        self.note = None
        if self._began is None or self._began < max(self._changed_at, self._settled_at or -math.inf):
            self._began, self._reading = now, TrainerReading()  # the readings so far are of another size
            return
        self._reading += reading
        if self._reading.seconds < (_LOOK_SECONDS if self._grown_from is None else _JUDGE_SECONDS):
            return
        self._began, reading, self._reading = now, self._reading, TrainerReading()
        if reading.data_wait >= STARVED:
            self._fed = TrainerReading()
            if self._settled_at is not None:
                self._grow(reading, now)
        elif reading.data_wait > FED:
            self._fed = TrainerReading()
            if not self._in_vain:
                self._grown_from = None  # the scale-up had the expected effect
        else:
            self._in_vain, self._grown_from = 0, None
            if self._at_most < _LOOKS:  # otherwise the note was already given, and is given once only
                self._at_most = 0
            self._fed += reading
            if self._fed.seconds >= self.cool_down_seconds:
                self._shrink(now)

    def _grow(self, reading: TrainerReading, now: float) -> None:
        running = self._seen.running
        self._too_few, self._calm = max(self._too_few, running), 0
        if self._grown_from is not None and running > self._grown_from[0]:
            before, images_per_second = self._grown_from
            hoped, gain = running / before - 1, reading.images_per_second / max(images_per_second, 1e-9) - 1
            self._in_vain = self._in_vain + 1 if gain < _LEAST_GAIN * hoped else 0
            if self._in_vain == _LOOKS:
                # Not scaled down again: crops of the new actors may arrive later than the readings cover.
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
                    f"with `{command('pack', '--shrink')}`"
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
        self._fed = TrainerReading()

    def _change(self, target: int, now: float) -> None:
        if target != self.target:
            self.target, self._changed_at, self._settled_at = target, now, None
