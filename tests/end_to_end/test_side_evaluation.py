"""Evaluations beside training, through a SIGKILL of the driver while some are under way, and the loss of evaluators:
one is killed, one hangs."""

import contextlib
import signal
from pathlib import Path

import psutil
import pytest
from jobs_processes import Job, losses, run_job, start_job
from safetensors.torch import load_file
from tiny_run import local_run

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import CHECKPOINTS, STUDENT, TEACHER, checkpoint_name, committed_steps
from dinoray.pipeline.tracking.records import read_records
from dinoray.pipeline.tracking.scores import MISSING, evaluations

# Nightly beside tests/pipeline/worker/test_under_way.py and test_evaluations.py.
pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY = 16, 4
MINUTES = 0.5
"""After which an evaluator is taken to hang: many times what it needs."""


def evaluator_of(job: Job) -> psutil.Process | None:
    """The evaluator's process, once it has started: one that is stopped before, Ray gives up."""
    for process in job.ray_processes():
        with contextlib.suppress(psutil.Error):
            title = "".join(process.cmdline())
            if "_Evaluator" in title and "__init__" not in title:
                return process
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs and their images."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[str]:
    """Arguments of each run but its name, and where it is evaluated."""
    arguments = local_run(folder, "run", steps=STEPS, checkpoint_every=EVERY)
    return [*arguments, f"eval.every_steps={EVERY}", "checkpoint.num_to_keep=1"]


@pytest.fixture(scope="module")
def by_workers(folder: Path, both: list[str]) -> Directory:
    """A run whose train workers evaluate."""
    run_job("jobs.pretrain", *both, "name=train", "eval.where=train")
    return Directory(str(folder / "train"))


def check_same(by_workers: Directory, beside: Directory) -> None:
    """Losses, scores, weights, checkpoints and pictures of two runs are the same; no evaluation is missing."""
    runs = (by_workers, beside)
    records = [read_records(run).lines for run in runs]
    scores = [evaluations(lines) for lines in records]
    assert scores[0] == scores[1]
    assert [line["step"] for line in scores[1]] == list(range(0, STEPS + 1, EVERY))
    assert not any(MISSING in line for lines in records for line in lines)
    first, second = (sorted(losses(run.read("metrics.jsonl"))) for run in runs)
    assert first == second
    assert committed_steps(by_workers) == committed_steps(beside)
    assert by_workers.child(CHECKPOINTS).list() == beside.child(CHECKPOINTS).list()
    for file in (STUDENT, TEACHER):
        ours, theirs = (
            load_file(Path(run.uri) / CHECKPOINTS / checkpoint_name(STEPS) / file) for run in runs
        )
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[name]) for name, value in ours.items())
    pictures = [run.child("attention").list() for run in runs]
    assert pictures[0] == pictures[1] != []
    assert all(
        by_workers.read(f"attention/{name}") == beside.read(f"attention/{name}") for name in pictures[0]
    )


def test_weights_scores_and_checkpoints_are_those_of_a_run_whose_workers_evaluate(
    folder: Path, both: list[str], by_workers: Directory
) -> None:
    there, arguments = Directory(str(folder / "side")), [*both, "name=side", "eval.where=side"]
    with start_job("jobs.pretrain", *arguments) as job:
        evaluator = job.wait_until(lambda: evaluator_of(job))
        evaluator.send_signal(signal.SIGSTOP)
        job.wait_until(lambda: f"training waits for the evaluation of step {EVERY}" in job.output)
        job.wait_until(lambda: max(committed_steps(there), default=0) == 2 * EVERY)
        job.wait_until(lambda: read_records(there).last_step == 3 * EVERY)
        job.kill_driver()
    assert committed_steps(there) == [EVERY, 2 * EVERY]  # also the older one, whose score is not known
    with start_job("jobs.pretrain", *arguments) as job:
        job.wait_until(lambda: evaluator_of(job)).kill()
        assert job.wait() == 0, job.output
    assert f"the evaluation of step {EVERY} is begun again: its process or its node was lost" in job.output
    check_same(by_workers, there)


def test_an_evaluator_that_hangs_is_replaced(folder: Path, both: list[str], by_workers: Directory) -> None:
    """It is alive and answers nothing; the run ends by itself, with all evaluations."""
    settings = ["name=hangs", "eval.where=side", f"eval.timeout_minutes={MINUTES}"]
    with start_job("jobs.pretrain", *both, *settings) as job:
        hanging = job.wait_until(lambda: evaluator_of(job))
        hanging.send_signal(signal.SIGSTOP)
        job.wait_until(lambda: evaluator_of(job) not in (None, hanging))
        assert job.wait() == 0, job.output
        assert not hanging.is_running()
    why = (
        f"it took longer than {MINUTES:g} minutes; if it needs more, set eval.timeout_minutes={2 * MINUTES:g}"
    )
    assert f"the evaluation of step {EVERY} is begun again: {why}" in job.output
    check_same(by_workers, Directory(str(folder / "hangs")))
