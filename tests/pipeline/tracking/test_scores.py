"""The best checkpoint of a run, by what its evaluations have logged."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_states import commit

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.tracking.records import Records, read_records
from dinoray.pipeline.tracking.scores import (
    MISSING,
    Best,
    Scores,
    best_checkpoint,
    decline,
    missing_evaluations,
    scores_of,
)


def run_of(folder: Path, *lines: dict[str, Any], committed: tuple[int, ...]) -> Directory:
    run = Directory(str(folder))
    run.write("metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    for step in committed:
        run.write(f"checkpoints/{checkpoint_name(step)}/meta.json", b"{}")
    commit(run, *map(checkpoint_name, committed))
    return run


def best_of(run: Directory) -> Best | None:
    return best_checkpoint(run, read_records(run))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"step": 5, "loss": 4.0, "lr": 0.1}], ("", {})),
        ([{"step": 5, "knn_10": 0.5, "knn_20": 0.4, "knn_9": 0.6, "rankme": 9.0}], ("knn_20", {5: 0.4})),
        (
            [{"step": 5, "rankme": 9.0, "lidar": 8.0}, {"step": 10, "rankme": 7.0}],
            ("rankme", {5: 9.0, 10: 7.0}),
        ),
        ([{"step": 5, "lidar": 8.0, "loss": 1.0}], ("lidar", {5: 8.0})),
        ([{"step": 5, "rankme": 9.0}, {"step": 10, "knn_20": 0.1}], ("knn_20", {10: 0.1})),
        ([{"step": 5, "knn_20": "nan"}, {"step": 10, "knn_20": 0.1}], ("knn_20", {10: 0.1})),
        ([{"step": 5, "knn_20": float("inf")}, {"step": 6, "knn_20": None}], ("knn_20", {})),
        ([{"step": 5, "knn_20": 0.3}, {"step": 5, "knn_20": 0.2}], ("knn_20", {5: 0.2})),
        ([{"step": 5, "knn_20": 0.3}, {"step": 5, "loss": 0.2}], ("knn_20", {5: 0.3})),
    ],
)
def test_one_metric_compares_all_evaluations(
    lines: list[dict[str, Any]], expected: tuple[str, dict[int, float]]
) -> None:
    assert scores_of(lines) == expected


def test_the_best_is_one_that_is_committed_and_of_two_the_later(tmp_path: Path) -> None:
    scores = {0: 0.9, 4: 0.5, 8: 0.7, 12: 0.6, 16: 0.6, 20: 0.1}
    lines = [{"step": step, "knn_20": score, "majority": 0.1} for step, score in scores.items()]
    run = run_of(tmp_path, *lines, committed=(4, 12, 16, 18, 20))
    best = best_of(run)
    assert best == (16, "knn_20", 0.6)
    assert str(best) == "step 16, k-NN 60.0% (k=20)"


def test_without_labels_it_is_the_best_by_rankme(tmp_path: Path) -> None:
    lines = [{"step": 4, "rankme": 31.24}, {"step": 8, "rankme": 30.0}]
    assert str(best_of(run_of(tmp_path, *lines, committed=(4, 8)))) == "step 4, rankme 31.2"


def test_a_run_without_an_evaluated_checkpoint_has_none(tmp_path: Path) -> None:
    assert best_of(Directory(str(tmp_path / "new"))) is None
    assert best_of(run_of(tmp_path, {"step": 4, "knn_20": 0.5}, committed=(8,))) is None


@given(st.dictionaries(st.integers(0, 30), st.floats(0, 1)))
def test_the_scores_are_those_of_the_report(scores: dict[int, float]) -> None:
    lines = [{"step": step, "knn_20": score} for step, score in scores.items()]
    records = Records("".join(f"{json.dumps(line)}\n" for line in lines).encode())
    series = records.series("knn_20")
    found = scores_of(records.lines).by_step
    assert found == dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (Scores("knn_20", {0: 0.9, 4: 0.5, 8: 0.7}), "at step 0 and has fallen by 20.0 points"),
        (Scores("knn_20", {4: 0.5, 8: 0.7, 12: 0.6996}), None),
        (Scores("knn_20", {4: 0.7, 8: 0.5, 12: 0.7}), None),
        (Scores("knn_20", {4: 0.7, 8: 0.5, 12: 0.699}), "at step 4 and has fallen by 0.1 points"),
        (
            Scores("rankme", {0: 40.0, 4: 31.2, 8: 30.0}),
            "at step 4 and has fallen by 1.2 since: rankme 31.2, now 30.0",
        ),
        (Scores("rankme", {0: 40.0, 4: 31.2}), None),
        (Scores("rankme", {0: 40.0}), None),
        (Scores("", {}), None),
    ],
)
def test_a_run_that_is_below_its_peak_says_where_it_was_and_by_how_much(
    scores: Scores, words: str | None
) -> None:
    fall = decline(scores)
    assert (fall is None) == (words is None)
    assert fall is None or f"quality peaked {words}" in str(fall)


@given(st.dictionaries(st.integers(1, 30), st.floats(0, 1), min_size=1))
def test_a_decline_is_from_the_best_to_the_last(scores: dict[int, float]) -> None:
    fall, last = max(scores.values()) - scores[max(scores)], decline(Scores("knn_20", scores))
    assert (last is not None) == (fall >= 0.0005)
    assert last is None or (last.best.score, last.last_score) == (max(scores.values()), scores[max(scores)])


def test_a_step_without_scores_is_missing_unless_it_has_them_after_all() -> None:
    lines = [
        {"step": 4, MISSING: "lost"},
        {"step": 8, MISSING: "lost", "loss": 1.0},
        {"step": 8, "knn_20": 0.5},
        {"step": 12, "loss": 1.0},
    ]
    assert missing_evaluations(lines) == {4: "lost"}
