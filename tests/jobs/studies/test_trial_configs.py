"""What comes of the config of a study: its space, its first points, and the runs of a trial's parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_configs import NUM_IMAGES, study

from dinoray.jobs.cli.config import differences, load_config
from dinoray.jobs.studies.config import (
    StudyConfig,
    candidate,
    first_points,
    grace_steps,
    num_trials,
    objective_of,
    schedule_of,
    space_of,
    trial_config,
)
from dinoray.models.errors import ConfigError
from dinoray.pipeline.study.space import default_space, grid


def trial(config: StudyConfig, **params: object) -> object:
    values = {key.replace("__", "."): value for key, value in params.items()}
    return trial_config(config, values, name="0003", storage_path="/s/trials", seed=5, num_images=NUM_IMAGES)


def test_the_recipe_is_tried_first_then_what_was_asked_for_completed_by_the_recipe() -> None:
    config = study(
        "tune.first=[{loss.teacher_temp: 0.06}]",
        "tune.space={loss.teacher_temp: {uniform: [0.02, 0.08]}, loss.center_momentum: {one_minus_log: [0.5, 0.99]}}",
    )
    points = first_points(config, space_of(config))
    assert points == [
        {"loss.teacher_temp": 0.03, "loss.center_momentum": 0.9},
        {"loss.teacher_temp": 0.06, "loss.center_momentum": 0.9},
    ]


def test_no_first_point_is_dropped_for_want_of_trials() -> None:
    few = ["tune.first=[{loss.teacher_temp: 0.05}, {loss.teacher_temp: 0.06}]", "tune.trials=2"]
    config = study(*few)
    with pytest.raises(
        ConfigError, match=r"tune\.trials=2: too few for the 3 points .* or tune\.try_recipe=false"
    ):
        first_points(config, space_of(config))
    for enough in ("tune.trials=3", "tune.try_recipe=false", "tune.searcher=grid"):
        config = study(*few, enough)
        assert first_points(config, space_of(config))[-1]["loss.teacher_temp"] == 0.06


def test_the_default_study_has_labels_and_the_default_space() -> None:
    config = study()
    space = space_of(config)
    assert space == default_space(config.algorithm())
    assert objective_of(config, space).metric == "knn_20"
    assert num_trials(config, space) == 16
    assert config.name == "demo-study"


def test_a_grid_is_as_many_trials_as_it_has_points() -> None:
    config = study(
        "tune.searcher=grid",
        "tune.grid_points=3",
        "tune.space={loss.teacher_temp: {uniform: [0.02, 0.08]}, optim.name: [adamw, sgd]}",
    )
    assert num_trials(config, space_of(config)) == 6
    assert first_points(config, space_of(config)) == []


def test_a_trial_is_the_run_made_short_with_warm_ups_of_a_third_at_most() -> None:
    config = study(
        "train.epochs=24",
        "tune.epochs=6",
        "optim.warmup_epochs=4",
        "loss.warmup_teacher_temp_epochs=8",
        "loss.teacher_temp=0.05",
        "tune.evaluations=5",
    )
    made = trial(config, loss__teacher_temp=0.06)
    assert made.train.epochs == 6  # type: ignore[attr-defined]
    assert made.optim.warmup_epochs == pytest.approx(1.8)  # type: ignore[attr-defined]
    assert made.loss.warmup_teacher_temp_epochs == 2  # type: ignore[attr-defined]
    assert made.loss.teacher_temp == 0.06  # type: ignore[attr-defined]
    assert made.train.seed == 5  # type: ignore[attr-defined]
    assert (made.name, made.storage_path) == ("0003", "/s/trials")  # type: ignore[attr-defined]
    total = schedule_of(made, num_images=NUM_IMAGES).total_steps  # type: ignore[arg-type]
    assert total == 202
    assert made.eval.every_steps == made.checkpoint.every_steps == 41  # type: ignore[attr-defined]
    assert made.health.on_collapse == "stop"  # type: ignore[attr-defined]
    assert made.eval.lidar  # type: ignore[attr-defined]


def test_a_trial_is_saved_where_it_is_evaluated_whatever_the_clock_says() -> None:
    made = trial(study("checkpoint.every_minutes=auto", "checkpoint.num_best_to_keep=2"))
    checkpoint = made.checkpoint  # type: ignore[attr-defined]
    assert (checkpoint.every_minutes, checkpoint.num_best_to_keep, checkpoint.num_to_keep) == (None, 2, 3)
    assert checkpoint.every_steps == made.eval.every_steps  # type: ignore[attr-defined]
    others_copy_any = trial(study("tune.scheduler=pb2", "tune.evaluations=5")).checkpoint  # type: ignore[attr-defined]
    assert others_copy_any.num_to_keep == 6


def test_a_trial_waits_for_its_scores() -> None:
    made = trial(study("eval.where=side", "resources.evaluator_cpus=2"))
    assert made.eval.where == "train"  # type: ignore[attr-defined]
    assert made.resources.evaluator_cpus == 0  # type: ignore[attr-defined]


def test_a_warm_up_that_is_searched_keeps_its_share_of_the_run() -> None:
    config = study("data.path=x", "train.epochs=300", "tune.epochs=20", recipe="vit_small_imagenet_boost")
    shares = [
        trial(config, loss__warmup_teacher_temp_epochs=n).loss.warmup_teacher_temp_epochs
        for n in (30, 60, 90)
    ]  # type: ignore[attr-defined]
    assert shares == [2, 4, 6]
    assert trial(config).loss.warmup_teacher_temp_epochs == 6  # type: ignore[attr-defined]  # 30, up to 30 % of 20


def test_the_default_space_has_no_warm_up_that_would_be_the_same_in_every_short_trial() -> None:
    assert "loss.warmup_teacher_temp_epochs" in space_of(study())
    assert "loss.warmup_teacher_temp_epochs" not in space_of(study("tune.epochs=1"))


def test_a_choice_of_mappings_replaces_what_the_run_had() -> None:
    made = candidate(study(), {"backbone.kwargs": {"depth": 2}})
    assert made.backbone.kwargs == {"depth": 2}  # not the recipe's embed_dim beside it


def test_a_population_begins_within_its_space() -> None:
    outside = [
        "tune.scheduler=pb2",
        "tune.space={loss.teacher_temp: {uniform: [0.04, 0.06]}}",
    ]  # the recipe has 0.03
    config = study(*outside)
    assert first_points(config, space_of(config)) == []
    config = study(*outside, "tune.first=[{loss.teacher_temp: 0.09}]")
    with pytest.raises(ConfigError, match=r"outside of tune\.space, which tune\.scheduler=pb2 cannot leave"):
        first_points(config, space_of(config))


def test_every_trial_measures_what_any_objective_asks_for() -> None:
    made = trial(study("eval.val_path=null", "eval.label_free=false"))
    assert (made.eval.label_free, made.eval.lidar) == (True, True)  # type: ignore[attr-defined]


def test_a_short_warm_up_of_the_temperature_does_not_vanish() -> None:
    config = study(
        "train.epochs=24", "tune.epochs=2", "loss.warmup_teacher_temp_epochs=3", "loss.teacher_temp=0.05"
    )
    assert trial(config).loss.warmup_teacher_temp_epochs == 1  # type: ignore[attr-defined]


def test_a_sharp_temperature_is_not_warmed_up_from_above() -> None:
    config = study("loss.warmup_teacher_temp_epochs=0", "loss.warmup_teacher_temp=0.04")
    made = candidate(config, {"loss.teacher_temp": 0.025, "loss.warmup_teacher_temp_epochs": 5})
    assert made.loss.warmup_teacher_temp == 0.025
    assert candidate(config, {"loss.teacher_temp": 0.07}).loss.warmup_teacher_temp == 0.04


@pytest.mark.parametrize(
    ("base", "space"),
    [
        (
            [],
            "{loss.teacher_temp: {uniform: [0.02, 0.08]}, loss.center_momentum: {one_minus_log: [0.5, 0.99]}, "
            "loss.centering: [center, none]}",
        ),
        (
            ["loss.teacher_temp=0.03", "loss.warmup_teacher_temp=0.02", "loss.warmup_teacher_temp_epochs=3"],
            "{loss.teacher_temp: {uniform: [0.02, 0.08]}, loss.warmup_teacher_temp: {uniform: [0.02, 0.06]}, "
            "loss.warmup_teacher_temp_epochs: {int: [2, 6]}}",
        ),
        (["loss.center_momentum=0.95"], "{loss.centering: [center, none]}"),
    ],
)
def test_settings_that_bear_on_each_other_are_searched_together_and_every_point_is_a_run(
    base: list[str], space: str
) -> None:
    config = study(*base, f"tune.space={space}")
    assert space_of(config) == config.tune.space
    for point in grid(config.tune.space or {}, 4):
        made = candidate(config, point)
        loss = made.loss
        assert loss.warmup_teacher_temp <= loss.teacher_temp or not loss.warmup_teacher_temp_epochs  # type: ignore[operator]
        assert loss.teacher_temp == point.get("loss.teacher_temp", config.loss.teacher_temp)
        momentum = point.get("loss.center_momentum", config.loss.center_momentum)
        assert loss.center_momentum == (momentum if loss.centering == "center" else 0.9)


def test_a_first_point_is_held_against_the_centering_that_it_has() -> None:
    space = "tune.space={loss.center_momentum: {one_minus_log: [0.5, 0.99]}, loss.centering: [center, none]}"
    config = study(space, "loss.centering=none", "tune.first=[{loss.center_momentum: 0.8}]")
    assert first_points(config, space_of(config))[1] == {
        "loss.center_momentum": 0.8,
        "loss.centering": "none",
    }


def test_the_candidate_is_the_run_in_full_without_what_is_a_trials_own() -> None:
    config = study("tune.epochs=2")
    made = candidate(config, {"loss.teacher_temp": 0.05})
    assert made.train.epochs == 24
    assert made.health.on_collapse == "warn"
    assert not hasattr(made, "tune")
    changed = differences(load_config("demo", None, []), made)
    assert changed == ["loss.teacher_temp: 0.03 -> 0.05"]


def test_no_trial_is_given_up_before_the_longest_warm_up_of_the_space_is_over() -> None:
    config = study(
        "train.epochs=24",
        "tune.epochs=12",
        "optim.warmup_epochs=1",
        "tune.grace=0.1",
        "tune.space={loss.warmup_teacher_temp_epochs: {int: [2, 10]}, loss.teacher_temp: {uniform: [0.02, 0.08]}}",
    )
    # 10 of 24 epochs are 5 of 12: 5 epochs of 2160 images by 64.
    assert grace_steps(config, space_of(config), num_images=NUM_IMAGES) == 169
    plain = study("train.epochs=24", "tune.epochs=12", "tune.grace=0.5")
    assert grace_steps(plain, {}, num_images=NUM_IMAGES) == 203  # half of 405


@given(temp=st.floats(0.02, 0.08), momentum=st.floats(0.5, 0.99), epochs=st.integers(3, 7))
def test_every_point_of_the_default_space_is_a_run(temp: float, momentum: float, epochs: int) -> None:
    params = {
        "loss.teacher_temp": temp,
        "loss.center_momentum": momentum,
        "loss.warmup_teacher_temp_epochs": epochs,
    }
    made = candidate(study(), params)
    assert made.loss.warmup_teacher_temp <= made.loss.teacher_temp  # type: ignore[operator]
