"""Agreement of metrics: do label-free metrics rank trials as k-NN accuracy does? No files or pages here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinoray.pipeline.study.findings.ranking import metric_of
from dinoray.pipeline.study.findings.statistics import kendall
from dinoray.pipeline.study.trials import TrialRecord


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
    for metric in ("rankme", "lidar", "loss"):
        if metric == judge or not any(metric_of(one, metric) is not None for one in finished):
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


def _agreement(tried: Sequence[TrialRecord], metric: str, against: str, *, gated: bool) -> Agreement:
    pairs = []
    for one in tried:
        has_collapsed = one.status == "collapsed"
        truth = -math.inf if has_collapsed else metric_of(one, against)
        value = -math.inf if has_collapsed and gated else metric_of(one, metric)
        if truth is not None and value is not None:
            pairs.append((truth, value))
    tau = kendall([truth for truth, _ in pairs], [value for _, value in pairs])
    with_collapsed = any(one.status == "collapsed" for one in tried)
    return Agreement(metric, against, gated, with_collapsed, tau, len(pairs))
