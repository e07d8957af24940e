"""Numbers for `auto`: their rules at the ends and between, and that they are put in once and explained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_config

from dinoray.pipeline.training.auto import (
    center_momentum,
    out_dim,
    peak_lr,
    resolve,
    teacher_momentum,
    teacher_temp,
)
from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.training.match_weights import adapt
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step

AUTO = {
    "head": {"out_dim": "auto"},
    "loss": {"teacher_temp": "auto"},
    "teacher": {"teacher_momentum": "auto"},
}


@pytest.mark.parametrize(
    ("num_images", "prototypes"),
    [(1, 512), (8_192, 512), (40_000, 2048), (131_072, 8192), (500_000, 32_768), (10**9, 65_536)],
)
def test_there_is_a_prototype_for_each_sixteen_images(num_images: int, prototypes: int) -> None:
    assert out_dim(num_images).value == prototypes


@pytest.mark.parametrize(
    ("num_images", "temp"), [(1, 0.05), (20_000, 0.05), (141_421, 0.06), (1_000_000, 0.07), (10**9, 0.07)]
)
def test_the_temperature_rises_with_the_logarithm_of_the_images(num_images: int, temp: float) -> None:
    assert teacher_temp(num_images, warms_up=True).value == pytest.approx(temp)
    assert teacher_temp(num_images, warms_up=False).value == 0.05


@pytest.mark.parametrize(("batch", "momentum"), [(4096, 0.996), (512, 0.996), (64, 0.9995), (32, 0.99975)])
def test_the_teacher_is_slower_with_small_batches(batch: int, momentum: float) -> None:
    assert teacher_momentum(global_batch_size=batch, total_steps=10**6).value == pytest.approx(momentum)


@pytest.mark.parametrize(
    ("steps", "least", "momentum"),
    [(3, 0.98, 0.98), (1000, 0.98, 0.98), (2000, 0.98, 0.99), (2000, 0.996, 0.996), (40_000, 0.98, 0.9995)],
)
def test_the_teacher_follows_within_a_twentieth_of_the_run(steps: int, least: float, momentum: float) -> None:
    found = teacher_momentum(global_batch_size=64, total_steps=steps, least=least)
    assert found.value == pytest.approx(momentum)


@pytest.mark.parametrize(("batch", "momentum"), [(512, 0.9), (64, 0.9), (32, 0.95), (16, 0.975), (2, 0.99)])
def test_the_centre_is_the_mean_of_enough_images(batch: int, momentum: float) -> None:
    assert center_momentum(batch).value == momentum


@pytest.mark.parametrize(("batch", "peak"), [(2048, 4e-3), (512, 1e-3), (64, 5e-4), (32, 3.97e-4)])
def test_the_learning_rate_falls_slowly_below_the_published_batch(batch: int, peak: float) -> None:
    assert peak_lr(batch).value == pytest.approx(peak, rel=1e-3)


@given(st.integers(1, 10**9), st.integers(1, 10**9))
def test_more_images_never_want_less(a: int, b: int) -> None:
    few, many = sorted((a, b))
    assert out_dim(few).value <= out_dim(many).value
    assert teacher_temp(few, warms_up=True).value <= teacher_temp(many, warms_up=True).value


def test_each_number_is_put_in_and_explained() -> None:
    config, reasons = resolve(tiny_config(**AUTO), num_images=2_000_000)
    assert config.head.out_dim == 65_536
    assert config.loss.teacher_temp == 0.05  # without a warm-up
    assert config.teacher.teacher_momentum == pytest.approx(1 - 0.004 * 4 / 512, abs=1e-6)
    assert [reason.partition("=")[0] for reason in reasons] == [
        "head.out_dim",
        "loss.teacher_temp",
        "teacher.teacher_momentum",
    ]
    assert all("2,000,000 images" in reason or "1,000,000 steps" in reason for reason in reasons)


def test_what_is_not_auto_stays_and_is_not_mentioned() -> None:
    config = tiny_config()
    assert resolve(config, num_images=10) == (config, [])


def test_a_resolved_config_is_resolved() -> None:
    once = resolve(tiny_config(**AUTO), num_images=40).config
    assert resolve(once, num_images=10**6) == (once, [])


def test_a_warmup_from_above_the_chosen_temperature_is_lowered_to_it() -> None:
    loss = {"teacher_temp": "auto", "warmup_teacher_temp": 0.06, "warmup_teacher_temp_epochs": 1}
    config = resolve(tiny_config(loss=loss), num_images=100).config
    assert (config.loss.teacher_temp, config.loss.warmup_teacher_temp) == (0.05, 0.05)


def test_a_run_keeps_the_numbers_of_its_checkpoints() -> None:
    loss = {"teacher_temp": 0.02, "warmup_teacher_temp": 0.02}
    began = tiny_config(head={"out_dim": 1024}, loss=loss, teacher={"teacher_momentum": 0.99})
    config, reasons = resolve(tiny_config(**AUTO), num_images=40, began=began)
    assert (config.head.out_dim, config.loss, config.teacher) == (1024, began.loss, began.teacher)
    assert reasons[1] == "loss.teacher_temp=0.02: as this run began"


def test_a_state_is_built_and_trained_with_auto() -> None:
    changes = AUTO | {"head": {"out_dim": "auto", "hidden_dim": 16, "bottleneck_dim": 8}}
    state = build_state(tiny_config(**changes), num_images=40)
    assert len(state.dino.center) == 512
    assert state.schedule.at(0).teacher_temp == 0.05
    train_step(state, tiny_batch(tiny_config(**changes)))


def test_an_unresolved_number_is_no_number() -> None:
    with pytest.raises(ValueError, match="still auto"):
        Schedule(tiny_config(**AUTO), num_images=40).at(0)


def test_weights_of_ours_change_no_config() -> None:
    from dinoray.models.published.checkpoint import parse

    state = build_state(tiny_config(), num_images=40)
    weights = parse(state.dino.student.state_dict())._replace(official=False)
    assert adapt(tiny_config(), weights) == tiny_config()


def test_published_vits_keep_their_grid_and_their_way_of_resizing_it() -> None:
    from dinoray.models.published.checkpoint import parse

    source = build_state(tiny_config(crops={"global_crop_size": 32}), num_images=40)
    weights = parse(source.dino.student.state_dict())._replace(official=True)
    adapted = adapt(tiny_config(), weights).backbone
    assert adapted.pos_embed == "official"
    assert adapted.kwargs["img_size"] == 32
