"""Schedules: values that one can check by hand, and the published tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import published_cosine, published_temps

from dinoray.models.schedules import cap_warmup, teacher_temp, warmup_constant, warmup_cosine


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, 0.0),  # the first step of the warm-up moves nothing
        (4, 2.0),  # half-way up the ramp 0, 0.5, ..., 4
        (8, 4.0),  # the ramp's last step: the peak
        (9, 4.0),  # the cosine starts at the peak
        (9 + 10, 3.0),  # half-way down a cosine of 20 steps from 4 to 2
        (9 + 20, 2.0),  # one past the last step
        (1000, 2.0),  # far beyond
    ],
)
def test_warmup_then_cosine(step: int, value: float) -> None:
    assert warmup_cosine(step, base=4, final=2, total_steps=29, warmup_steps=9) == pytest.approx(value)


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.04), (50, 0.22), (25, 0.04 + 0.36 * 0.1464466), (100, 0.4), (101, 0.4)]
)
def test_weight_decay_rises_along_a_cosine(step: int, value: float) -> None:
    assert warmup_cosine(step, base=0.04, final=0.4, total_steps=100) == pytest.approx(value)


def test_a_warmup_of_one_step_is_a_step_at_zero() -> None:
    values = [warmup_cosine(step, base=4, final=0, total_steps=5, warmup_steps=1) for step in range(2)]
    assert values == [0, 4]


def test_a_run_of_one_step_has_a_value() -> None:
    assert warmup_cosine(0, base=4, final=2, total_steps=1) == 4
    assert warmup_cosine(1, base=4, final=2, total_steps=1) == 2


@given(
    base=st.floats(1e-6, 1),
    final=st.floats(0, 1),
    total_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 59),
)
def test_every_step_equals_the_published_table(
    base: float, final: float, total_steps: int, warmup_steps: int
) -> None:
    warmup_steps = min(warmup_steps, total_steps - 1)
    table = published_cosine(base, final, total_steps=total_steps, warmup_steps=warmup_steps)
    ours = [
        warmup_cosine(step, base=base, final=final, total_steps=total_steps, warmup_steps=warmup_steps)
        for step in range(total_steps)
    ]
    assert ours == pytest.approx(table, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 0.04), (1, 0.05), (2, 0.06), (3, 0.07), (4, 0.07), (999, 0.07)]
)
def test_teacher_temperature_climbs_even_stairs(epoch: int, value: float) -> None:
    assert teacher_temp(epoch, base=0.07, warmup=0.04, warmup_epochs=4) == pytest.approx(value)


def test_without_a_warmup_the_temperature_is_final_at_once() -> None:
    assert teacher_temp(0, base=0.07, warmup=0.04, warmup_epochs=0) == 0.07


@pytest.mark.parametrize("warmup_epochs", [0, 1, 2, 30])
def test_teacher_temperature_equals_the_published_table(warmup_epochs: int) -> None:
    table = published_temps(0.07, 0.04, warmup_epochs=warmup_epochs, epochs=40)
    ours = [teacher_temp(epoch, base=0.07, warmup=0.04, warmup_epochs=warmup_epochs) for epoch in range(40)]
    assert ours == pytest.approx(table)


@pytest.mark.parametrize(
    ("warmup", "total", "capped"),
    [(0, 10, 0), (9, 10, 9), (10, 10, 3), (37_500, 1000, 300), (1, 1, 0), (5, 3, 0)],
)
def test_a_warmup_that_would_not_end_is_cut_to_three_tenths(warmup: int, total: int, capped: int) -> None:
    assert cap_warmup(warmup, total) == capped


@pytest.mark.parametrize(("step", "value"), [(0, 0.0), (4, 2.0), (8, 4.0), (9, 4.0), (10**9, 4.0)])
def test_a_constant_schedule_warms_up_and_stays(step: int, value: float) -> None:
    assert warmup_constant(step, base=4, warmup_steps=9) == pytest.approx(value)


def test_a_constant_schedule_without_warmup_is_constant() -> None:
    assert [warmup_constant(step, base=4) for step in (0, 1, 99)] == [4, 4, 4]
