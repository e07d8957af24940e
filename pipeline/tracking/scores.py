"""Scores by which the checkpoints of one run compare: k-NN accuracy, or without labels RankMe. No Ray here.

Both grow with the quality of features within a run, whose loss falls as its temperature does.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_steps
from dinoray.pipeline.tracking.records import Records

_KNN = re.compile(r"knn_(\d+)")
_LABEL_FREE = ("rankme", "lidar")

MISSING = "evaluation_missing"
"""Name under which the log has why a step that was to be evaluated has no scores."""


class Scores(NamedTuple):
    """One metric of a run's evaluations, larger is better: step -> its value."""

    metric: str
    by_step: Mapping[int, float]


class Best(NamedTuple):
    """The best checkpoint of a run."""

    step: int
    metric: str
    score: float

    def __str__(self) -> str:
        """`step 800, k-NN 57.9% (k=20)`, or without labels `step 800, rankme 31.2`."""
        return f"step {self.step}, {in_words(self.metric, self.score)}"


class Decline(NamedTuple):
    """A run whose last evaluation is worse than an earlier one, the best of all."""

    best: Best
    last_score: float

    def __str__(self) -> str:
        """`quality peaked at step 800 and has fallen by 2.1 points since: k-NN 57.9% (k=20), now 55.8%`."""
        step, metric, best = self.best
        by, words = difference_in_words(metric, best - self.last_score), in_words(metric, best)
        now = score_in_words(metric, self.last_score)
        return f"quality peaked at step {step} and has fallen by {by} since: {words}, now {now}"


def is_knn(metric: str) -> bool:
    """Return True for an accuracy of k-NN."""
    return bool(_KNN.fullmatch(metric))


def in_words(metric: str, score: float) -> str:
    """`k-NN 57.9% (k=20)`, or without labels `rankme 31.2`."""
    if knn := _KNN.fullmatch(metric):
        return f"k-NN {score:.1%} (k={knn[1]})"
    return f"{metric} {score_in_words(metric, score)}"


def score_in_words(metric: str, score: float) -> str:
    """`57.9%`, or without labels `31.2`."""
    return f"{score:.1%}" if is_knn(metric) else f"{score:.1f}"


def difference_in_words(metric: str, difference: float) -> str:
    """`2.1 points`, or without labels `2.1`."""
    return f"{100 * difference:.1f} points" if is_knn(metric) else f"{difference:.1f}"


def evaluations(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those lines of a run that have scores."""
    return [line for line in lines if any(map(_rank, line))]


def missing_evaluations(lines: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Return the steps that were to be evaluated and have no scores, and why."""
    lines = list(lines)
    scored = {line["step"] for line in evaluations(lines)}
    return {
        line["step"]: str(line[MISSING]) for line in lines if MISSING in line and line["step"] not in scored
    }


def scores_of(lines: Iterable[Mapping[str, Any]]) -> Scores:
    """Return the scores in the lines of a run, each with its `step`; of two lines of a step the later one counts.

    The metric is k-NN at the largest k, as in the report. Values that are not finite are left out.
    """
    scored = evaluations(lines)
    metric = max((name for line in scored for name in line), key=_rank, default="")
    found = {line["step"]: line.get(metric) for line in scored}
    return Scores(metric, {step: float(value) for step, value in found.items() if _is_finite(value)})


def best_checkpoint(run: Directory, records: Records) -> Best | None:
    """Return the best of the committed checkpoints; None if none was evaluated. DataError as `read_committed`."""
    scores = scores_of(records.lines)
    steps = [step for step in committed_steps(run) if step in scores.by_step]
    if not steps:
        return None
    best = max(steps, key=lambda step: (scores.by_step[step], step))
    return Best(best, scores.metric, scores.by_step[best])


def decline(scores: Scores) -> Decline | None:
    """Return how far a run is below its best evaluation; None where it is not, or by less than is printed.

    Of a network that has not trained, RankMe says nothing about quality: without labels step 0 does not count.
    """
    has_labels = is_knn(scores.metric)
    steps = sorted(step for step in scores.by_step if step or has_labels)
    if not steps:
        return None
    best = max(steps, key=lambda step: (scores.by_step[step], step))
    found = Decline(Best(best, scores.metric, scores.by_step[best]), scores.by_step[steps[-1]])
    least = 0.0005 if has_labels else 0.05
    return found if found.best.score - found.last_score >= least else None


def _rank(name: str) -> int:
    """Return which of two metrics is used: the larger. 0: not a score."""
    if knn := _KNN.fullmatch(name):
        return len(_LABEL_FREE) + int(knn[1])
    return len(_LABEL_FREE) - _LABEL_FREE.index(name) if name in _LABEL_FREE else 0


def _is_finite(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)
