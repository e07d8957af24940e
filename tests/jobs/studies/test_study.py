"""A study as a config: what is refused before anything starts, and the runs that come of a trial's parameters."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from studies import tried, write_tried
from tiny_run import write_images

from dinoray.jobs import tune as job
from dinoray.jobs.cli.arguments import PretrainArguments, pretrain_config
from dinoray.jobs.cli.config import differences, load, load_config
from dinoray.jobs.studies.config import (
    MUTABLE_ON_RESUME,
    StudyConfig,
    can_grow,
    candidate,
    first_points,
    grace_steps,
    num_trials,
    objective_of,
    schedule_of,
    space_of,
    trial_config,
)
from dinoray.jobs.studies.resources import check_growth, plan_of
from dinoray.jobs.studies.study_run import StudyRun
from dinoray.models.errors import ConfigError, DinorayError, ResourceError
from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.space import default_space, grid
from dinoray.pipeline.study.trials import Outcome, TrialRecord, read_trials

NUM_IMAGES = 2160


def study(*overrides: str, recipe: str = "demo") -> StudyConfig:
    return load(StudyConfig, recipe, None, overrides, name_suffix="-study")


def trial(config: StudyConfig, **params: object) -> object:
    values = {key.replace("__", "."): value for key, value in params.items()}
    return trial_config(config, values, name="0003", storage_path="/s/trials", seed=5, num_images=NUM_IMAGES)


def run_finished(folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, *ended: TrialRecord) -> None:
    """Run a study of two trials whose trials have ended before; what they would learn from is not looked at."""
    images = folder / "images"
    if not images.exists():
        write_images(images, "train", labels=tuple(PATTERNS)[:2], per_label=2)
    monkeypatch.setattr(StudyRun, "is_done", lambda self: True)
    monkeypatch.setattr(StudyRun, "run", lambda self, verbose: None)
    study_directory = Directory(str(folder / "s"))
    for one in ended:
        write_tried(study_directory, one)
    job.main(
        [
            f"storage_path={folder}",
            "name=s",
            f"data.path={images}",
            "eval.val_path=null",
            "train.global_batch_size=4",
            "tune.trials=2",
            "tune.space={loss.teacher_temp: {uniform: [0.02, 0.08]}}",
            override,
        ]
    )


# What is refused


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["tune.space={loss.teacher_tmp: {uniform: [0.02, 0.08]}}"],
            ["loss.teacher_tmp", "did you mean loss.teacher_temp"],
        ),
        (["tune.space={data.path: [a, b]}"], ["data.path", "not a setting of the algorithm"]),
        (["tune.space={train.seed: {int: [0, 5]}}"], ["train.seed", "tune.confirm_seeds"]),
        (["tune.space={train.epochs: {int: [10, 50]}}"], ["train.epochs", "set tune.epochs"]),
        (
            ["tune.space={train.global_batch_size: [64, 128]}"],
            ["trials of different lengths", "tune.scheduler=none"],
        ),
        (
            [
                "tune.epochs=2",
                "tune.space={loss.warmup_teacher_temp_epochs: {int: [2, 6]}, loss.teacher_temp: [0.03, 0.04]}",
            ],
            ["loss.warmup_teacher_temp_epochs: it would be 1 in every trial of tune.epochs=2"],
        ),
        (
            ["tune.space={loss.teacher_temp: {uniform: [-1, 0.08]}}"],
            ["loss.teacher_temp=-1", "greater than 0"],
        ),
        (["tune.space={loss.teacher_temp: {gauss: [1, 2]}}"], ["loss.teacher_temp.gauss"]),
        (["tune.space={loss.teacher_temp: 3}"], ["3 is not a domain; write {uniform"]),
        (["tune.space={}"], ["nothing to search"]),
        (["tune.trails=3"], ["tune.trails=3: unknown key; did you mean tune.trials"]),
        (["tune.objective=loss"], ["tune.objective=loss cannot rank", "loss.teacher_temp", "entropy + KL"]),
        (["tune.objective=knn", "eval.val_path=null"], ["tune.objective=knn needs labels"]),
        (["tune.first=[{loss.student_temp: 0.1}]"], ["tune.first: loss.student_temp is not in tune.space"]),
        (
            ["tune.share_stream=true", "tune.space={crops.hue: {uniform: [0, 0.5]}}"],
            ["tune.share_stream=true needs the same crops", "crops.hue"],
        ),
        (
            [
                "tune.scheduler=pb2",
                "tune.space={head.out_dim: {int: [64, 512]}, loss.teacher_temp: {uniform: [0.02, 0.08]}}",
            ],
            ["tune.scheduler=pb2 changes settings", "head.out_dim"],
        ),
        (
            ["tune.scheduler=pb2", "tune.evaluations=3"],
            ["tune.evaluations=3: tune.scheduler=pb2 needs at least 4"],
        ),
        (["tune.scheduler=pb2", "tune.searcher=grid"], ["tune.searcher=grid", "set tune.searcher=quasi"]),
        (
            [
                "loss.warmup_teacher_temp_epochs=0",
                "tune.space={loss.warmup_teacher_temp: {uniform: [0.01, 0.02]}}",
            ],
            [
                "loss.warmup_teacher_temp: it has no effect in any trial with loss.warmup_teacher_temp_epochs=0"
            ],
        ),
        (
            [
                "loss.teacher_temp=0.05",
                "loss.warmup_teacher_temp_epochs=4",
                "tune.space={loss.warmup_teacher_temp: {uniform: [0.02, 0.06]}}",
            ],
            ["loss.warmup_teacher_temp=0.06: it must not exceed loss.teacher_temp=0.05; lower it"],
        ),
        (
            ["tune.scheduler=pb2", "tune.trials=8", "tune.max_concurrent=2"],
            ["tune.max_concurrent=2: tune.scheduler=pb2 trains all tune.trials=8 at once"],
        ),
        (
            ["loss.centering=sinkhorn_knopp", "tune.space={loss.center_momentum: {uniform: [0.5, 0.99]}}"],
            ["has no effect"],
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_in_words_before_ray_starts(
    overrides: Sequence[str], told: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError) as error:
        job.main(["--recipe", "demo", f"storage_path={tmp_path}", *overrides])
    for words in told:
        assert words in str(error.value)


@pytest.mark.parametrize("asked", ["tune.cluster_cpus=64", "tune.cluster_gpus=8"])
def test_a_ray_on_this_machine_is_not_said_to_grow(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        ResourceError, match=f"{asked}: only a cluster scales up to this size, .* leave it out"
    ):
        job.main(["--recipe", "demo", f"storage_path={tmp_path}", asked])
    check_growth(study(asked), is_local=False)
    check_growth(study(), is_local=True)


def test_a_name_in_use_by_another_study_or_by_a_run_is_refused(tmp_path: Path) -> None:
    config = study(f"storage_path={tmp_path}")
    (tmp_path / "demo-study").mkdir()
    (tmp_path / "demo-study" / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "demo-study" / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"other settings \(tune\.searcher: tpe -> random\)"):
        job.main([f"storage_path={tmp_path}", "tune.searcher=random"])
    run = load_config("demo", None, ["name=run", f"storage_path={tmp_path}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(run.to_yaml())
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="name=run is in use by a run"):
        job.main([f"storage_path={tmp_path}", "name=run"])


@pytest.mark.parametrize("changed", ["tune.trials=6", "tune.scheduler=asha"])
def test_a_population_is_never_mixed_with_trials_that_have_no_place_in_it(
    changed: str, tmp_path: Path
) -> None:
    space = "tune.space={loss.teacher_temp: {uniform: [0.04, 0.06]}}"
    mine = [f"storage_path={tmp_path}", "name=s", "tune.scheduler=pb2", "tune.trials=4", space]
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "config.yaml").write_text(study(*mine).to_yaml())
    (tmp_path / "s" / "study.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=f"{changed.partition('=')[0]}: .*which tune.scheduler=pb2 cannot change"
    ):
        job.main([*mine, changed, "--resume"])


def test_more_trials_seeds_and_another_cluster_continue_a_study(tmp_path: Path) -> None:
    more = study("tune.trials=64", "tune.confirm_top=5", "tune.max_concurrent=8", "resources.train_workers=4")
    assert differences(study(), more, free=MUTABLE_ON_RESUME) == []
    assert differences(study(), study("tune.epochs=3"), free=MUTABLE_ON_RESUME) == [
        "tune.epochs: None -> 3.0"
    ]


def test_a_finished_study_says_that_more_trials_extend_it_where_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_finished(tmp_path, monkeypatch, "tune.scheduler=pb2")
    assert "is finished; choose another name=... to start a new study" in capsys.readouterr().out
    assert can_grow(study())
    assert not can_grow(study("tune.searcher=grid"))


def test_the_config_of_a_study_reads_back_as_it_was_written() -> None:
    config = study(
        "tune.space={optim.name: [adamw, sgd], optim.base_lr: {log: [1e-4, 1e-2]}}",
        "tune.first=[{optim.name: sgd}]",
    )
    assert StudyConfig.model_validate(yaml.safe_load(config.to_yaml())) == config
    assert "base_lr" in json.dumps(yaml.safe_load(config.to_yaml())["tune"]["space"])


def test_a_space_may_be_given_key_by_key_on_the_command_line() -> None:
    config = study(
        "tune.space.loss.teacher_temp={uniform: [0.02, 0.1]}", "tune.space.optim.base_lr={log: [1e-4, 1e-2]}"
    )
    assert list(space_of(config)) == ["loss.teacher_temp", "optim.base_lr"]


def test_the_best_config_goes_when_its_trial_has_collapsed_under_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "s" / "best.yaml"
    first = tried(0, 3.0, params={"loss.teacher_temp": 0.05})
    run_finished(tmp_path, monkeypatch, "tune.confirm_top=0", first)
    assert load_config(None, best, []).loss.teacher_temp == 0.05
    again = tried(1, 1.0, "collapsed", params={"loss.teacher_temp": 0.05}, confirms=0, seed=1)
    run_finished(tmp_path, monkeypatch, "tune.confirm_top=1", again)
    assert not best.exists()


def test_pretraining_from_a_study_without_a_best_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a finished study directory"):
        pretrain_config(PretrainArguments().parse_args(["--from-study", str(tmp_path)]))
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the study has no best\.yaml, .*; see its study\.html"):
        pretrain_config(PretrainArguments().parse_args(["--from-study", str(tmp_path)]))


def test_a_study_of_which_all_trials_failed_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [tried(i, None, "failed", params={}, message="depth must\nbe above 0") for i in range(2)]
    with pytest.raises(
        DinorayError, match=r"all trials that ended \(2\) failed, .* depth must be above 0; .* name="
    ) as error:
        run_finished(tmp_path, monkeypatch, "tune.seed=0", *trials)
    assert error.value.exit_code == 1
    assert (tmp_path / "s" / "study.html").exists()
    run_finished(tmp_path, monkeypatch, "tune.seed=0", tried(1, 0.0, "collapsed", params={}))


def test_a_trial_that_is_lost_keeps_what_it_took_and_one_that_has_ended_its_outcome(tmp_path: Path) -> None:
    directory, config = Directory(str(tmp_path)), study()
    inputs: Any = SimpleNamespace(images=SimpleNamespace(num_images=NUM_IMAGES))
    space = space_of(config)
    life = StudyRun(config, directory, space, objective_of(config, space), [], inputs, Console(quiet=True))
    life._plan = plan_of(config, 16, {"CPU": 8})
    lost = tried(0, status="unfinished")
    write_tried(directory, lost, b'{"step": 3, "loss": 1.0}\n{"step": 7, "loss": 1.0}\n')
    (tmp_path / "trials" / "0000" / "clock.json").write_text('{"seconds": 1800.0, "start_seconds": 60.0}')
    write_tried(directory, tried(1, 0.5))
    life._on_end(lost.trial, "its process was lost")
    life._on_end(tried(1).trial, "its process was lost")
    first, second = (t.outcome for t in read_trials(directory))
    hours = life._plan.cpus_each / 2
    assert first == Outcome(
        "failed", None, 7, message="its process was lost", seconds=1800, start_seconds=60, cpu_hours=hours
    )
    assert second == tried(1, 0.5).outcome


# What comes of it


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
