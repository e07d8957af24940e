"""Ranking of parameters with its certainty: trials together with their reruns under other seeds.

There are no files and no pages here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dinoray.pipeline.study.findings.statistics import difference_margin, sample_std
from dinoray.pipeline.study.space import Domain
from dinoray.pipeline.study.trials import TrialRecord

Standing = Literal["best", "tie", "behind", "not confirmed", "collapsed"]
"""Certainty of a candidate's rank.

`tie`: the difference from the best is within seed noise. `not confirmed`: only one seed, so seed noise is
unknown. `collapsed`: one of its seeds collapsed; such a candidate never wins.
"""


@dataclass(frozen=True)
class Candidate:
    """Parameters that were trained to the end, with all their seeds."""

    number: int
    """Number of the first trial with these parameters."""
    params: dict[str, Any]
    scores: tuple[float, ...]
    """One score per seed, of finished runs."""
    seeds: tuple[int, ...]
    trials: tuple[int, ...]
    """Numbers of the finished trials."""
    collapsed: tuple[int, ...] = ()
    """Trials with other seeds that collapsed."""
    standing: Standing = "behind"

    @property
    def name(self) -> str:
        """Return the folder name of its first trial."""
        return f"{self.number:04d}"

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return float(np.mean(self.scores))

    @property
    def std(self) -> float | None:
        """Return the standard deviation over seeds, with n - 1; None for one seed."""
        return sample_std(self.scores)

    @property
    def is_confirmed(self) -> bool:
        """Return true if several seeds finished and none collapsed."""
        return len(self.scores) > 1 and not self.collapsed


def score_of(tried: TrialRecord) -> float | None:
    """Return the objective if it is a finite number, else None."""
    return number_of(tried.outcome.score) if tried.outcome else None


def metric_of(tried: TrialRecord, name: str) -> float | None:
    """Return a metric of the last evaluation, signed so that larger is better; None if it is not a number."""
    value = number_of(tried.outcome.scores.get(name)) if tried.outcome else None
    return -value if value is not None and name == "loss" else value


def number_of(value: Any) -> float | None:
    """Return a finite number, parsed from text if needed; else None."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def searched(tried: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the trials with new parameters, without reruns under other seeds."""
    return [one for one in tried if one.trial.confirms is None]


def is_population(tried: Sequence[TrialRecord]) -> bool:
    """Return true if the trials form a population, whose weak members copy the weights of strong members."""
    return any(one.trial.origin == "pb2" for one in tried)


def ranked(tried: Sequence[TrialRecord]) -> list[Candidate]:
    """Return all candidates, best first: confirmed by mean, single seeds by score, then collapsed."""
    groups: dict[int, list[TrialRecord]] = {}
    for one in tried:
        root = one.trial.number if one.trial.confirms is None else one.trial.confirms
        groups.setdefault(root, []).append(one)
    found = [candidate for root, group in groups.items() if (candidate := _candidate(root, group))]
    found.sort(key=lambda c: (bool(c.collapsed), not c.is_confirmed, -c.mean, c.number))
    best = next((c for c in found if not c.collapsed), None)
    confirmed = [c.scores for c in found if c.is_confirmed]
    return [replace(c, standing=_standing(c, best, confirmed)) for c in found]


def _candidate(number: int, group: Sequence[TrialRecord]) -> Candidate | None:
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


def domains(study: Mapping[str, Any], tried: Sequence[TrialRecord]) -> dict[str, Domain]:
    """Return the searched space; if study.json lacks it, the settings in which the trials differ."""
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
    """Return true for finite numbers, false for bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def place_in(domain: Domain, value: Any) -> float | None:
    """Return the position of a value in [0, 1], clipped to the ends; None if the domain cannot place it."""
    if domain.kind == "choice":
        return domain.place(value) if domain.holds(value) else None
    if not is_number(value):
        return None
    low, high = domain.values
    return domain.place(min(max(value, low), high))
