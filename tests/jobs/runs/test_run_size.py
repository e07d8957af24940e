"""Too few images, steps or CPU cores: what is refused, what is warned of, and that each remedy ends it."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from remedies import settings_to_set

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.recipes import RECIPES
from dinoray.jobs.runs.run_size import (
    FEW_IMAGES,
    FEW_STEPS,
    FEW_WARMUP_STEPS,
    available_cores,
    check_images,
    check_workers,
    length_warnings,
    warmup_warnings,
)
from dinoray.jobs.studies.config import StudyArguments, StudyConfig, space_of, study_config
from dinoray.jobs.studies.resources import check_study_size
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.data.listing.ignored import Ignored
from dinoray.pipeline.data.partition import batch_size_per_worker, check_accumulation
from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.worker.config import Config

on_cpus = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")


def config_of(*overrides: str, recipe: str = "demo") -> Config:
    return load_config(recipe, None, ["data.path=/data", *overrides])


def warnings(config: Config, num_images: int) -> list[str]:
    return [*length_warnings(config, num_images), *warmup_warnings(config, num_images)]


# Images and the batch


def test_seven_photos_are_no_batch_of_512() -> None:
    with pytest.raises(ConfigError) as error:
        check_images(config_of(recipe="vit_small_imagenet_vanilla"), 7)
    assert str(error.value) == (
        "train.global_batch_size=512 is more than the 7 images of data.path=/data, so a batch would hold an image up "
        "to 74 times; set train.global_batch_size=2 resources.train_workers=1, or add images"
    )


def test_a_single_image_is_refused_whatever_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"data\.path=/data holds 1 image.*add images"):
        check_images(config_of("train.global_batch_size=1", "resources.train_workers=1"), 1)


def test_few_images_are_told_with_what_is_ignored_beside_them() -> None:
    config, beside = config_of("resources.train_workers=1"), (Ignored(".heic", 24), Ignored(".zip", 1))
    for number in (1, 7):
        with pytest.raises(ConfigError, match=r"add images \(ignored: 24 \.heic, 1 \.zip; .*\)$"):
            check_images(config, number, beside)


@given(
    st.integers(2, 3000),
    st.sampled_from(sorted(RECIPES)),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_the_batch_that_is_proposed_passes(num_images: int, recipe: str, workers: int, parts: int) -> None:
    batch = 4096 // (workers * parts) * workers * parts
    asked = [
        f"train.global_batch_size={batch}",
        f"resources.train_workers={workers}",
        f"train.accumulate_steps={parts}",
    ]
    with pytest.raises(ConfigError) as error:
        check_images(config_of(*asked, recipe=recipe), num_images)
    config = config_of(*asked, *settings_to_set(str(error.value)), recipe=recipe)
    check_images(config, num_images)
    check_accumulation(
        batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers),
        config.train.accumulate_steps,
    )


# Steps and warm-ups


def test_400_photos_for_100_epochs_are_few_steps() -> None:
    config = config_of("train.global_batch_size=256", recipe="vit_small_imagenet_vanilla")
    few_images, few_steps, *_ = length_warnings(config, 400)
    assert few_images.startswith(
        "data.path=/data holds 400 images, fewer than 500: too few to train from random weights"
    )
    assert few_steps == (
        "train.epochs=100 makes 156 steps of 256 images, fewer than 300: too few to learn much; set train.epochs=192"
    )


def test_a_stage_as_long_as_the_run_is_told() -> None:
    (line,) = length_warnings(
        config_of("train.epochs=999", "init.from=/w.pth", "init.freeze_steps=1560"), 100
    )
    assert line.startswith("init.freeze_steps=1560 leaves none of 1560 steps for the backbone")
    (setting,) = settings_to_set(line)
    assert length_warnings(config_of("train.epochs=999", "init.from=/w.pth", setting), 100) == []


@pytest.mark.parametrize("setting", ["init.from=/weights.pth", "backbone.pretrained=true"])
def test_who_starts_from_weights_is_not_told_of_few_images(setting: str) -> None:
    assert length_warnings(config_of("train.epochs=999", setting), 100) == []


@given(st.integers(2, FEW_IMAGES), st.integers(1, 2000), st.floats(0.01, 20))
def test_the_epochs_that_are_proposed_make_enough_steps(num_images: int, batch: int, epochs: float) -> None:
    asked = [f"train.global_batch_size={batch}", f"train.epochs={epochs}"]
    lines = [line for line in length_warnings(config_of(*asked), num_images) if "steps of" in line]
    if lines:
        config = config_of(*asked, *settings_to_set(lines[0]))
        assert not [line for line in length_warnings(config, num_images) if "steps of" in line]
        assert Schedule(config, num_images=num_images).total_steps >= FEW_STEPS


@example(num_images=500, batch=1, epochs=0.5, warmup=0.015625, temp_epochs=0)  # an epoch is the whole run
@given(st.integers(500, 5000), st.integers(1, 500), st.floats(0.01, 50), st.floats(0, 60), st.integers(0, 60))
def test_following_all_warnings_ends_them(
    num_images: int, batch: int, epochs: float, warmup: float, temp_epochs: int
) -> None:
    asked = [f"train.global_batch_size={batch}", f"train.epochs={epochs}", f"optim.warmup_epochs={warmup}"]
    asked += [f"loss.warmup_teacher_temp_epochs={temp_epochs}", "loss.warmup_teacher_temp=0.02"]
    for _ in range(2):  # the length first, then warm-ups in it
        for line in warnings(config_of(*asked), num_images):
            asked += settings_to_set(line)
    assert warnings(config_of(*asked), num_images) == []


def test_a_warm_up_that_would_outlast_the_run_is_named() -> None:
    asked = ["train.epochs=8", "optim.warmup_epochs=10"]
    (line,) = warmup_warnings(config_of(*asked), 10_000)
    assert line == (
        "optim.warmup_epochs=10 would not end within train.epochs=8 and is cut to 375 steps; "
        "set optim.warmup_epochs=0.8"
    )
    assert warnings(config_of(*asked, *settings_to_set(line)), 10_000) == []


def test_a_warm_up_of_few_steps_is_named() -> None:
    asked = ["optim.warmup_epochs=1", "train.epochs=100"]
    (line,) = warmup_warnings(config_of(*asked), 512)
    assert line.startswith(f"optim.warmup_epochs=1 is 8 steps, fewer than {FEW_WARMUP_STEPS}")
    assert warnings(config_of(*asked, *settings_to_set(line)), 512) == []
    assert warmup_warnings(config_of("optim.warmup_epochs=0", "train.epochs=100"), 512) == []  # asked for


def test_a_warm_up_of_the_temperature_that_would_outlast_the_run_is_named() -> None:
    config = config_of("train.epochs=20", recipe="vit_small_imagenet_boost")
    (line,) = warmup_warnings(config, 1_000_000)
    assert line.startswith(
        "loss.warmup_teacher_temp_epochs=30 would not end within train.epochs=20 and is cut"
    )
    again = config_of("train.epochs=20", *settings_to_set(line), recipe="vit_small_imagenet_boost")
    assert warmup_warnings(again, 1_000_000) == []
    assert Schedule(again, num_images=10**6).at(9000) == Schedule(config, num_images=10**6).at(9000)


@pytest.mark.parametrize(
    ("recipe", "num_images"),
    [("demo", 2160), ("photos_small", 2853), *((name, 1_281_167) for name in RECIPES if "imagenet" in name)],
)
def test_a_recipe_on_the_images_that_it_is_for_has_no_warning(recipe: str, num_images: int) -> None:
    config = config_of(recipe=recipe)
    check_images(config, num_images)
    assert warnings(config, num_images) == []


# Workers


@on_cpus
@pytest.mark.parametrize("parts", [1, 3])
def test_workers_that_the_cores_cannot_carry_are_refused(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workers = 2 * available_cores() + 1
    batch = ["train.global_batch_size=" + str(12 * workers), f"train.accumulate_steps={parts}"]
    with pytest.raises(ResourceError) as error:
        check_workers(config_of(f"resources.train_workers={workers}", *batch))
    assert str(error.value).startswith(f"resources.train_workers={workers} on {available_cores()} CPU core")
    config = config_of(*batch, *settings_to_set(str(error.value)))
    assert check_workers(config) == []
    check_accumulation(
        batch_size_per_worker(config.train.global_batch_size, config.resources.train_workers), parts
    )


@on_cpus
def test_a_worker_more_than_there_are_cores_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    workers = available_cores() + 1
    batch = f"train.global_batch_size={12 * workers}"
    (line,) = check_workers(config_of(f"resources.train_workers={workers}", batch))
    assert check_workers(config_of(batch, *settings_to_set(line))) == []


def test_a_cluster_may_still_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert check_workers(config_of("resources.train_workers=64")) == []


@on_cpus
def test_gpus_that_are_not_here_are_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError, match=r"this machine has 0; set resources\.use_gpu=false") as error:
        check_workers(config_of("resources.use_gpu=true", "resources.train_workers=1"))
    assert check_workers(config_of("resources.train_workers=1", *settings_to_set(str(error.value)))) == []


# Studies


def study(*overrides: str) -> StudyConfig:
    return study_config(StudyArguments().parse_args(["--recipe", "demo", "data.path=/data", *overrides]))


def study_warnings(config: StudyConfig, num_images: int) -> list[str]:
    return check_study_size(config, space_of(config), num_images)


def test_trials_of_few_steps_are_warned_of_and_too_large_batches_refused() -> None:
    (line,) = study_warnings(study("tune.epochs=5"), 2160)
    assert line.startswith("tune.epochs=5 makes 168 steps of 64 images")
    assert study_warnings(study(*settings_to_set(line)), 2160) == []
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=64 is more than the 40 images") as error:
        study_warnings(study(), 40)
    study_warnings(study(*settings_to_set(str(error.value))), 40)


def test_a_batch_that_is_searched_is_held_against_the_images_too() -> None:
    space = "tune.space={train.global_batch_size: [64, %d], loss.teacher_temp: [0.03, 0.04]}"
    with pytest.raises(
        ConfigError, match=r"tune\.space: train\.global_batch_size=4096 .* leave out values above 1000"
    ):
        study_warnings(study(space % 4096, "tune.scheduler=none"), 1000)
    study_warnings(study(space % 512, "tune.scheduler=none"), 1000)
