"""Saves that are due by time, on a simulated clock."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.training.config import CheckpointConfig
from dinoray.pipeline.worker.save_clock import SaveClock

DAY = 86_400.0
durations = st.floats(0.01, 50)
logged = st.lists(
    st.tuples(durations, durations, st.sampled_from(["saves", "saves", "is left out"])), max_size=60
)
"""Of each logged step: seconds since the one before, seconds that a save takes there, and what becomes of it."""


def simulate(clock: SaveClock, steps: list[tuple[float, float, str]]) -> list[tuple[float, float, bool, str]]:
    """Return (start, end, was due, what became of it) of each logged step, whose save begins if it is due."""
    now, found = 0.0, []
    for since, takes, what in steps:
        now += since
        began, due = now, clock.is_due(now)
        if due and what == "saves":
            now += takes
            clock.saved(began, now)
        elif due:
            clock.left_out(now)
        found.append((began, now, due, what))
    return found


@given(minutes=st.floats(0.1, 5), steps=logged)
def test_a_save_is_due_once_so_long_has_passed_since_the_end_of_the_last(
    minutes: float, steps: list[tuple[float, float, str]]
) -> None:
    found = simulate(SaveClock(CheckpointConfig(every_minutes=minutes), now=0.0), steps)
    for i, (began, _, due, _) in enumerate(found):
        ends = [end for _, end, was_due, what in found[:i] if was_due and what == "saves"]
        tries = [end for _, end, was_due, what in found[:i] if was_due and what == "is left out"]
        least = [max([0.0, *ends]) + 60 * minutes, *(end + min(60.0, 60 * minutes) for end in tries)]
        assert due is (began >= max(least))


@given(failures=st.floats(0.1, 100), steps=logged)
def test_auto_follows_the_median_of_the_newest_saves(
    failures: float, steps: list[tuple[float, float, str]]
) -> None:
    clock = SaveClock(CheckpointConfig(every_minutes="auto", failures_per_day=failures), now=0.0)
    assert clock.interval_seconds == 60
    took = [end - began for began, end, due, what in simulate(clock, steps) if due and what == "saves"]
    if took:
        expected = math.sqrt(2 * statistics.median(took[-5:]) * DAY / failures)
        assert clock.interval_seconds == pytest.approx(expected)


def test_auto_forgets_slow_saves_once_five_others_have_followed() -> None:
    config = CheckpointConfig(every_minutes="auto")
    clock = SaveClock(config, now=0.0)
    for took in (90.0, 90.0, 90.0, 1.0, 2.0, 3.0, 4.0, 5.0):
        clock.saved(0.0, took)
    assert clock.interval_seconds == config.interval_seconds(3.0)


@given(steps=logged)
def test_nothing_is_due_by_time_if_steps_decide(steps: list[tuple[float, float, str]]) -> None:
    clock = SaveClock(CheckpointConfig(), now=0.0)
    clock.saved(0.0, 5.0)
    assert not any(due for _, _, due, _ in simulate(clock, steps))


def test_a_save_for_another_reason_counts() -> None:
    clock = SaveClock(CheckpointConfig(every_minutes=1), now=0.0)
    clock.saved(50.0, 52.0)
    assert not clock.is_due(111.9)
    assert clock.is_due(112.0)


def test_the_interval_that_follows_from_the_first_save_is_told_once() -> None:
    clock = SaveClock(CheckpointConfig(every_minutes="auto", failures_per_day=2), now=0.0)
    assert clock.saved(60.0, 60.25) == (
        "checkpoint.every_minutes=auto: one save every 2.4 minutes, because it holds training up for 0.25 s "
        "(checkpoint.failures_per_day=2)"
    )
    assert clock.saved(200.0, 200.25) is None
    assert SaveClock(CheckpointConfig(every_minutes=3), now=0.0).saved(60.0, 60.25) is None


def lost_share(interval: float, save: float, written_in: float, mean_time: float) -> float:
    """Return the share of time that saves and repeated steps take, by failures at many moments of one period.

    Training runs for `interval` seconds and is held up for `save`; the save counts `written_in` seconds after that.
    """
    period = interval + save
    moments = (np.arange(20_000) + 0.5) / 20_000 * period
    trained = np.minimum(moments, interval)  # a period begins as training goes on
    is_written = moments >= written_in
    repeated = np.where(is_written, trained, trained + interval)
    return save / period + float(repeated.mean()) / mean_time


@pytest.mark.parametrize("written_in", [0.0, 20.0, 300.0])
@pytest.mark.parametrize(("save", "failures"), [(0.2, 1.0), (3.0, 1.0), (3.0, 0.2)])
def test_auto_loses_least_however_long_a_save_is_written_in_the_background(
    save: float, failures: float, written_in: float
) -> None:
    config = CheckpointConfig(every_minutes="auto", failures_per_day=failures)
    interval = config.interval_seconds(save)
    assert interval is not None
    options = {"save": save, "written_in": min(written_in, interval / 2), "mean_time": DAY / failures}
    others = [lost_share(interval * 2**power, **options) for power in np.linspace(-1, 1, 201)]
    assert lost_share(interval, **options) <= min(others) * 1.001
    assert others[0] > 1.02 * min(others) < others[-1] / 1.02
