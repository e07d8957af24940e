"""The line to beat: when a run is worse than the weights it started from, and when that is noise."""

import math
from typing import Any

import pytest

from dinoray.pipeline.tracking.scores import Best
from dinoray.pipeline.tracking.start import best_gain, gain_of, is_worse, regression, standard_error, start_of

START = {"step": 0, "knn_10": 0.6, "knn_20": 0.5, "num_val": 400, "rankme": 100.0}
ERROR = math.sqrt((0.5 * 0.5 + 0.4 * 0.6) / 400)  # of a fall from 50 to 40 %


def at(step: int, knn: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "knn_20": knn, "num_val": 400, **more}


def found(*lines: dict[str, Any], grace: int = 0, persistence: int = 2, from_weights: bool = False) -> Any:
    return regression(START, lines, grace_steps=grace, persistence=persistence, from_weights=from_weights)


def test_the_start_is_the_first_line_if_it_has_scores_and_no_loss() -> None:
    assert start_of([START, at(10, 0.4)]) == START
    assert start_of([{"step": 10, "loss": 4.0}, at(10, 0.4)]) is None
    assert start_of([{"step": 10, "loss": 4.0, "knn_20": 0.4}]) is None
    assert start_of([]) is None


@pytest.mark.parametrize(
    ("knn", "num_val", "worse"),
    [
        (0.5, 400, False),
        (0.9, 400, False),
        (0.47, 400, False),  # a standard error of 3.5 points
        (0.465, 400, False),
        (0.464, 400, True),
        (0.49, 10_000, True),
        (0.49, None, True),  # an earlier version's line: any fall that is printed
        (0.4996, None, False),
        (0.0, 400, True),
    ],
)
def test_a_fall_within_the_standard_error_is_no_regression(
    knn: float, num_val: int | None, worse: bool
) -> None:
    start, line = START | {"num_val": num_val}, at(8, knn) | {"num_val": num_val}
    assert bool(is_worse(start, line, from_weights=False)) == worse


def test_the_fall_is_told_with_its_error() -> None:
    gain = gain_of(START, at(8, 0.4))
    assert gain is not None
    assert gain.error == pytest.approx(ERROR)
    assert (
        str(gain) == "k-NN 40.0% (k=20) at step 8 is 10.0 points below the start, 50.0% (standard error 3.5)"
    )
    assert is_worse(START, at(8, 0.4), from_weights=False) == str(gain)


def test_accuracies_compare_at_the_largest_k_that_both_have() -> None:
    gain = gain_of(START, {"step": 8, "knn_10": 0.4, "knn_20": "nan", "knn_50": 0.9})
    assert gain is not None
    assert (gain.metric, gain.start, gain.score) == ("knn_10", 0.6, 0.4)
    assert gain_of(START, {"step": 8, "rankme": 9.0}) is None


def test_the_error_is_that_of_two_binomials() -> None:
    assert standard_error(0.5, 0.8, 41) == pytest.approx(0.1)  # (0.25 + 0.16) / 41 = 0.01
    assert standard_error(0.0, 1.0, 9) == 0.0


@pytest.mark.parametrize(
    ("scores", "since"),
    [
        ([], None),
        ([0.4], None),  # one evaluation may be chance
        ([0.4, 0.4], 10),
        ([0.6, 0.4, 0.4], 20),
        ([0.4, 0.4, 0.4], 10),
        ([0.4, 0.6, 0.4], None),
        ([0.4, 0.4, 0.48], None),  # back within noise
        ([0.4, 0.48, 0.3], None),
    ],
)
def test_it_must_persist(scores: list[float], since: int | None) -> None:
    lines = [at(10 * (i + 1), score) for i, score in enumerate(scores)]
    regressed = found(START, *lines)
    assert (regressed.since if regressed else None) == since


def test_evaluations_before_the_grace_do_not_count() -> None:
    lines = [at(10, 0.3), at(20, 0.3), at(30, 0.3)]
    assert found(*lines, grace=21) is None
    assert found(*lines, grace=20).since == 20
    assert found(*lines, grace=31, persistence=1) is None
    assert found(at(30, 0.3), grace=30, persistence=1).since == 30


def test_without_a_start_there_is_no_regression() -> None:
    assert regression(None, [at(1, 0.0)], grace_steps=0, persistence=1, from_weights=True) is None


FREE = {"step": 0, "rankme": 100.0, "cluster_learnability": 0.8, "intrinsic_dim": 10.0}


@pytest.mark.parametrize(
    ("now", "from_weights", "worse"),
    [
        ({"rankme": 50.0, "cluster_learnability": 0.4, "intrinsic_dim": 5.0}, True, True),
        ({"rankme": 50.0, "cluster_learnability": 0.4, "intrinsic_dim": 5.0}, False, False),
        ({"rankme": 50.0, "cluster_learnability": 0.4, "intrinsic_dim": 9.0}, True, False),  # not below 90 %
        ({"rankme": 50.0, "cluster_learnability": 0.8, "intrinsic_dim": 5.0}, True, False),
        ({"rankme": 50.0}, True, False),  # one metric alone
        ({"rankme": 50.0, "cluster_learnability": "nan", "intrinsic_dim": 5.0}, True, True),
        ({"rankme": 50.0, "lidar": 3.0, "cluster_learnability": 0.4}, True, True),  # no LiDAR of the start
    ],
)
def test_without_labels_all_metrics_must_have_fallen_from_trained_weights(
    now: dict[str, Any], from_weights: bool, worse: bool
) -> None:
    assert bool(is_worse(FREE, {"step": 8, **now}, from_weights=from_weights)) == worse


def test_the_best_checkpoint_is_compared_with_the_start_by_its_own_metric() -> None:
    lines = [START, at(4, 0.55), at(8, 0.45)]
    gain = best_gain(lines, Best(4, "knn_20", 0.55))
    assert gain is not None
    assert (gain.start, gain.score, gain.step) == (0.5, 0.55, 4)
    assert gain.difference == pytest.approx(0.05)
    assert gain.is_beyond_noise
    assert best_gain(lines, Best(8, "rankme", 30.0)) is None
    assert best_gain(lines[1:], Best(8, "knn_20", 0.45)) is not None  # the first line is taken as the start
    assert best_gain([], None) is None
