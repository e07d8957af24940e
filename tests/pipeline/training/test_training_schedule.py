"""The schedules of a run in steps: its length, warm-ups, rates and temperatures."""

import math
from typing import Any

import pytest
from tiny import NUM_IMAGES, tiny_config

from dinoray.pipeline.training.config import Schedule


def schedule(**changes: dict[str, Any]) -> Schedule:
    """1000 images by batches of 100: ten steps an epoch."""
    train_section = {"epochs": 10, "global_batch_size": 100} | changes.pop("train", {})
    return Schedule(tiny_config(train=train_section, **changes), num_images=1000)


def test_epochs_become_steps() -> None:
    s = schedule(optim={"warmup_epochs": 2, "freeze_last_layer_epochs": 1.5})
    assert (s.total_steps, s.warmup_steps, s.freeze_steps) == (100, 20, 15)
    assert [s.epoch(step) for step in (0, 9, 10, 99, 100)] == [0, 0, 1, 9, 10]
    assert [s.at(step).freeze_last_layer for step in (0, 14, 15)] == [True, True, False]


def test_an_epoch_that_ends_within_a_step_belongs_to_the_steps_first_image() -> None:
    s = Schedule(tiny_config(train={"epochs": 3, "global_batch_size": 4}), num_images=10)
    assert s.total_steps == 7  # 30 images, the last two of which make no batch
    assert [s.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_run_has_at_least_one_step() -> None:
    assert (
        Schedule(tiny_config(train={"epochs": 0.01, "global_batch_size": 4}), num_images=10).total_steps == 1
    )


def test_learning_rate_peaks_at_the_scaled_rate_and_ends_at_the_unscaled_least() -> None:
    s = schedule(optim={"base_lr": 0.256, "min_lr": 1e-3, "warmup_epochs": 2})
    rates = [s.at(step).lr for step in (0, 19, 20, 60, 100, 1000)]
    assert rates == pytest.approx([0, 0.1, 0.1, (0.1 + 1e-3) / 2, 1e-3, 1e-3])


def test_weight_decay_and_teacher_momentum_run_the_whole_length() -> None:
    s = schedule(optim={"weight_decay": 0.04, "final_weight_decay": 0.4}, teacher={"teacher_momentum": 0.996})
    assert [s.at(step).weight_decay for step in (0, 50, 100)] == pytest.approx([0.04, 0.22, 0.4])
    assert [s.at(step).teacher_momentum for step in (0, 50, 100)] == pytest.approx([0.996, 0.998, 1.0])


def test_teacher_temperature_climbs_a_stair_per_epoch() -> None:
    s = schedule(loss={"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 4})
    temps = [s.at(step).teacher_temp for step in (0, 9, 10, 29, 30, 99)]
    assert temps == pytest.approx([0.04, 0.04, 0.05, 0.06, 0.07, 0.07])


def test_warmups_longer_than_the_run_are_cut() -> None:
    s = schedule(
        optim={"warmup_epochs": 50},
        loss={"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 30},
    )
    assert (s.warmup_steps, s.warmup_temp_epochs) == (30, 3)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_length_that_is_no_length_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="epochs"):
        tiny_config(train={"epochs": value})


def test_a_constant_schedule_keeps_rate_decay_and_momentum_after_the_warmup() -> None:
    config = tiny_config(train={"schedule": "constant"}, optim={"warmup_epochs": 0.5, "weight_decay": 0.04})
    schedule = Schedule(config, num_images=NUM_IMAGES)
    assert schedule.at(0).lr == 0
    first, last = schedule.at(5), schedule.at(10**7)
    assert (first.lr, first.weight_decay, first.teacher_momentum) == pytest.approx((1e-3, 0.04, 0.996))
    assert (last.lr, last.weight_decay, last.teacher_momentum) == (
        first.lr,
        first.weight_decay,
        first.teacher_momentum,
    )
