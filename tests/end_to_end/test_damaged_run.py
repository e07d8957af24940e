"""What a run does whose checkpoints are damaged, beside what test_pretrain shows of one damaged checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs_processes import TINY, start_job
from tiny_run import write_images, write_run
from tiny_states import flip

from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_steps

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS, LONGER = 12, 16
"""Of the run that is damaged, and to which it is resumed; with a checkpoint every 4 steps."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder, "train", labels=tuple(PATTERNS)[:3], per_label=8)


def arguments(images: Path, run: Path, steps: int, *more: str) -> list[str]:
    return [
        *TINY,
        f"name={run.name}",
        f"data.path={images}",
        f"eval.val_path={images}",
        "eval.every_steps=1000",
        f"storage_path={run.parent}",
        f"train.epochs={steps * 8 / 24}",
        "train.schedule=constant",
        "resources.train_workers=1",
        "optim.warmup_epochs=0",
        "head.use_bn=false",
        "checkpoint.every_steps=4",
        "loss.warmup_teacher_temp_epochs=0",
        "teacher.teacher_momentum=0.99",
        "teacher.final_teacher_momentum=0.99",
        *more,
    ]


@pytest.fixture(scope="module")
def first(images: Path, tmp_path_factory: pytest.TempPathFactory, run_here: Callable[..., str]) -> Path:
    """A run of 12 steps, with checkpoints after 4, 8 and 12."""
    run = tmp_path_factory.mktemp("runs") / "first"
    run_here("jobs.pretrain", *arguments(images, run, STEPS))
    assert committed_steps(Directory(str(run))) == [4, 8, 12]
    return run


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(first, tmp_path / "run")


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint_name(step)


@pytest.mark.nightly  # beside tests/pipeline/worker/test_restoring.py
def test_a_run_without_a_whole_checkpoint_does_not_start_anew(
    images: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    run = write_run(tmp_path / "run", steps=(4, 8, 12))
    flip(folder(run, 12) / "train_state.pt")
    (folder(run, 8) / "meta.json").write_text("{")
    (folder(run, 4) / "student.safetensors").unlink()
    before = {file: file.stat().st_mtime_ns for file in run.glob("checkpoints/**/*")}
    output = run_here("jobs.pretrain", *arguments(images, run, LONGER, "--resume"), code=3)
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    for name, why in (
        ("step_00000012", "train_state.pt has checksum"),
        ("step_00000008", "meta.json is not that of a checkpoint"),
        ("step_00000004", "it lacks student.safetensors"),
    ):
        assert f"{name}: {why}" in error
    assert "restore one from a copy, or move" in error
    after = {file: file.stat().st_mtime_ns for file in run.glob("checkpoints/**/*")}
    assert {file: after[file] for file in before if file.name[0] != "."} == {
        file: time for file, time in before.items() if file.name[0] != "."
    }


@pytest.mark.nightly  # beside tests/pipeline/worker/test_restoring.py
def test_a_run_whose_steps_are_not_finite_never_goes_back_to_a_damaged_checkpoint(
    images: Path, run: Path
) -> None:
    # The first step throws the weights so far that no later one is finite; they leave the time to damage a file.
    thrown = ["--resume", "optim.base_lr=1e38", "health.max_skipped=50", "log.every_steps=10"]
    with start_job("jobs.pretrain", *arguments(images, run, 200, *thrown)) as job:
        job.wait_until(lambda: "resuming from step 12" in job.output)
        flip(folder(run, 12) / "teacher.safetensors")
        assert job.wait() == 1, job.output
    told = job.output[job.output.index("going back to the last checkpoint") :]
    assert "checkpoint step_00000012 is refused: teacher.safetensors has checksum" in told
    assert "going back to step_00000008 repeats 4 steps" in told
    assert "resuming from step 8" in told
    assert "error: 50 steps in a row" in told  # the second time
