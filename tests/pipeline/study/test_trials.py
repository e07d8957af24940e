"""What a study remembers and what is left to do in it: from files alone, exactly, and never from damaged ones."""

import json
import math
from pathlib import Path

import pytest
from studies import tried, write_tried

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.objective import Objective
from dinoray.pipeline.study.search.progress import confirmations, course, known, member_start, next_number
from dinoray.pipeline.study.space import Domain
from dinoray.pipeline.study.trials import (
    Outcome,
    Trial,
    TrialRecord,
    evaluations,
    read_study,
    read_trials,
    write_outcome,
    write_trial,
)
from dinoray.pipeline.tracking.records import Records

KNN = Objective("knn_20", "")


def records(*lines: dict) -> Records:
    return Records(b"".join(json.dumps(line).encode() + b"\n" for line in lines))


def test_what_was_written_is_read_back_to_the_last_digit(tmp_path: Path) -> None:
    study = Directory(str(tmp_path))
    trial = Trial(7, {"optim.min_lr": 1e-05, "optim.name": "sgd", "crops.hue": 0.1}, 3, "tpe", confirms=2)
    outcome = Outcome("finished", 0.1 + 0.2, 12, scores={"knn_20": 1e-07}, seconds=1.5)
    write_trial(study, trial)
    assert [(t.trial, t.outcome) for t in read_trials(study)] == [(trial, None)]
    write_outcome(study, trial, outcome)
    (found,) = read_trials(study)
    assert (found.trial, found.outcome, found.status) == (trial, outcome, "finished")
    assert len(found.records) == 0


def test_trials_that_have_ended_are_not_read_again(tmp_path: Path) -> None:
    study = Directory(str(tmp_path))
    write_tried(study, tried(0))
    write_tried(study, tried(1, status="unfinished"))
    ended = {0: read_trials(study)[0]}
    (tmp_path / "trials" / "0000" / "outcome.json").write_bytes(b"{")
    found = read_trials(study, ended=ended)
    assert found[0] is ended[0]
    assert [t.trial.number for t in found] == [0, 1]


def test_trials_come_in_the_order_of_their_numbers_however_many(tmp_path: Path) -> None:
    study = Directory(str(tmp_path))
    for number in (12345, 3, 9999, 10000):
        write_trial(study, Trial(number, {}, 0, "random"))
    assert [t.trial.number for t in read_trials(study)] == [3, 9999, 10000, 12345]


def test_there_is_nothing_in_a_study_that_has_not_begun_nor_in_a_folder_without_a_trial(
    tmp_path: Path,
) -> None:
    assert read_trials(Directory(str(tmp_path))) == []
    assert read_study(Directory(str(tmp_path))) == {}
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    assert read_trials(Directory(str(tmp_path))) == []


@pytest.mark.parametrize("damaged", [b"{", b"[]", b'{"number": 1}', b'{"status": "finished", "colour": 3}'])
@pytest.mark.parametrize("name", ["trial.json", "outcome.json"])
def test_a_damaged_file_is_named_and_its_trial_not_run_again(
    tmp_path: Path, name: str, damaged: bytes
) -> None:
    study = Directory(str(tmp_path))
    write_tried(study, tried(0))
    (tmp_path / "trials" / "0000" / name).write_bytes(damaged)
    with pytest.raises(DataError, match=f"trials/0000/{name} is damaged"):
        read_trials(study)


def test_evaluations_have_the_loss_of_their_step_and_nothing_that_is_not_finite() -> None:
    found = evaluations(
        records(
            {"step": 0, "knn_20": 0.1, "rankme": 5.0},
            {"step": 4, "loss": 3.0},
            {"step": 8, "loss": 2.5},
            {"step": 8, "knn_20": 0.3, "rankme": math.inf, "lidar": 7.0, "majority": 0.2},
        )
    )
    assert found == {
        0: {"knn_20": 0.1, "rankme": 5.0},
        8: {"knn_20": 0.3, "lidar": 7.0, "majority": 0.2, "loss": 2.5},
    }


def test_the_course_of_a_trial_leaves_out_its_start_and_what_it_will_evaluate_again() -> None:
    one = TrialRecord(
        Trial(0, {}, 0, "tpe"),
        None,
        records(
            *({"step": step, "knn_20": step / 100} for step in (0, 10, 20, 30)), {"step": 20, "loss": 1.0}
        ),
    )
    assert course(one, KNN) == {10: 0.1, 20: 0.2, 30: 0.3}
    assert course(one, KNN, up_to=20) == {10: 0.1, 20: 0.2}
    assert course(one, KNN, up_to=0) == {}


def test_a_sampler_knows_who_finished_who_runs_who_failed_and_how_far_those_came_that_were_given_up() -> None:
    given_up = TrialRecord(
        Trial(3, {"a": 3}, 0, "tpe"), Outcome("stopped", 0.2, 10), records({"step": 10, "knn_20": 0.2})
    )
    found = known(
        [
            tried(0, 0.5, params={"a": 0}),
            tried(1, None, "failed", params={"a": 1}),
            tried(2, status="unfinished", params={"a": 2}),
            given_up,
            tried(4, 0.0, "collapsed", params={"a": 4}),
            tried(5, 0.6, confirms=0, seed=1),
        ],
        KNN,
        worst=-7.0,
    )
    assert [(k.params["a"], k.score, k.course) for k in found] == [
        (0, 0.5, {}),
        (1, -7.0, {}),
        (2, None, {}),
        (3, 0.2, {10: 0.2}),
        (4, 0.0, {}),
    ]


@pytest.mark.parametrize(
    ("params", "told"),
    [({"a": 0.9}, "a uniform: [0, 0.5]: trial 0002, which goes on, is at 0.9"), ({"b": 0.1}, "has none")],
)
def test_a_member_that_is_not_in_a_changed_space_is_named_with_the_setting(params: dict, told: str) -> None:
    space = {"a": Domain(kind="uniform", values=(0, 0.5))}
    with pytest.raises(ConfigError) as error:
        member_start(space, Trial(2, params, 0, "pb2"))
    assert told in str(error.value)
    assert member_start(space, Trial(2, {"a": 0.25}, 0, "pb2")) == {"a": 0.5}


def test_the_best_that_finished_are_confirmed_with_the_seeds_that_they_lack() -> None:
    trials = [
        tried(0, 0.5, params={"a": 0}),
        tried(1, 0.9, "stopped"),
        tried(2, 0.7, params={"a": 2}),
        tried(3, 0.6, params={"a": 3}),
        tried(4, 0.71, confirms=2, seed=1, params={"a": 2}),
    ]
    assert confirmations(trials, top=2, num_seeds=3) == [
        Trial(5, {"a": 2}, 2, "confirm", confirms=2),
        Trial(6, {"a": 3}, 1, "confirm", confirms=3),
        Trial(7, {"a": 3}, 2, "confirm", confirms=3),
    ]
    assert confirmations(trials, top=0, num_seeds=3) == []
    assert confirmations([], top=3, num_seeds=3) == []
    assert next_number(trials) == 5
