"""Proposals: functions of seed, number and what is known; even at first, near the best later."""

import numpy as np
import pytest

from dinoray.pipeline.study.search.samplers import Known, grid_size, sampler
from dinoray.pipeline.study.space import Domain, place

SPACE = {
    "loss.teacher_temp": Domain(kind="uniform", values=(0.02, 0.12)),
    "loss.center_momentum": Domain(kind="one_minus_log", values=(0.5, 0.999)),
}


def score(params: dict) -> float:
    """Best at a temperature of 0.04 and a momentum of 0.9."""
    point = place(SPACE, params)
    return -((point["loss.teacher_temp"] - 0.2) ** 2) - (point["loss.center_momentum"] - 0.26) ** 2


def search(kind: str, num_trials: int, *, seed: int = 0, first: tuple = ()) -> list[dict]:
    propose = sampler(kind, SPACE, seed=seed, first=first, num_trials=num_trials, grid_points=3)
    known: list[Known] = []
    for number in range(num_trials):
        params, _ = propose(number, known)
        known.append(Known(number, params, score(params), {}))
    return [dict(k.params) for k in known]


@pytest.mark.parametrize("kind", ["tpe", "random", "quasi", "grid"])
def test_a_search_that_starts_again_proposes_the_same(kind: str) -> None:
    whole = search(kind, 9)
    known = [Known(n, params, score(params), {}) for n, params in enumerate(whole)]
    for number in range(9):  # anew each time, as after a kill
        propose = sampler(kind, SPACE, seed=0, first=(), num_trials=9, grid_points=3)
        assert propose(number, known[:number])[0] == whole[number]


@pytest.mark.parametrize("kind", ["tpe", "random", "quasi"])
def test_another_seed_proposes_other_points_and_no_point_comes_twice(kind: str) -> None:
    a, b = search(kind, 12), search(kind, 12, seed=1)
    assert len({str(p) for p in a}) == 12
    assert not {str(p) for p in a} & {str(p) for p in b}


def test_first_points_come_first_and_as_they_are() -> None:
    first = ({"loss.teacher_temp": 0.04, "loss.center_momentum": 0.9},)
    propose = sampler("random", SPACE, seed=0, first=first, num_trials=4, grid_points=3)
    assert propose(0, []) == (first[0], "first")
    assert propose(1, [])[1] == "random"


def test_even_points_leave_no_quarter_of_the_space_empty() -> None:
    cubes = [place(SPACE, params) for params in search("quasi", 8)]
    quarters = {(c["loss.teacher_temp"] > 0.5, c["loss.center_momentum"] > 0.5) for c in cubes}
    assert len(quarters) == 4


def test_a_grid_is_gone_through_in_order() -> None:
    points = search("grid", grid_size(SPACE, 3))
    assert len({str(p) for p in points}) == 9
    assert [p["loss.teacher_temp"] for p in points] == [0.02] * 3 + [0.07] * 3 + [0.12] * 3


def test_tpe_comes_nearer_to_the_best_than_chance() -> None:
    late = [np.mean([score(p) for p in search("tpe", 24, seed=seed)[12:]]) for seed in range(3)]
    chance = [np.mean([score(p) for p in search("random", 24, seed=seed)[12:]]) for seed in range(3)]
    assert min(late) > max(chance)


def test_tpe_keeps_away_from_where_trials_collapsed_and_from_those_that_run() -> None:
    propose = sampler("tpe", SPACE, seed=0, first=(), num_trials=30, grid_points=3)
    rng = np.random.default_rng(0)
    known = []
    for number in range(20):
        params = {"loss.teacher_temp": float(rng.uniform(0.02, 0.12)), "loss.center_momentum": 0.9}
        known.append(Known(number, params, 0.0 if params["loss.teacher_temp"] > 0.06 else 0.4, {}))
    proposed = [propose(number, known)[0]["loss.teacher_temp"] for number in range(20, 30)]
    assert sum(temp <= 0.06 for temp in proposed) >= 8


def test_trials_that_were_given_up_and_points_outside_of_the_space_are_borne() -> None:
    propose = sampler("tpe", SPACE, seed=0, first=(), num_trials=12, grid_points=3)
    inside = {"loss.teacher_temp": 0.05, "loss.center_momentum": 0.9}
    known = [
        Known(0, {"loss.teacher_temp": 0.5, "loss.center_momentum": 0.9}, 0.9, {}),
        Known(1, inside, 0.2, {10: 0.1, 20: 0.2}),
        Known(2, inside, None, {}),
    ]
    params, origin = propose(9, known)
    assert origin == "tpe"
    assert SPACE["loss.teacher_temp"].holds(params["loss.teacher_temp"])


def test_tpe_learns_which_choice_is_good() -> None:
    space = {"optim.name": Domain(kind="choice", values=("lars", "adamw", "sgd"))}
    propose = sampler("tpe", space, seed=0, first=(), num_trials=40, grid_points=3)
    known = [
        Known(n, {"optim.name": name}, 1.0 if name == "adamw" else 0.0, {})
        for n, name in enumerate(["lars", "adamw", "sgd"] * 5)
    ]
    proposed = [propose(number, known)[0]["optim.name"] for number in range(15, 35)]
    assert proposed.count("adamw") >= 12
