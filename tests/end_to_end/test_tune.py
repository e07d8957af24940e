"""Whole studies in real processes: collapse ends trials, the best is confirmed, kills are survived, nothing is left."""

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs_processes import PATIENCE_SECONDS, TINY, losses, run_job, start_job
from ray_head import ray_head
from tiny_run import write_images

from dinoray.jobs import pretrain
from dinoray.jobs.cli.config import load_config
from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.study.trials import read_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 12
FIRST = "[{loss.teacher_temp: 5.0}]"
"""The recipe's own 0.04 goes before it; at 5 nothing is sharpened, and all targets become even."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder, "train", labels=tuple(PATTERNS)[:3], per_label=8)


def arguments(images: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [
        *(a for a in TINY if "warmup_teacher_temp" not in a),
        f"name={name}",
        f"data.path={images}",
        f"eval.val_path={images}",
        f"storage_path={runs}",
        f"train.epochs={STEPS * 8 / 24}",
        "resources.train_workers=1",
        "optim.warmup_epochs=0",
        "head.use_bn=false",
        "loss.teacher_temp=0.04",
        "health.grace_steps=3",
        "health.persistence=2",
        "tune.space={loss.teacher_temp: {log: [0.02, 6]}, loss.center_momentum: {one_minus_log: [0.5, 0.99]}}",
        f"tune.first={FIRST}",
        "tune.searcher=quasi",
        "tune.trials=2",
        "tune.evaluations=3",
        "tune.confirm_top=1",
        "tune.confirm_seeds=2",
        *more,
    ]


def outcomes(study: Path) -> dict[str, dict[str, Any]]:
    files = sorted((study / "trials").glob("*/outcome.json"))
    return {file.parent.name: json.loads(file.read_text()) for file in files}


def learnt(study: Path) -> dict[str, Any]:
    """What must not depend on kills: how each trial ended, where, and with which score."""
    return {
        name: {key: found[key] for key in ("status", "score", "step", "verdict", "scores")}
        for name, found in outcomes(study).items()
    }


def steps_logged(trial: Path) -> list[int]:
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a study that nothing interrupted, and what it printed; without a dashboard."""
    runs = tmp_path_factory.mktemp("runs")
    output = run_job("jobs.tune", *arguments(images, runs, "reference"))
    return runs / "reference", output


def test_a_collapse_ends_its_trial_early_with_a_verdict_and_counts_apart_from_errors(
    reference: tuple[Path, str],
) -> None:
    study, output = reference
    collapsed = outcomes(study)["0001"]
    assert (collapsed["status"], collapsed["verdict"]) == ("collapsed", "uniform collapse")
    assert collapsed["step"] < STEPS
    assert collapsed["score"] == 0.0
    assert "loss.teacher_temp" in collapsed["message"]
    assert "trial 0001  collapsed (uniform collapse)" in output
    assert {found["status"] for found in outcomes(study).values()} <= {"finished", "stopped", "collapsed"}


def test_every_trial_reports_all_metrics_and_the_best_is_confirmed_with_another_seed(
    reference: tuple[Path, str],
) -> None:
    study, output = reference
    tried = read_trials(Directory(str(study)))
    assert [t.trial.origin for t in tried] == ["first", "first", "confirm"]
    assert json.loads((study / "environment.json").read_text())["hardware"][0]["kind"] == "head"
    for t in tried:
        assert t.outcome is not None
        assert {"knn_10", "knn_20", "rankme", "lidar", "majority"} <= t.outcome.scores.keys()
    confirm = tried[-1]
    base = tried[confirm.trial.confirms or 0]
    assert confirm.trial.params == base.trial.params
    assert (base.trial.seed, confirm.trial.seed) == (0, 1)
    scores = [t.outcome.score for t in tried[:2] if t.outcome and t.outcome.status == "finished"]
    assert base.outcome is not None
    assert base.outcome.score == max(scores)  # type: ignore[type-var]
    assert f"confirms {base.trial.name}" in output


def test_the_plan_is_told_before_the_start(reference: tuple[Path, str]) -> None:
    _, output = reference
    lines = output.splitlines()
    plan = next(i for i, line in enumerate(lines) if line.startswith("plan: "))
    first_end = next(i for i, line in enumerate(lines) if line.startswith("trial "))
    assert plan < first_end
    assert "trials at once, 2 CPUs each, 1 CPUs left for data" in lines[plan]
    assert "Traceback" not in output


def test_the_report_the_table_and_the_best_config_are_there_and_agree(reference: tuple[Path, str]) -> None:
    study, _ = reference
    page = (study / "study.html").read_text()
    assert "uniform collapse" in page
    assert (study / "study.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((study / "study.csv").open()))
    assert [row["status"] for row in rows] == [found["status"] for found in outcomes(study).values()]
    best = load_config(None, study / "best.yaml", [])
    winner = next(t for t in read_trials(Directory(str(study))) if t.trial.origin == "confirm")
    assert best.loss.teacher_temp == winner.trial.params["loss.teacher_temp"]
    assert best.loss.center_momentum == winner.trial.params["loss.center_momentum"]
    assert best.health.on_collapse == "warn"  # the run's own settings, not those of trials
    assert best.name == "reference-best"


def test_pretraining_starts_from_the_best_with_changes_of_ones_own(
    reference: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = reference
    pretrain.main(["--from-study", str(study), "train.epochs=7", "--print-config"])
    printed = capsys.readouterr().out
    assert "epochs: 7" in printed
    assert "name: reference-best" in printed


def test_a_finished_study_says_so_and_more_trials_extend_it(
    images: Path, reference: tuple[Path, str]
) -> None:
    study, _ = reference
    before = {path: path.read_bytes() for path in study.glob("trials/*/*.json*")}
    output = run_job("jobs.tune", *arguments(images, study.parent, "reference"))
    assert "is finished" in output
    assert {path: path.read_bytes() for path in study.glob("trials/*/*.json*")} == before


@pytest.mark.nightly  # beside the stream's own tests
def test_trials_that_share_one_stream_learn_what_they_learn_alone(
    images: Path, reference: tuple[Path, str], tmp_path: Path
) -> None:
    two = ["tune.confirm_seeds=3", "tune.scheduler=none"]
    shared = ["tune.share_stream=true", "tune.max_concurrent=2"]
    output = run_job("jobs.tune", *arguments(images, tmp_path, "shared", *two, *shared))
    assert "plan: 2 trials at once, 1 CPUs each, 1 CPUs augment for all of them" in output
    for number in ("0000", "0001"):
        together, alone = [
            dict(losses((study / "trials" / number / "metrics.jsonl").read_bytes()))
            for study in (tmp_path / "shared", reference[0])
        ]
        assert len(alone) == outcomes(reference[0])[number]["step"]
        assert alone == together
    # Each further seed has a stream of its own, for which the one before must have made room.
    assert [found["status"] for found in outcomes(tmp_path / "shared").values()] == [
        *("finished", "collapsed", "finished", "finished")
    ]


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """Of the test's own: its drivers are the first jobs."""
    with ray_head() as head:
        yield head.env | {"RAY_ADDRESS": head.gcs}


@pytest.mark.nightly  # beside tests/pipeline/study, and the lives of one run in test_pretrain.py
@pytest.mark.parametrize("killed", [("0002",), ("0000", "0002")])
def test_a_study_whose_driver_is_killed_goes_on_reruns_nothing_and_leaves_nothing(
    killed: tuple[str, ...], images: Path, reference: tuple[Path, str], head: dict[str, str], tmp_path: Path
) -> None:
    """Killed while each of these trials runs; the last confirms the best."""
    study = tmp_path / "killed"
    again = arguments(images, tmp_path, "killed", "tune.max_concurrent=1")
    finished: dict[Path, bytes] = {}
    for trial in killed:
        with start_job("jobs.tune", *again, env=head) as job:
            job.wait_until(
                lambda trial=trial: list(study.glob(f"trials/{trial}/checkpoints/step_*/meta.json"))
            )
            job.process.kill()
            job.process.wait()
        assert trial not in outcomes(study)
        finished |= {
            path: path.read_bytes()
            for name in outcomes(study)
            for path in study.glob(f"trials/{name}/*.json*")
        }
    assert len(outcomes(study)) == 2

    output = run_job("jobs.tune", *again, env=head)

    assert {path: path.read_bytes() for path in finished} == finished
    assert steps_logged(study / "trials" / "0002")[-1] in (STEPS, 4, 8)
    assert len(set(steps_logged(study / "trials" / "0002"))) == len(steps_logged(study / "trials" / "0002"))
    assert learnt(study) == learnt(reference[0])
    assert "Traceback" not in output
    assert (study / "best.yaml").read_text().replace("killed", "reference").split("storage_path")[0] == (
        reference[0] / "best.yaml"
    ).read_text().split("storage_path")[0]
    known = [json.loads(clock.read_text())["group"] for clock in study.glob("trials/*/clock.json")]
    deadline = time.monotonic() + PATIENCE_SECONDS  # Ray takes its time to clear up after a job
    while left := left_on(head["RAY_ADDRESS"], known, unharmed=f"{len(killed) + 1:02d}000000"):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def left_on(address: str, known: list[str], *, unharmed: str) -> list[str]:
    """Actors, and placement groups of the job that was not killed and of all trials, once all jobs have ended.

    But for the one actor that Ray Data itself keeps per cluster, and for what a killed job was just about to make:
    Ray may not clear up such groups, and Train's cleaner of groups, a detached actor, waits for ever where its
    controller was killed between making it and telling it to begin.
    """
    from ray.util.state import list_actors, list_placement_groups

    actors = list_actors(address=address, filters=[("state", "!=", "DEAD")], limit=1000)
    groups = list_placement_groups(address=address, filters=[("state", "!=", "REMOVED")], limit=1000)
    ours = [
        a.class_name
        for a in actors
        if a.class_name != "_AutoscalingCoordinatorActor"
        and (a.class_name != "PlacementGroupCleaner" or a.job_id == unharmed)
    ]
    return ours + [
        g.placement_group_id for g in groups if g.placement_group_id in known or g.creator_job_id == unharmed
    ]
