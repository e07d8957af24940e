"""Evaluations beside training that are under way: which is worked at, how many there may be, which is given up.

They are worked at one after the other, in the order of their steps, so results arrive in that order whatever happens to
the evaluator. No torch and no Ray here.
"""

from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

Weights = TypeVar("Weights")

_TIMES, _LEAST_SECONDS, _FIRST_SECONDS = 10, 30 * 60.0, 24 * 3600.0
"""Of eval.timeout_minutes=auto. CPUs that others use may need hours for the first."""


class Asked(NamedTuple, Generic[Weights]):
    """An evaluation that was asked for: the step, and the weights as they were then."""

    step: int
    weights: Weights


@dataclass
class _Place(Generic[Weights]):
    asked: Asked[Weights]
    num_failed: int = 0


class UnderWay(Generic[Weights]):
    """The evaluations under way, oldest first."""

    def __init__(self, *, most: int, most_tries: int) -> None:
        """`most`: how many there may be; `most_tries`: how often one is begun before it is given up."""
        self._most, self._most_tries = most, most_tries
        self._places: list[_Place[Weights]] = []

    @property
    def steps(self) -> list[int]:
        """Their steps, ascending."""
        return [place.asked.step for place in self._places]

    @property
    def has_room(self) -> bool:
        """Whether one more may be asked for. If not, training waits for the oldest.

        To leave one out instead would cost less time, but then the speed of a machine would decide which steps have
        scores, and so which checkpoint is the best.
        """
        return len(self._places) < self._most

    @property
    def oldest(self) -> Asked[Weights] | None:
        """The one to work at; None if there is none."""
        return self._places[0].asked if self._places else None

    def add(self, step: int, weights: Weights) -> None:
        """Ask for the evaluation of a later step than those under way, also where there is no room."""
        assert not self._places or step > self.steps[-1], f"step {step} after {self.steps}"
        self._places.append(_Place(Asked(step, weights)))

    def arrived(self) -> int:
        """Take note of the oldest one's result; return its step."""
        return self._places.pop(0).asked.step

    def failed(self, *, for_good: bool = False) -> bool:
        """Take note that the oldest one has failed; return whether it is given up, and else begun again.

        `for_good`: another try would be of no use.
        """
        oldest = self._places[0]
        oldest.num_failed += 1
        is_given_up = for_good or oldest.num_failed >= self._most_tries
        if is_given_up:
            self._places.pop(0)
        return is_given_up


class TimeLimit:
    """How long an evaluator may work at one evaluation, before it is taken to hang.

    The evaluations of a run are alike, so the longest one that has arrived says how long another may take.
    """

    def __init__(self, minutes: float | Literal["auto"], *, outage_seconds: float) -> None:
        """`outage_seconds`: how long reads wait for storage, which `auto` adds."""
        self._minutes, self._outage_seconds = minutes, outage_seconds
        self._begun_at = self._longest = 0.0

    def begin(self, now: float) -> None:
        """An evaluation is begun, or its evaluator has started only now."""
        self._begun_at = now

    def arrived(self, now: float) -> None:
        """Its result is there."""
        self._longest = max(self._longest, now - self._begun_at)

    @property
    def seconds(self) -> float:
        """The limit."""
        if self._minutes != "auto":
            return 60 * self._minutes
        work = max(_LEAST_SECONDS, _TIMES * self._longest) if self._longest else _FIRST_SECONDS
        return work + self._outage_seconds

    def is_over(self, now: float) -> bool:
        """Whether it takes too long."""
        return now - self._begun_at > self.seconds


def due_between(first: int, last: int, *, total: int, every: int) -> list[int]:
    """Return the steps after `first`, up to `last`, at which a run of `total` steps is evaluated every so many."""
    multiples = range((first // every + 1) * every, last + 1, every)
    return sorted({*multiples, *([total] if first < total <= last else [])})
