"""Domains map the unit cube onto values and back; a config's tree becomes domains, or says what is wrong with it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.study.space import CENTER_MOMENTUM, Domain, at, default_space, grid, parse_space, place
from dinoray.pipeline.training.config import DINOConfig

TEMP = Domain(kind="uniform", values=(0.02, 0.08))
MOMENTUM = Domain(kind="one_minus_log", values=(0.5, 0.99))
RATE = Domain(kind="log", values=(1e-4, 1e-2))
EPOCHS = Domain(kind="int", values=(3, 7))
NAME = Domain(kind="choice", values=("adamw", "sgd", "lars"))
ALL = (TEMP, MOMENTUM, RATE, EPOCHS, NAME)


def test_the_middle_of_each_scale_is_what_a_person_expects() -> None:
    assert TEMP.at(0.5) == 0.05
    assert RATE.at(0.5) == 0.001
    assert MOMENTUM.at(0.5) == pytest.approx(1 - math.sqrt(0.5 * 0.01), abs=1e-4)
    assert EPOCHS.at(0.5) == 5
    assert NAME.at(0.5) == "sgd"


@pytest.mark.parametrize("domain", ALL)
def test_the_ends_are_reached_and_never_passed(domain: Domain) -> None:
    assert (domain.at(0.0), domain.at(1.0)) == (domain.values[0], domain.values[-1])


@pytest.mark.parametrize("domain", ALL)
@given(u=st.floats(0, 1))
def test_a_value_lies_where_it_was_taken_from(domain: Domain, u: float) -> None:
    value = domain.at(u)
    assert domain.holds(value)
    step = {"int": 1 / 5, "choice": 1 / 3}.get(domain.kind, 2e-3)  # four digits of the value
    assert abs(domain.place(value) - u) <= step
    assert domain.at(domain.place(value)) == value


@given(u=st.floats(0, 1))
def test_momenta_have_as_much_room_from_090_to_099_as_from_0_to_090(u: float) -> None:
    wide = Domain(kind="one_minus_log", values=(0.0, 0.99))
    assert (wide.at(u) <= 0.9) is (u <= 0.5) or abs(u - 0.5) < 1e-3


def test_numbers_are_short_enough_to_be_read() -> None:
    assert len(str(TEMP.at(0.123456789))) <= 8
    assert MOMENTUM.at(0.31) == 0.8513


def test_a_value_outside_has_no_place() -> None:
    with pytest.raises(ValueError, match=r"0\.5 is not within uniform: \[0\.02, 0\.08\]"):
        TEMP.place(0.5)
    assert not NAME.holds("adam")


def test_a_grid_is_every_combination_with_the_ends_of_each_range() -> None:
    points = grid({"a": TEMP, "b": NAME}, 3)
    assert len(points) == 9
    assert points[0] == {"a": 0.02, "b": "adamw"}
    assert points[-1] == {"a": 0.08, "b": "lars"}
    assert [p["a"] for p in points[::3]] == [0.02, 0.05, 0.08]
    assert grid({"a": EPOCHS}, 10) == [{"a": n} for n in (3, 4, 5, 6, 7)]
    assert grid({"a": TEMP}, 1) == [{"a": 0.05}]


def test_points_of_the_cube_become_values_and_back() -> None:
    space = {"a": TEMP, "b": NAME}
    params = at(space, {"a": 0.5, "b": 0.9, "other": 0.1})
    assert params == {"a": 0.05, "b": "lars"}
    assert place(space, params) == {"a": pytest.approx(0.5), "b": pytest.approx(5 / 6)}


def test_a_tree_may_be_dotted_nested_or_both_and_a_list_is_a_choice() -> None:
    space = parse_space(
        {
            "loss.teacher_temp": {"uniform": [0.02, 0.08]},
            "loss": {"center_momentum": {"one_minus_log": [0.5, 0.99]}},
            "optim": {"name": ["adamw", "sgd"]},
        }
    )
    assert list(space) == ["loss.teacher_temp", CENTER_MOMENTUM, "optim.name"]
    assert space["optim.name"] == Domain(kind="choice", values=("adamw", "sgd"))


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ([1, 2], "must be a mapping"),
        ({"a": 3}, "a: 3 is not a domain; write {uniform"),
        ({"a": {"uniform": [1, 2], "log": [1, 2]}}, "not a domain"),
        ({"a": {"uniform": 3}}, "uniform: 3 must be a list"),
        ({"a": {"uniform": [0.1, 0.1]}}, r"uniform: \[0\.1, 0\.1\] must be \[least, largest\]"),
        ({"a": {"uniform": ["x", 2]}}, "two numbers in order"),
        ({"a": {"uniform": [True, 2]}}, "two numbers in order"),
        ({"a": {"log": [0, 1]}}, "must be above 0"),
        ({"a": {"one_minus_log": [0.5, 1]}}, r"must be within \[0, 1\)"),
        ({"a": {"int": [1.5, 3]}}, "two whole numbers"),
        ({"a": {"choice": [1]}}, "two different values"),
        ({"a": {"choice": [1, 1]}}, "two different values"),
    ],
)
def test_what_is_no_space_says_which_key_and_what_to_write(tree: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_space(tree)


def test_the_default_space_is_the_published_safe_region_with_its_borders() -> None:
    space = default_space(DINOConfig.model_validate({"train": {"epochs": 100}}))
    assert space["loss.teacher_temp"].values == (0.02, 0.08)
    assert space["loss.warmup_teacher_temp_epochs"] == Domain(kind="int", values=(10, 30))
    assert space["loss.center_momentum"] == MOMENTUM


def test_the_default_space_has_no_centre_where_there_is_none_and_no_warm_up_where_a_run_is_too_short() -> (
    None
):
    config = DINOConfig.model_validate({"train": {"epochs": 2}, "loss": {"centering": "sinkhorn_knopp"}})
    assert list(default_space(config)) == ["loss.teacher_temp"]
