"""What a study says: the ranking, its ties, agreement of metrics, borders of collapse, savings, and the words."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies import SPACE, STEPS, about, tried, write_whole_study

from dinoray.pipeline.study.findings.regions import collapse_regions
from dinoray.pipeline.study.findings.summary import findings, importance_of
from dinoray.pipeline.study.page.tables import candidate_row
from dinoray.pipeline.study.space import CENTER_MOMENTUM, TEACHER_TEMP, Domain
from dinoray.pipeline.study.trials import TrialRecord, read_study, read_trials
from dinoray.pipeline.tracking.records import Records


def said(trials: list[TrialRecord], **changes: object) -> str:
    return "\n".join(findings(trials, about(**changes)).words)


# The ranking


def three_confirmed(gap: float) -> list[TrialRecord]:
    """Means 0.60 and 0.60 - gap over the seeds 0 to 2, both with a standard deviation of 0.01."""
    trials = [tried(0, 0.60), tried(1, 0.60 - gap), tried(2, 0.70, seed=0)]
    for root, mean in ((0, 0.60), (1, 0.60 - gap)):
        trials += [
            tried(10 * (root + 1) + s, mean + d, seed=s, confirms=root) for s, d in ((1, 0.01), (2, -0.01))
        ]
    return trials


def test_the_best_is_the_highest_mean_among_confirmed_ones() -> None:
    found = findings(three_confirmed(0.05), about())
    assert found.best is not None
    assert (found.best.name, found.best.seeds, found.best.trials) == ("0000", (0, 1, 2), (0, 11, 12))
    assert (found.best.mean, found.best.std) == (pytest.approx(0.60), pytest.approx(0.01))
    assert [(c.number, c.standing) for c in found.candidates] == [
        (0, "best"),
        (1, "behind"),
        (2, "not confirmed"),
    ]
    assert "Trial 0002 scored higher with one seed, not confirmed by other seeds." in found.words
    assert "The best trial beats 0001 by more than seed noise." in found.words


# The margin is t(4) * 0.01 * sqrt(1/3 + 1/3) = 2.132 * 0.008165 = 0.01741.
@pytest.mark.parametrize(("gap", "standing"), [(0.0173, "tie"), (0.0176, "behind")])
def test_a_tie_is_a_difference_within_the_interval_that_seeds_make(gap: float, standing: str) -> None:
    found = findings(three_confirmed(gap), about())
    assert found.candidates[1].standing == standing
    assert [c.name for c in found.ties] == (["0001"] if standing == "tie" else [])
    assert (
        "Trial 0001 is tied with the best: the difference is within seed noise" in "\n".join(found.words)
    ) is (standing == "tie")


def test_one_seed_confirms_nothing() -> None:
    found = findings([tried(0, 0.5), tried(1, 0.9)], about())
    assert [(c.number, c.standing) for c in found.candidates] == [(1, "best"), (0, "not confirmed")]
    assert found.ties == []
    assert "with one seed, not confirmed by other seeds." in "\n".join(found.words)


def test_what_collapsed_failed_or_was_given_up_never_wins() -> None:
    trials = [
        tried(0, 0.3),
        tried(1, 0.9, "stopped", step=40),
        tried(2, 0.99, "collapsed"),
        tried(3, 0.98, "failed"),
        tried(4, status="unfinished"),
    ]
    assert [c.number for c in findings(trials, about()).candidates] == [0]


def test_what_collapsed_under_another_seed_does_not_win() -> None:
    trials = [tried(0, 0.9), tried(1, 0.5), tried(2, 0.0, "collapsed", seed=1, confirms=0)]
    found = findings(trials, about())
    assert [(c.number, c.standing) for c in found.candidates] == [(1, "best"), (0, "collapsed")]
    assert "Trial 0000 (90.0%) is excluded: it collapsed with another seed (0002)." in found.words
    assert "every finished trial collapsed with another seed" in said([trials[0], trials[2]])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, None, "NaN"])
def test_a_score_that_is_no_number_does_not_count(score: float | None) -> None:
    found = findings([tried(0, score), tried(1, 0.2)], about())
    assert found.best is not None
    assert found.best.number == 1
    assert "There is no best trial: no trial finished with a finite score." in said([tried(0, score)])


# Agreement of metrics


def scored(number: int, knn: float, rankme: float, loss: float, status: str = "finished") -> TrialRecord:
    return tried(number, knn, status, scores={"knn_20": knn, "rankme": rankme, "loss": loss})


def test_agreement_with_k_nn_is_positive_where_a_metric_would_pick_the_same() -> None:
    trials = [scored(i, knn=0.1 * i, rankme=10.0 * i, loss=5.0 - i) for i in range(5)]
    found = findings(trials, about(objective="rankme"))
    assert {a.metric: (a.against, a.tau, a.num_trials) for a in found.kendall} == {
        "rankme": ("knn_20", pytest.approx(1), 5),
        "loss": ("knn_20", pytest.approx(1), 5),
    }
    assert "Agreement with k-NN (k=20) over 5 trials (Kendall's tau): RankMe +1.00, loss +1.00" in "\n".join(
        found.words
    )


def test_clid_ranks_trials_by_learnability_and_dimension_scaled_over_them() -> None:
    parts = [(0.5, 9.0), (0.6, 10.0), (0.4, 14.0), (0.7, 12.0)]  # sums -1.6, -0.2, 0.1, 1.7
    trials = [
        tried(i, 0.1 * i, scores={"knn_20": 0.1 * i, "cluster_learnability": a, "intrinsic_dim": b})
        for i, (a, b) in enumerate(parts)
    ]
    (found,) = findings(trials, about()).kendall
    assert (found.metric, found.tau, found.num_trials) == ("clid", pytest.approx(1), 4)


def from_start(number: int, start: float, end: float, **changes: Any) -> TrialRecord:
    """A finished trial whose initial weights score `start`."""
    record = Records(f'{{"step": 0, "knn_20": {start}, "num_val": 100}}\n'.encode())
    return replace(tried(number, end, scores={"knn_20": end}, **changes), records=record)


def test_the_best_is_told_with_its_gain_over_the_start_and_the_number_of_seeds() -> None:
    trials = [from_start(0, 0.4, 0.5), from_start(1, 0.42, 0.5, confirms=0, seed=1), from_start(2, 0.4, 0.3)]
    words = "\n".join(findings(trials, about()).words)
    assert "The last k-NN of trial 0000 minus that of its start is +9.0 ± 1.4 points, over 2 seeds" in words
    assert "is +10.0 points, with one seed." in "\n".join(findings(trials[:1], about()).words)
    found = findings(trials, about())
    assert [candidate_row(c, found)["above the start"] for c in found.candidates] == ["+9.0 ± 1.4", "-10.0"]
    assert "above the start" not in candidate_row(found.candidates[0], findings([tried(0, 0.5)], about()))


def test_gates_put_collapsed_trials_last_whatever_rankme_says_of_them() -> None:
    trials = [scored(i, knn=0.1 * i, rankme=10.0 * i, loss=5.0) for i in range(1, 4)]
    trials.append(scored(9, knn=0.0, rankme=99.0, loss=5.0, status="collapsed"))
    taus = {
        (a.gated, a.with_collapsed): a.tau for a in findings(trials, about()).kendall if a.metric == "rankme"
    }
    # Of 6 pairs, the 3 with the collapsed one are the wrong way round without gates.
    assert taus == pytest.approx({(False, False): 1.0, (False, True): 0.0, (True, True): 1.0})


def test_without_labels_metrics_are_compared_with_the_objective() -> None:
    trials = [tried(i, float(i), scores={"rankme": float(i), "lidar": -float(i)}) for i in range(4)]
    found = findings(trials, about(objective="rankme"))
    assert [(a.metric, a.against, a.tau) for a in found.kendall] == [("lidar", "rankme", -1.0)]
    assert "necessary for good features, not sufficient" in "\n".join(found.words)


# Where trials collapse


def at_points(*points: tuple[float, float, str]) -> list[TrialRecord]:
    return [
        tried(i, 0.5, status, params={TEACHER_TEMP: t, CENTER_MOMENTUM: m})
        for i, (t, m, status) in enumerate(points)
    ]


CORNER = at_points(
    (0.03, 0.98, "finished"),
    (0.075, 0.6, "finished"),
    (0.05, 0.9, "stopped"),
    (0.071, 0.95, "collapsed"),
    (0.078, 0.96, "collapsed"),
    (0.072, 0.985, "collapsed"),
)


def test_a_corner_of_collapse_takes_two_conditions() -> None:
    where = "loss.teacher_temp >= 0.071 and loss.center_momentum >= 0.95"
    assert f"All 3 trials with {where} collapsed (uniform collapse)." in said(CORNER)


def test_one_condition_is_told_where_it_is_enough() -> None:
    trials = at_points((0.03, 0.5, "finished"), (0.06, 0.9, "collapsed"), (0.07, 0.7, "collapsed"))
    assert "All 2 trials with loss.teacher_temp >= 0.06 collapsed" in said(trials)


def test_a_collapse_that_stands_alone_makes_no_border() -> None:
    trials = at_points((0.03, 0.5, "finished"), (0.06, 0.9, "collapsed"))
    assert "Trial 0001 collapsed; the settings show no clear boundary." in said(trials)
    same = [
        tried(0, params={TEACHER_TEMP: 0.05}),
        *(tried(i, 0, "collapsed", params={TEACHER_TEMP: 0.05}) for i in (1, 2)),
    ]
    assert "Trials 0001 and 0002 collapsed; the settings show no clear boundary." in said(same)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.02, 0.03, 0.0412345, 0.05, 0.08]),
            st.sampled_from([0.5, 0.9, 0.95, 0.99]),
            st.sampled_from(["finished", "stopped", "collapsed"]),
        ),
        max_size=14,
    )
)
def test_a_region_holds_collapsed_trials_alone(points: list[tuple[float, float, str]]) -> None:
    trials = at_points(*points)
    for region in collapse_regions(trials, SPACE):
        inside = [one for one in trials if all(c.holds(one.trial.params) for c in region.conditions)]
        assert {one.status for one in inside} == {"collapsed"}
        assert set(region.trials) <= {one.trial.number for one in inside}
        assert len(region.trials) >= 2


def test_good_trials_say_where_it_is_safe() -> None:
    trials = at_points(*((0.02 + 0.01 * i, 0.5, "finished") for i in range(4)))
    trials = [tried(i, 1.0 - 0.1 * i, params=one.trial.params) for i, one in enumerate(trials)]
    assert "(2) has these settings: loss.teacher_temp 0.02 to 0.03; loss.center_momentum 0.5." in said(trials)
    assert "No trial collapsed." in said(trials)


# What matters


def test_importance_is_not_told_below_eight_trials() -> None:
    trials = [tried(i, float(i), params={"a": float(i), "b": float(i % 2)}) for i in range(8)]
    space = {"a": Domain(kind="uniform", values=(0.0, 8.0)), "b": Domain(kind="uniform", values=(0.0, 1.0))}
    assert importance_of(trials[:7], space) is None
    importance = importance_of(trials, space)
    assert importance is not None
    assert list(importance) == ["a", "b"]
    assert importance["a"] > 0.7
    assert importance["b"] < 0.1
    assert importance_of([tried(i, 0.5, params={"a": float(i)}) for i in range(9)], space) is None


def test_collapsed_trials_count_as_the_worst_for_importance() -> None:
    # By their recorded scores the collapsed ones would be the best.
    trials = [
        tried(
            i, 9.0 if i > 3 else 0.5 - i / 100, "collapsed" if i > 3 else "finished", params={"a": float(i)}
        )
        for i in range(8)
    ]
    importance = importance_of(trials, {"a": Domain(kind="choice", values=tuple(map(float, range(8))))})
    assert importance == {"a": 0.0}  # each value once: nothing is between groups that is not within
    halves = {"a": Domain(kind="uniform", values=(0.0, 7.0))}
    assert (importance_of(trials, halves) or {})["a"] > 0.5


# What it cost


def test_savings_are_told_apart_by_what_ended_the_trial() -> None:
    # Of 10 CPU-hours in 50 steps a fifth was the start: 8 for 50 steps, so that the other 50 would have cost 8.
    trials = [
        tried(0, step=STEPS, cpu_hours=20.0, gpu_hours=2.0),
        tried(1, 0.0, "collapsed", step=50, cpu_hours=10.0, gpu_hours=1.0, seconds=100.0, start_seconds=20.0),
        tried(2, 0.1, "stopped", step=25, cpu_hours=5.0, gpu_hours=0.5, seconds=100.0, start_seconds=0.0),
        tried(3, None, "failed", step=10, cpu_hours=1.0),
        tried(4, status="unfinished"),
    ]
    found = findings(trials, about())
    assert (found.saving.steps_trained, found.saving.steps_full) == (175, 300)
    assert found.saving.share == pytest.approx(1 - 175 / 300)
    assert (found.saving.by_collapse.cpu, found.saving.by_collapse.gpu) == (
        pytest.approx(8.0),
        pytest.approx(0.8),
    )
    assert (found.saving.by_stopping.cpu, found.saving.by_stopping.gpu) == (
        pytest.approx(15.0),
        pytest.approx(1.5),
    )
    assert (found.cost.reserved.cpu, found.cost.reserved.gpu) == (36.0, 3.5)
    assert found.cost.seconds == 5400.0
    assert found.counts["failed"] == found.counts["unfinished"] == found.counts["collapsed"] == 1
    assert found.verdicts == {"uniform collapse": 1}
    assert (
        "Ending trials early saved 42% of the steps: 8 CPU-hours of collapsed trials, 15 CPU-hours of early"
        in said(trials)
    )


def test_a_trial_of_larger_batches_that_was_trained_to_its_end_has_saved_nothing() -> None:
    trials = [tried(0, step=STEPS), tried(1, step=STEPS // 2), tried(2, step=2 * STEPS)]
    assert findings(trials, about()).saving.steps_full == 3.5 * STEPS
    assert "Ending trials early saved" not in said(trials)
    short = [*trials, tried(3, 0.1, "stopped", step=20)]
    assert findings(short, about()).saving.share == pytest.approx(80 / 450)


# Words


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "No trial has been started yet."),
        ([tried(0)], "by other seeds. No other trial finished without a collapse."),
        ([tried(0, status="unfinished")], "1 trial: 1 unfinished."),
        ([tried(0, 0.0, "collapsed")], "There is no best trial: the only ended trial collapsed."),
        (
            [tried(i, 0.0, "collapsed") for i in range(3)],
            "There is no best trial: all 3 ended trials collapsed.",
        ),
        ([tried(0, 0.0, "collapsed")], "Uniform collapse: all images get the same"),
        ([tried(i, None, "failed", message="no\nbucket") for i in (0, 1)], "all 2 ended trials failed."),
        ([tried(0, None, "failed", message="no\nbucket")], "First error (trial 0000): no bucket"),
        ([tried(0, 0.1, "stopped")], "There is no best trial: no trial finished"),
        (
            [tried(0, params={TEACHER_TEMP: 0.08})],
            "=0.08, at the edge of the search range 0.02 to 0.08; widen the range",
        ),
        (
            [tried(0, params={TEACHER_TEMP: 0.1})],
            "=0.1, outside the search range 0.02 to 0.08; include this value",
        ),
    ],
)
def test_words_are_true_of_little_as_well(trials: list[TrialRecord], words: str) -> None:
    assert words in said(trials)
    assert said(trials, objective="loss")
    assert findings(trials, {}).words  # study.json is not there


def test_the_best_inside_the_space_is_not_called_an_edge() -> None:
    assert "edge" not in said(
        [tried(0, params={TEACHER_TEMP: 0.05, CENTER_MOMENTUM: 0.9, "optim.name": "adamw"})]
    )


def test_the_best_of_a_population_is_told_as_the_course_that_it_is() -> None:
    trials = [
        tried(0, 0.3, "stopped", origin="pb2", step=60),
        tried(1, 0.5, origin="pb2"),
        tried(2, 0.6, origin="pb2", continues=1, from_step=60),
    ]
    words = said(trials, scheduler="pb2")
    assert (
        "It copied the weights of trial 0001 at step 60 and took new settings. best.yaml has only its last settings"
        in words
    )
    assert "1 replaced by copies of better trials" in words
    assert "early-stopped" not in words
    assert "copied the weights" not in said([tried(0, 0.3, "stopped"), tried(1, 0.5)])
    assert "The best trial is 0007" in said([tried(1, 0.5, confirms=7, seed=1)])  # whose folder was removed


def test_the_loss_as_objective_is_told_with_its_own_sign_and_its_caveat() -> None:
    words = said([tried(0, -4.25, scores={"loss": 4.25})], objective="loss")
    assert "loss 4.25 with one seed" in words
    assert "loss.teacher_temp and loss.center_momentum change its value directly" in words


def test_a_whole_study_is_read_from_its_files(tmp_path: Path) -> None:
    study = write_whole_study(tmp_path)
    found = findings(read_trials(study), read_study(study))
    assert found.best is not None
    assert len(found.best.scores) == 3
    assert 0.03 < found.best.params[TEACHER_TEMP] < 0.06
    assert found.counts["all"] == 32
    assert found.counts["collapsed"] > 1
    assert found.counts["stopped"] > 1
    assert found.importance is not None
    assert next(iter(found.importance)) == TEACHER_TEMP
