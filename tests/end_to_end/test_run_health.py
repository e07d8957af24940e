"""What a run does about its health, end to end: stops on collapse, goes back when steps are not finite."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitted_weights import fitted_weights
from jobs_processes import TINY
from safetensors.torch import load_file, save_file
from tiny_run import write_images, write_run

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.cli.display import Display
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.training.verdict import Verdict

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder, "train", labels=tuple(PATTERNS)[:3], per_label=8)


def arguments(images: Path, runs: Path, name: str, *more: str) -> list[str]:
    return [
        *TINY,
        f"name={name}",
        f"data.path={images}",
        f"eval.val_path={images}",
        "eval.every_steps=6",
        f"storage_path={runs}",
        f"train.epochs={STEPS * 8 / 24}",
        "resources.train_workers=1",
        "optim.warmup_epochs=0",
        "head.use_bn=false",
        "checkpoint.every_steps=4",
        "loss.warmup_teacher_temp_epochs=0",
        *more,
    ]


def readings(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_run_that_collapses_is_stopped_with_its_verdict_and_remedy(
    images: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    flat = ["loss.teacher_temp=5", "health.on_collapse=stop", "health.grace_steps=4", "health.persistence=2"]
    output = run_here("jobs.pretrain", *arguments(images, tmp_path, "flat", *flat), code=1)
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "uniform collapse at step 5" in errors[0]
    assert "loss.teacher_temp" in errors[0]
    last = readings(tmp_path / "flat")[-1]
    assert (last["step"], last["verdict"]) == (5, "uniform collapse")
    assert last["entropy_ratio"] > 0.98
    report = (tmp_path / "flat" / "report.html").read_text()
    assert f"step {last['step']}" in report
    assert "uniform collapse" in report


def test_a_run_that_is_interrupted_before_its_first_step_trains_no_further(
    images: Path, tmp_path: Path, run_here: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of it that was left in Ray would crash this process once it joins Ray again."""
    told: list[threading.Thread] = []

    def interrupt(*_: Any) -> None:
        told.extend(thread for thread in threading.enumerate() if thread.name == "fit")
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "eval", interrupt)
    output = run_here(
        "jobs.pretrain",
        *arguments(images, tmp_path, "early"),
        code="stopped; to go on, run the same command again",
    )
    assert "evaluation after step" not in output
    (fit,) = told
    assert not fit.is_alive()


@pytest.mark.nightly  # but for the flag, as the test before
def test_a_collapse_is_only_told_of_unless_asked_to_stop_for(
    images: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    flat = ["loss.teacher_temp=5", "health.grace_steps=4", "health.persistence=2"]
    output = run_here("jobs.pretrain", *arguments(images, tmp_path, "told", *flat))
    assert output.count("warning: uniform collapse at step 5") == 1
    assert "health        uniform collapse: " in output
    assert readings(tmp_path / "told")[-1]["step"] == STEPS
    report = (tmp_path / "told" / "report.html").read_text()
    assert "uniform collapse" in report
    pictures = sorted(path.name for path in (tmp_path / "told" / "attention").iterdir())
    assert pictures == [f"step_{step:08d}.png" for step in (0, 6, 12)]


@pytest.mark.nightly  # beside tests/pipeline/worker and tests/jobs/test_replay.py
def test_steps_that_are_not_finite_send_the_run_back_once_and_then_end_it(
    images: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    # The first step throws the weights so far that no later one is finite.
    output = run_here(
        "jobs.pretrain",
        *arguments(images, tmp_path, "thrown", "optim.base_lr=1e38", "health.max_skipped=2"),
        "resources.train_workers=2",  # both must agree
        code=1,
    )
    assert output.count("going back to the last checkpoint") == 1
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "2 steps in a row" in errors[0]
    assert "optim.base_lr" in errors[0]
    last = readings(tmp_path / "thrown")[-1]
    assert last["verdict"] == "non-finite"
    assert last["skipped_steps"] == 2
    assert sorted(file.name for file in (tmp_path / "thrown" / "capture").iterdir()) == [
        f"step_{step:08d}.json" for step in (2, 3)
    ]
    assert output.count("`dinoray replay ") == 2  # in both starts
    repeated = run_here("jobs.replay", str(tmp_path / "thrown"), "--step", "3")
    assert "captured by the run: non-finite step, rank 0 of 2" in repeated
    assert repeated.count("equal to the run's log, bit for bit") == 3, repeated  # of steps 1 to 3


@pytest.mark.nightly  # beside tests/pipeline/training/test_start.py
def test_a_run_starts_from_another_and_an_auto_setting_is_explained(
    images: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    first = write_run(tmp_path / "first", "head.use_bn=false")
    still = ["optim.base_lr=1e-30", "optim.weight_decay=0", "optim.min_lr=0", "teacher.teacher_momentum=1"]
    still.append("teacher.final_teacher_momentum=1")
    output = run_here(
        "jobs.pretrain",
        *arguments(images, tmp_path, "second", *still, "loss.teacher_temp=auto"),
        "--init-from",
        str(first),
    )
    assert "loss.teacher_temp=0.02: " in output
    second = tmp_path / "second" / "checkpoints" / f"step_{STEPS:08d}"
    (last,) = (first / "checkpoints").glob("step_*")
    a, b = (load_file(folder / "teacher.safetensors") for folder in (last, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    meta = json.loads((second / "meta.json").read_text())
    assert meta["config"]["loss"]["teacher_temp"] == 0.02


@pytest.fixture(scope="module")
def first(images: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Callable[..., str]) -> Path:
    """The directory of a finished run."""
    runs = tmp_path_factory.mktemp("runs")
    run_here("jobs.pretrain", *arguments(images, runs, "first"))
    return runs / "first"


@pytest.mark.nightly  # beside tests/pipeline/training/test_start.py
def test_a_run_goes_on_from_where_another_ended_with_its_optimiser(
    images: Path, first: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    output = run_here(
        "jobs.pretrain",
        *arguments(images, tmp_path, "longer", f"train.epochs={2 * STEPS * 8 / 24}", "init.load=run"),
        "--init-from",
        str(first),
    )
    assert f"continues at epoch {STEPS * 8 / 24:g}, step {STEPS}" in output
    assert [r["step"] for r in readings(tmp_path / "longer")] == list(range(STEPS + 1, 2 * STEPS + 1))
    moments = [
        torch.load(run / "checkpoints" / f"step_{step:08d}" / "train_state.pt", weights_only=True)[
            "optimizer"
        ]["state"][0]["step"]
        for run, step in ((first, STEPS), (tmp_path / "longer", 2 * STEPS))
    ]
    assert moments == [STEPS, 2 * STEPS]


NAIVE = [
    "health.on_regression=stop",
    "health.grace_steps=0",
    "eval.every_steps=2",
    "checkpoint.every_steps=2",
    "teacher.teacher_momentum=0.5",
    "optim.base_lr=10",
]
"""Of a run that leaves its start within a step."""


@pytest.fixture(scope="module")
def good(images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run from weights that tell the classes of all images apart: they were fitted to their labels."""
    folder = tmp_path_factory.mktemp("good")
    val = write_images(folder / "val", "val", labels=tuple(PATTERNS)[:3], per_label=16)
    files = sorted([*images.rglob("*.jpg"), *val.rglob("*.jpg")])
    config = load_config("demo", None, [*TINY, "head.use_bn=false"]).algorithm()
    pictures = [decode(file.read_bytes(), max_pixels=10**6) for file in files]
    weights = fitted_weights(config, pictures, [file.parent.name for file in files])
    save_file(weights, folder / "good.safetensors")
    return [f"init.from={folder / 'good.safetensors'}", "init.load=backbone", f"eval.val_path={val}"]


@pytest.fixture(scope="module")
def fallen(
    images: Path, good: list[str], tmp_path_factory: pytest.TempPathFactory, run_here: Callable[..., str]
) -> tuple[list[str], Path, str]:
    """Arguments, directory and error of a run that fell below its start and was stopped."""
    runs = tmp_path_factory.mktemp("fallen")
    again = arguments(images, runs, "naive", *good, *NAIVE)
    output = run_here("jobs.pretrain", *again, code=1)
    (error,) = (line for line in output.splitlines() if line.startswith("error:"))
    return again, runs / "naive", error


def test_a_run_that_falls_below_its_start_is_stopped_and_not_exported(
    good: list[str], fallen: tuple[list[str], Path, str], run_here: Callable[..., str]
) -> None:
    _, run, error = fallen
    assert error.startswith("error: worse than the start since step 2: k-NN ")
    assert f"; {Verdict.WORSE.remedy}; to continue anyway, set health.on_regression=warn" in error
    assert readings(run)[-1]["step"] == 4
    assert "Ended by: worse than the start since step 2" in (run / "report.html").read_text()
    refused = run_here("jobs.export", str(run), "--format", "state_dict", code=2)
    assert "the start was better than every checkpoint: nothing to export but the start; k-NN " in refused
    start = good[0].removeprefix("init.from=")
    assert f"Take the weights that it started from, {start}; or pass --step 2 to export" in refused
    run_here("jobs.export", str(run), "--format", "state_dict", "--step", "2")


@pytest.mark.nightly  # beside tests/pipeline/worker/test_regression_guard.py
def test_each_remedy_for_a_run_below_its_start_ends_the_error(
    images: Path,
    good: list[str],
    fallen: tuple[list[str], Path, str],
    tmp_path: Path,
    run_here: Callable[..., str],
) -> None:
    again, run, _ = fallen
    output = run_here("jobs.pretrain", *again, "health.on_regression=warn")
    assert "resuming from step 2" in output
    assert output.count("warning: worse than the start since step 2: ") == 1
    assert readings(run)[-1]["step"] == STEPS
    assert "worse than the start" in {reading["verdict"] for reading in readings(run)}
    assert "The start was better than every checkpoint" in (run / "report.html").read_text()
    slow = arguments(images, tmp_path, "slow", *good, *NAIVE, "optim.base_lr=1e-4")
    assert "worse than the start" not in run_here("jobs.pretrain", *slow)
    exported = run_here("jobs.export", str(tmp_path / "slow"), "--format", "state_dict")
    assert exported.startswith("exporting the best checkpoint: ")
