"""A population on a Ray of its own: weak members take over from strong ones, each life a trial of its own."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs_processes import run_job
from ray.tune.experiment import Trial as TuneTrial
from test_tune import arguments, images  # noqa: F401  # images is a fixture

from dinoray.jobs.cli.config import load
from dinoray.jobs.studies.config import StudyConfig
from dinoray.jobs.studies.trial import TrialRunner
from dinoray.models.errors import ConfigError
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease_keeper import Fence
from dinoray.pipeline.study.objective import Objective
from dinoray.pipeline.study.search.plan import StudyPlan
from dinoray.pipeline.study.search.population import ExploitRounds, _Population
from dinoray.pipeline.study.trials import Trial, read_trials, write_trial


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.slow
def test_weak_members_go_on_from_strong_ones_with_other_settings(images: Path, tmp_path: Path) -> None:  # noqa: F811
    members = 2
    # Members begin at different times: the first still has evaluations before it when the last has told its second.
    shared = arguments(images, tmp_path, "population", "train.epochs=64", "tune.evaluations=24")
    output = run_job(
        "jobs.tune",
        *(a for a in shared if not a.startswith(("tune.space", "tune.first"))),
        "tune.space={loss.teacher_temp: {uniform: [0.03, 0.06]}, optim.base_lr: {log: [1e-4, 1e-2]}}",
        "tune.scheduler=pb2",
        f"tune.trials={members}",
        "tune.objective=rankme",  # no two of them are equal
    )
    study = Directory(str(tmp_path / "population"))
    tried = {t.trial.number: t for t in read_trials(study)}
    taken = [t for t in tried.values() if t.trial.continues is not None]
    assert taken, output  # somebody was the worst
    assert all(t.outcome for t in tried.values())
    settings = [tuple(t.trial.params.values()) for t in tried.values()]
    assert len(set(settings)) == len(settings), output
    for t in taken:
        donor = tried[t.trial.continues or 0]
        before = tried[t.trial.number - members]
        assert before.status == "stopped"
        assert f"replaced by a copy of trial {donor.trial.name}" in before.outcome.message  # type: ignore[union-attr]
        lines = (tmp_path / "population" / "trials" / t.trial.name / "metrics.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
        assert steps[0] == t.trial.from_step + 1  # not from the start
    last = {number % members: t for number, t in sorted(tried.items())}
    assert {t.status for t in last.values()} <= {"finished", "collapsed"}
    assert (tmp_path / "population" / "best.yaml").exists()


def test_a_member_whose_process_died_keeps_the_settings_that_it_was_at() -> None:
    member = TuneTrial("member", stub=True, config={"member": {"slot": 0, "optim.base_lr": 0.25}})
    nothing, population = SimpleNamespace(search_alg=None), _Population(["optim.base_lr"])
    population.on_trial_add(nothing, member)
    assert member.config["optim.base_lr"] == 0.25
    state = population._trial_state[member]
    member.config["optim.base_lr"] = 0.75  # it has taken over from another one
    population.on_trial_add(nothing, member)  # Tune adds it anew
    assert member.config["optim.base_lr"] == 0.75
    assert population._trial_state[member] is state


@pytest.mark.parametrize("seed", range(12))
def test_who_takes_over_never_trains_with_the_settings_of_the_other(seed: int) -> None:
    np.random.seed(seed)
    keys, nothing = ["loss.teacher_temp", "optim.base_lr"], SimpleNamespace(search_alg=None)
    population, members = _Population(keys), []
    for slot in range(2):
        point = dict(zip(keys, np.random.uniform(size=2).tolist(), strict=True))
        members.append(TuneTrial("member", stub=True, config={"member": {"slot": slot, **point}}))
        population.on_trial_add(nothing, members[-1])
        for step, score in ((8, 4.8), (16, 4.7 + 0.05 * slot)):
            state = population._trial_state[members[-1]]
            population._save_trial_state(state, step, {"step": step, "score": score}, members[-1])
    weak, best = members
    chosen, _ = population._get_new_config(weak, best)
    point, donor = ([config[key] for key in keys] for config in (chosen, best.config))
    assert max(abs(mine - its) for mine, its in zip(point, donor, strict=True)) > 1e-3
    assert all(0 <= value <= 1 for value in point)
    noted = population.data.iloc[-1]  # what PB2 reckons with from now on
    assert noted["Trial"] == str(weak)
    assert [noted[key] for key in keys] == pytest.approx(point, abs=1e-6)


def donors(
    rounds: ExploitRounds, scores: dict[int, dict[int, float]], order: list[tuple[int, int]]
) -> dict[int, int]:
    """Who took over from whom, all scores told in this order of (member, step)."""
    found = {
        member: rounds.observe(member, step, scores[member][step], list(scores)) for member, step in order
    }
    return {member: donor for member, donor in found.items() if donor is not None}


def test_the_first_round_judges_nobody_and_the_second_the_worst_by_scores_of_the_same_step() -> None:
    scores = {0: {6: 0.1, 12: 0.2}, 1: {6: 0.5, 12: 0.6}, 2: {6: 0.9, 12: 0.7}}
    rounds = ExploitRounds()
    assert donors(rounds, scores, [(1, 6), (2, 6), (0, 6)]) == {}
    assert donors(rounds, scores, [(1, 12), (2, 12), (0, 12)]) == {0: 2}


def test_a_weak_member_that_came_first_takes_over_when_it_tells_its_next_score() -> None:
    scores = {0: {6: 0.1, 12: 0.2, 18: 0.9}, 1: {6: 0.5, 12: 0.6, 18: 0.7}}
    rounds = ExploitRounds()
    assert donors(rounds, scores, [(0, 6), (0, 12), (1, 6), (1, 12)]) == {}
    assert donors(rounds, scores, [(0, 18)]) == {0: 1}
    rounds.record_copy(0, 1)
    # It is where the other one is: there is nothing to choose between them before both have told more.
    assert donors(rounds, scores, [(1, 18)]) == {}


def test_who_took_over_is_neither_weak_nor_a_donor_by_scores_of_another() -> None:
    scores = {
        0: {6: 0.5, 12: 0.9, 18: 0.95},
        1: {6: 0.4, 12: 0.8, 18: 0.7, 24: 0.7},
        2: {6: 0.3, 12: 0.1, 18: 0.2},
    }
    rounds = ExploitRounds()
    order = [(2, 6), (2, 12), (0, 6), (1, 6), (0, 12), (1, 12), (0, 18), (2, 18)]
    assert donors(rounds, scores, order) == {2: 0}
    rounds.record_copy(2, 0)  # with the 0.95 of step 18, which it has not trained for
    assert donors(rounds, scores, [(1, 18)]) == {1: 0}


def test_a_round_is_judged_once_so_that_nobody_is_weak_for_want_of_the_weakest() -> None:
    scores = {0: {6: 0.1, 12: 0.2}, 1: {6: 0.5, 12: 0.6, 18: 0.6}, 2: {6: 0.9, 12: 0.8, 18: 0.9}}
    rounds = ExploitRounds()
    assert donors(rounds, scores, [(1, 6), (2, 6), (0, 6), (1, 12), (2, 12), (0, 12)]) == {0: 2}
    rounds.record_copy(0, 2)
    assert donors(rounds, scores, [(1, 18), (2, 18)]) == {}


def test_a_score_that_rises_with_time_makes_nobody_weak_who_is_behind() -> None:
    scores = {0: {6: 0.3, 12: 0.5}, 1: {6: 0.2, 12: 0.4, 18: 0.6, 24: 0.8}}
    order = [(1, 6), (1, 12), (1, 18), (0, 6), (0, 12), (1, 24)]
    assert donors(ExploitRounds(), scores, order) == {1: 0}


def test_nobody_takes_over_from_a_member_that_has_ended_or_is_no_better() -> None:
    rounds = ExploitRounds()
    scores = {0: {6: 0.1, 12: 0.2}, 1: {6: 0.5, 12: 0.6}}
    assert donors(rounds, scores, [(0, 6), (0, 12), (1, 6), (1, 12)]) == {}
    assert rounds.observe(0, 18, 0.1, [0]) is None
    even = {0: {6: 0.5, 12: 0.5}, 1: {6: 0.5, 12: 0.5}}
    assert donors(ExploitRounds(), even, [(0, 6), (1, 6), (0, 12), (1, 12)]) == {}


@given(st.lists(st.integers(0, 20), min_size=2, max_size=12))
def test_the_worst_quarter_takes_over_and_only_from_the_best_quarter(observe: list[int]) -> None:
    living, rounds = range(len(observe)), ExploitRounds()
    for member in living:
        rounds.observe(member, 1, observe[member], living)
    found = {member: rounds.observe(member, 2, observe[member], living) for member in living}
    # Judged when the last one has told; the others hear of it at their next score.
    found |= {member: rounds.observe(member, 3, observe[member], living) for member in living[:-1]}
    taken = {member: donor for member, donor in found.items() if donor is not None}
    quarter = sorted(observe)[: max(1, -(-len(observe) // 4))]
    assert len(taken) <= len(quarter)
    assert all(
        observe[member] <= quarter[-1] and observe[member] < observe[donor] for member, donor in taken.items()
    )
    assert len(set(taken.values())) == len(taken)
    if len(set(observe)) == len(observe):
        assert sorted(observe[member] for member in taken) == quarter


def test_settings_that_do_not_go_together_fail_their_trial_and_not_the_study(tmp_path: Path) -> None:
    directory, trial = Directory(str(tmp_path)), Trial(4, {}, 0, "pb2", continues=1, from_step=6)
    write_trial(directory, trial)

    def begin() -> NoReturn:
        raise ConfigError("loss.center_momentum has no effect")

    plan = StudyPlan(1, cpus_each=1, gpus_each=0, augment_actors=(1, 1), cpus_shared=0, cpus=4, gpus=0)
    config, objective = load(StudyConfig, "demo", None, []), Objective("knn_20", "")
    TrialRunner(directory, config, [], objective, plan, Fence(directory, ""))._run(trial, begin)
    (found,) = read_trials(directory)
    assert found.outcome is not None
    assert (found.outcome.status, found.outcome.message) == ("failed", "loss.center_momentum has no effect")
