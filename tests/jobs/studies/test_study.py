"""A study as a config: what is refused before anything starts, what continues it, and how it ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from rich.console import Console
from studies import tried, write_tried
from study_configs import NUM_IMAGES, study
from tiny_run import write_images

from dinoray.jobs import tune as job
from dinoray.jobs.cli.arguments import PretrainArguments, pretrain_config
from dinoray.jobs.cli.config import differences, load_config
from dinoray.jobs.studies.config import MUTABLE_ON_RESUME, StudyConfig, can_grow, objective_of, space_of
from dinoray.jobs.studies.resources import check_growth, plan_of
from dinoray.jobs.studies.study_run import StudyRun
from dinoray.models.errors import ConfigError, DinorayError, ResourceError
from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease_keeper import LeaseKeeper
from dinoray.pipeline.study.trials import Outcome, TrialRecord, read_trials


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
    lease = LeaseKeeper(directory, tell=print)
    life = StudyRun(
        config, directory, space, objective_of(config, space), [], inputs, Console(quiet=True), lease
    )
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
