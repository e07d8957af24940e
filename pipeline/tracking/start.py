"""The line to beat: the scores of the weights that a run starts from, and how far later ones are above or below.

A difference of k-NN accuracies counts if it is larger than its standard error: on n classified images, those of two
accuracies p and q add up to sqrt((p (1 - p) + q (1 - q)) / n). Both classify the same images, so the real error is
smaller. Pure functions of the lines of metrics.jsonl; no Ray here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dinoray.pipeline.tracking.scores import (
    Best,
    difference_in_words,
    evaluations,
    in_words,
    is_knn,
    score_in_words,
    scores_of,
)

LABEL_FREE_NAMES = {
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "cluster_learnability": "cluster learnability",
    "intrinsic_dim": "intrinsic dimension",
}
"""Metrics that need no labels, larger is better -> their names. None of them alone is a measure of quality."""
_LEAST_SHARE = 0.9
"""Without labels, each metric must be below this share of the start's; their noise is not known."""
_LEAST_METRICS = 2

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""


class Gain(NamedTuple):
    """A score beside that of the start."""

    metric: str
    start: float
    score: float
    step: int
    error: float | None
    """Standard error of the difference; None where the number of classified images is not known."""

    @property
    def difference(self) -> float:
        """By how much the score is above the start; negative: below it."""
        return self.score - self.start

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the two differ by more than the standard error, and by enough to be printed."""
        least = 0.0005 if is_knn(self.metric) else 0.05
        return abs(self.difference) > max(least, self.error or 0.0)

    def __str__(self) -> str:
        """`k-NN 48.2% (k=20) at step 800 is 3.2 points above the start, 45.0% (standard error 1.1)`."""
        by = difference_in_words(self.metric, abs(self.difference))
        side = "above" if self.difference >= 0 else "below"
        noise = "" if self.error is None else f" (standard error {100 * self.error:.1f})"
        start = score_in_words(self.metric, self.start)
        return f"{in_words(self.metric, self.score)} at step {self.step} is {by} {side} the start, {start}{noise}"


class Regression(NamedTuple):
    """A run whose newest evaluations are all worse than its start."""

    since: int
    """The step of the first of them."""
    what: str
    """The newest of them in words."""


def start_of(lines: Sequence[Line]) -> Line | None:
    """Return the evaluation before the first step; None if it has no scores. `lines`: all of a run, by step."""
    return lines[0] if evaluations(lines[:1]) and "loss" not in lines[0] else None


def standard_error(p: float, q: float, num_images: int) -> float:
    """Return the standard error of the difference of two accuracies on `num_images` images, taken as independent."""
    return math.sqrt((p * (1 - p) + q * (1 - q)) / num_images)


def gain_of(start: Line, line: Line) -> Gain | None:
    """Return the k-NN of an evaluation beside the start's, at the largest k that both have; None where one has none."""
    both = {name: value for name, value in start.items() if is_knn(name) and _is_finite(line.get(name))}
    scores = scores_of([{"step": 0, **both}])
    if 0 not in scores.by_step:
        return None
    then, now = scores.by_step[0], float(line[scores.metric])
    num_images = line.get("num_val") or start.get("num_val")
    error = standard_error(then, now, num_images) if num_images else None
    return Gain(scores.metric, then, now, line["step"], error)


def best_gain(lines: Sequence[Line], best: Best | None) -> Gain | None:
    """Return the k-NN of a run's best checkpoint beside the start's; None where there is none to compare."""
    start = start_of(lines)
    if start is None or best is None or best.step == start["step"] or not is_knn(best.metric):
        return None
    line = {**start, "step": best.step, best.metric: best.score}
    return gain_of({k: v for k, v in start.items() if not is_knn(k) or k == best.metric}, line)


def against_start(lines: Sequence[Line], best: Best | None) -> str:
    """Return how a run's best checkpoint stands beside its start, in a sentence; empty without labels or a start."""
    gain = best_gain(lines, best)
    if gain is None:
        return ""
    if not gain.is_beyond_noise:
        return f"no checkpoint differs from the start by more than noise: {gain}; one seed"
    if gain.difference < 0:
        return (
            f"the start was better than every checkpoint: nothing to export but the start; {gain}; one seed"
        )
    return f"the best checkpoint beats the start: {gain}; one seed"


def is_worse(start: Line, line: Line, *, from_weights: bool) -> str:
    """Return how an evaluation is worse than the start; empty if it is not.

    With labels: its k-NN is below the start's by more than the standard error. Without: each label-free metric that
    both have, at least two, is below nine tenths of the start's. Of random weights they say nothing: then an
    evaluation without labels is never worse. `from_weights`: whether the run starts from trained weights.
    """
    gain = gain_of(start, line)
    if gain is not None:
        return str(gain) if gain.difference < 0 and gain.is_beyond_noise else ""
    both = [name for name in LABEL_FREE_NAMES if _is_finite(start.get(name)) and _is_finite(line.get(name))]
    if not from_weights or len(both) < _LEAST_METRICS:
        return ""
    if any(line[name] >= _LEAST_SHARE * start[name] for name in both):
        return ""
    parts = (f"{LABEL_FREE_NAMES[name]} {line[name]:.3g}, the start's {start[name]:.3g}" for name in both)
    return f"each metric at step {line['step']} is below 90 % of the start's: {'; '.join(parts)}"


def regression(
    start: Line | None, lines: Sequence[Line], *, grace_steps: int, persistence: int, from_weights: bool
) -> Regression | None:
    """Return whether the last `persistence` evaluations among `lines` are all worse than the start; None if not.

    Evaluations before `grace_steps` do not count.
    """
    if start is None:
        return None
    counted = [
        line for line in evaluations(lines) if line["step"] > start["step"] and line["step"] >= grace_steps
    ]
    since, what = None, ""
    for line in reversed(counted):
        worse = is_worse(start, line, from_weights=from_weights)
        if not worse:
            break
        since, what = line["step"], what or worse
    if since is None or sum(line["step"] >= since for line in counted) < persistence:
        return None
    return Regression(since, what)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
