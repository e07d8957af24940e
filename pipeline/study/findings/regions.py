"""Regions of the space in which trials collapse or do well, as readable conditions.

There are no files and no pages here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.study.findings.ranking import is_number, score_of, searched
from dinoray.pipeline.study.space import Domain
from dinoray.pipeline.study.trials import TrialRecord

_MIN_TRIALS = 2
_MAX_REGIONS = 2
_MIN_GOOD = 2


class Condition(NamedTuple):
    """Condition on one setting."""

    key: str
    relation: str
    """>=, <= or =."""
    value: Any

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Return true if these parameters meet the condition."""
        value = params.get(self.key)
        if self.relation == "=":
            return repr(value) == repr(self.value)
        if not is_number(value):
            return False
        return value >= self.value if self.relation == ">=" else value <= self.value

    def __str__(self) -> str:
        return f"{self.key} {self.relation} {short(self.value)}"


class Region(NamedTuple):
    """Conditions under which every trial collapsed."""

    conditions: tuple[Condition, ...]
    trials: tuple[int, ...]
    verdicts: tuple[str, ...]
    """Verdicts of its trials, most frequent first."""

    def __str__(self) -> str:
        return " and ".join(map(str, self.conditions))


def short(value: Any) -> str:
    """Format a setting's value for reading."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}"
    return text if float(text) == value else f"{value:.9g}"  # a rounded border would admit other trials


def collapse_regions(tried: Sequence[TrialRecord], space: Mapping[str, Domain]) -> list[Region]:
    """Return at most two regions, each of one or two conditions, that hold only collapsed trials.

    Each region holds as many collapsed trials as possible, at least two. Returns none if no other trial ran,
    because then there is no border.
    """
    ended = [one for one in tried if one.status in ("finished", "stopped", "collapsed")]
    left = [one for one in ended if one.status == "collapsed"]
    healthy = [one for one in ended if one.status != "collapsed"]
    regions: list[Region] = []
    while healthy and len(left) >= _MIN_TRIALS and len(regions) < _MAX_REGIONS:
        conditions = _widest(left, healthy, space)
        inside = [one for one in left if conditions and all(c.holds(one.trial.params) for c in conditions)]
        if len(inside) < _MIN_TRIALS:
            break
        verdicts = Counter(one.outcome.verdict for one in inside if one.outcome)
        regions.append(
            Region(
                conditions,
                tuple(one.trial.number for one in inside),
                tuple(verdict for verdict, _ in verdicts.most_common()),
            )
        )
        left = [one for one in left if one not in inside]
    return regions


def _widest(
    collapsed: Sequence[TrialRecord], healthy: Sequence[TrialRecord], space: Mapping[str, Domain]
) -> tuple[Condition, ...]:
    """Return one condition, or two on different settings if better, that hold most collapsed trials only."""
    conditions = _conditions(collapsed, space)
    if not conditions:
        return ()
    bad, good = _held(conditions, collapsed), _held(conditions, healthy)
    # Tie-breaker, below 1 for two conditions: at equal numbers of collapsed trials, fewer other trials win.
    tightness = -(bad.sum(1) + good.sum(1)) / (len(collapsed) + len(healthy)) / 5
    alone = np.where(good.sum(1) == 0, bad.sum(1) + tightness, 0)
    keys = np.array([condition.key for condition in conditions])
    allowed = (good @ good.T == 0) & (keys[:, None] != keys[None, :])
    pairs = np.where(allowed, bad @ bad.T + tightness[:, None] + tightness[None, :], 0)
    i, j = np.unravel_index(int(pairs.argmax()), pairs.shape)
    if max(alone.max(), pairs.max()) <= 0:
        return ()
    if round(float(alone.max())) >= round(float(pairs.max())):
        return (conditions[int(alone.argmax())],)
    return tuple(conditions[k] for k in sorted((int(i), int(j))))


def _conditions(collapsed: Sequence[TrialRecord], space: Mapping[str, Domain]) -> list[Condition]:
    found: list[Condition] = []
    for key, domain in space.items():
        values = {repr(v): v for one in collapsed if (v := one.trial.params.get(key)) is not None}
        if domain.kind == "choice":
            found += [Condition(key, "=", value) for value in values.values()]
        else:
            numbers = sorted(value for value in values.values() if is_number(value))
            found += [Condition(key, relation, value) for value in numbers for relation in (">=", "<=")]
    return found


def _held(conditions: Sequence[Condition], tried: Sequence[TrialRecord]) -> npt.NDArray[np.float64]:
    """Return a matrix: 1 where condition i holds for trial j."""
    return np.array([[float(c.holds(one.trial.params)) for one in tried] for c in conditions])


def good_trials(tried: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the better half of the finished trials, without reruns; none if there are fewer than two."""
    finished = [one for one in searched(tried) if one.status == "finished" and score_of(one) is not None]
    finished.sort(key=lambda one: -(score_of(one) or 0.0))
    good = finished[: (len(finished) + 1) // 2]
    return good if len(good) >= _MIN_GOOD else []


def ranges(tried: Sequence[TrialRecord], space: Mapping[str, Domain]) -> dict[str, str]:
    """Return the range of each setting in these trials: smallest to largest, or the choices that occur."""
    found = {}
    for key, domain in space.items():
        values = [one.trial.params[key] for one in tried if key in one.trial.params]
        numbers = sorted(value for value in values if is_number(value))
        if not values:
            continue
        if domain.kind == "choice" or len(numbers) < len(values):
            found[key] = " or ".join(sorted({short(value) for value in values}))
        else:
            low, high = short(numbers[0]), short(numbers[-1])
            found[key] = low if low == high else f"{low} to {high}"
    return found
