"""Agreement of metrics: do label-free metrics rank trials as k-NN accuracy does? No files or pages here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinoray.pipeline.study.findings.ranking import metric_of
from dinoray.pipeline.study.trials import TrialRecord
from dinoray.pipeline.tracking.rankings import CLID, clid, kendall


@dataclass(frozen=True)
class Agreement:
    """Agreement between the rankings of trials by two metrics."""

    metric: str
    against: str
    gated: bool
    """True if collapsed trials count as the worst by `metric`, whatever its value."""
    with_collapsed: bool
    """True if collapsed trials count at all: as the worst by `against`."""
    tau: float | None
    """Kendall's tau-b; positive means agreement, also for the loss; None if there is nothing to rank."""
    num_trials: int


def agreement(tried: Sequence[TrialRecord], objective: str) -> list[Agreement]:
    """Compare k-NN, or without labels the objective, with the label-free metrics."""
    finished = [one for one in tried if one.status == "finished"]
    ended = [*finished, *(one for one in tried if one.status == "collapsed")]
    judge = _judge(finished, objective)
    found = []
    for metric in ("rankme", "lidar", "clid", "loss"):
        if metric == judge or not any(value is not None for value in _values(finished, metric)):
            continue
        found.append(_agreement(finished, metric, judge, gated=False))
        if metric != "loss" and len(ended) > len(finished):
            found += [_agreement(ended, metric, judge, gated=gated) for gated in (False, True)]
    return found


def _judge(finished: Sequence[TrialRecord], objective: str) -> str:
    """Return the metric against which the others are compared."""
    measured = {name for one in finished if one.outcome for name in one.outcome.scores}
    knn = sorted((name for name in measured if name.startswith("knn_")), key=lambda name: (len(name), name))
    if objective in knn or not knn:
        return objective
    return "knn_20" if "knn_20" in knn else knn[-1]


def _values(tried: Sequence[TrialRecord], metric: str) -> list[float | None]:
    """Return a metric of each trial; CLID compares these trials with one another."""
    if metric != "clid":
        return [metric_of(one, metric) for one in tried]
    parts = [tuple(metric_of(one, part) for part in CLID) for one in tried]
    known = [(a, b) for a, b in parts if a is not None and b is not None]
    sums = iter(clid([a for a, _ in known], [b for _, b in known]))
    return [None if None in pair else next(sums) for pair in parts]


def _agreement(tried: Sequence[TrialRecord], metric: str, against: str, *, gated: bool) -> Agreement:
    pairs = []
    for one, measured in zip(tried, _values(tried, metric), strict=True):
        has_collapsed = one.status == "collapsed"
        truth = -math.inf if has_collapsed else metric_of(one, against)
        value = -math.inf if has_collapsed and gated else measured
        if truth is not None and value is not None:
            pairs.append((truth, value))
    tau = kendall([truth for truth, _ in pairs], [value for _, value in pairs])
    with_collapsed = any(one.status == "collapsed" for one in tried)
    return Agreement(metric, against, gated, with_collapsed, tau, len(pairs))
