"""Which parameters are best, and how surely: trials with their reruns under other seeds, ranked.

Knows nothing of files or pages.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pipeline.study.findings.statistics import difference_margin, sample_std
from pipeline.study.space import Domain
from pipeline.study.trials import Tried

Standing = Literal["best", "tie", "behind", "not confirmed", "collapsed"]
"""`tie`: seeds make as much of a difference as lies between it and the best. `not confirmed`: one seed, so nobody
knows. `collapsed`: one of its seeds did; it never wins."""


@dataclass(frozen=True)
class Candidate:
    """Parameters that were trained to the end, with all the seeds that they were trained with."""

    number: int
    """Of the trial that was the first to have them."""
    params: dict[str, Any]
    scores: tuple[float, ...]
    """One per seed, of runs that finished."""
    seeds: tuple[int, ...]
    trials: tuple[int, ...]
    """Their numbers."""
    collapsed: tuple[int, ...] = ()
    """Trials of other seeds that collapsed."""
    standing: Standing = "behind"

    @property
    def name(self) -> str:
        """Its trial's folder."""
        return f"{self.number:04d}"

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.scores))

    @property
    def std(self) -> float | None:
        """Over seeds, with n - 1; None of one."""
        return sample_std(self.scores)

    @property
    def is_confirmed(self) -> bool:
        """Whether several seeds finished and none collapsed."""
        return len(self.scores) > 1 and not self.collapsed


def score_of(tried: Tried) -> float | None:
    """The objective where it is a number."""
    return number_of(tried.outcome.score) if tried.outcome else None


def metric_of(tried: Tried, name: str) -> float | None:
    """A metric of the last evaluation, turned so that larger is better; None when it is no number."""
    value = number_of(tried.outcome.scores.get(name)) if tried.outcome else None
    return -value if value is not None and name == "loss" else value


def number_of(value: Any) -> float | None:
    """A finite number, also from its text; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def searched(tried: Sequence[Tried]) -> list[Tried]:
    """Trials that tried something new, not another seed."""
    return [one for one in tried if one.trial.confirms is None]


def is_population(tried: Sequence[Tried]) -> bool:
    """Whether they are members of one, which weak ones leave for others that go on from strong ones."""
    return any(one.trial.origin == "pb2" for one in tried)


def ranked(tried: Sequence[Tried]) -> list[Candidate]:
    """All candidates, best first: the confirmed ones by mean, those of one seed by score, those that collapsed once."""
    groups: dict[int, list[Tried]] = {}
    for one in tried:
        root = one.trial.number if one.trial.confirms is None else one.trial.confirms
        groups.setdefault(root, []).append(one)
    found = [candidate for root, group in groups.items() if (candidate := _candidate(root, group))]
    found.sort(key=lambda c: (bool(c.collapsed), not c.is_confirmed, -c.mean, c.number))
    best = next((c for c in found if not c.collapsed), None)
    confirmed = [c.scores for c in found if c.is_confirmed]
    return [replace(c, standing=_standing(c, best, confirmed)) for c in found]


def _candidate(number: int, group: Sequence[Tried]) -> Candidate | None:
    finished = [
        (one, score) for one in group if one.status == "finished" and (score := score_of(one)) is not None
    ]
    if not finished:
        return None
    return Candidate(
        number=number,
        params=finished[0][0].trial.params,
        scores=tuple(score for _, score in finished),
        seeds=tuple(one.trial.seed for one, _ in finished),
        trials=tuple(one.trial.number for one, _ in finished),
        collapsed=tuple(one.trial.number for one in group if one.status == "collapsed"),
    )


def _standing(
    candidate: Candidate, best: Candidate | None, confirmed: Sequence[tuple[float, ...]]
) -> Standing:
    if candidate.collapsed:
        return "collapsed"
    if candidate is best:
        return "best"
    if best is None or not (candidate.is_confirmed and best.is_confirmed):
        return "not confirmed"
    margin = difference_margin(confirmed, len(best.scores), len(candidate.scores))
    return "tie" if best.mean - candidate.mean <= margin else "behind"


def domains(study: Mapping[str, Any], tried: Sequence[Tried]) -> dict[str, Domain]:
    """The space that was searched; where study.json does not say, what the trials differ in."""
    space: dict[str, Domain] = {}
    for key, tree in _mapping(study.get("space")).items():
        try:
            space[key] = Domain(kind=tree["kind"], values=tuple(tree["values"]))
        except (KeyError, TypeError, ValueError):  # study.json may be of another version, or damaged
            continue
    for key in dict.fromkeys(key for one in tried for key in one.trial.params):
        values = [one.trial.params[key] for one in tried if key in one.trial.params]
        distinct = list({repr(value): value for value in values}.values())
        if key in space or len(distinct) < 2:
            continue
        if all(is_number(value) for value in distinct):
            space[key] = Domain(kind="uniform", values=(min(distinct), max(distinct)))
        else:
            space[key] = Domain(kind="choice", values=tuple(distinct))
    return space


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def is_number(value: Any) -> bool:
    """Numbers proper: finite, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def place_in(domain: Domain, value: Any) -> float | None:
    """Where a value lies from 0 to 1, the nearest end when it is beyond; None when the domain has no place for it."""
    if domain.kind == "choice":
        return domain.place(value) if domain.holds(value) else None
    if not is_number(value):
        return None
    low, high = domain.values
    return domain.place(min(max(value, low), high))
