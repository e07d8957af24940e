"""Evaluations beside training, through a SIGKILL of the driver while some are under way, and one of the evaluator."""

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


def evaluator_of(job: Job) -> psutil.Process | None:
    """The evaluator's process, once it has started: one that is stopped before, Ray gives up."""
    for process in job.ray_processes():
        with contextlib.suppress(psutil.Error):
            title = "".join(process.cmdline())
            if "_Evaluator" in title and "__init__" not in title:
                return process
    return None


def test_weights_scores_and_checkpoints_are_those_of_a_run_whose_workers_evaluate(tmp_path: Path) -> None:
    both = local_run(tmp_path, "run", steps=STEPS, checkpoint_every=EVERY)

    def settings(name: str) -> list[str]:
        own = [f"name={name}", f"eval.every_steps={EVERY}", f"eval.where={name}", "checkpoint.num_to_keep=1"]
        return [*both, *own]

    run_job("jobs.pretrain", *settings("train"))
    there = Directory(str(tmp_path / "side"))
    with start_job("jobs.pretrain", *settings("side")) as job:
        evaluator = job.wait_until(lambda: evaluator_of(job))
        evaluator.send_signal(signal.SIGSTOP)
        job.wait_until(lambda: f"training waits for the evaluation of step {EVERY}" in job.output)
        job.wait_until(lambda: max(committed_steps(there), default=0) == 2 * EVERY)
        job.wait_until(lambda: read_records(there).last_step == 3 * EVERY)
        job.kill_driver()
    assert committed_steps(there) == [EVERY, 2 * EVERY]  # also the older one, whose score is not known
    with start_job("jobs.pretrain", *settings("side")) as job:
        job.wait_until(lambda: evaluator_of(job)).kill()
        assert job.wait() == 0, job.output
    assert f"the evaluation of step {EVERY} is begun again: its process or its node was lost" in job.output

    runs = [Directory(str(tmp_path / name)) for name in ("train", "side")]
    records = [read_records(run).lines for run in runs]
    beside, by_workers = (evaluations(lines) for lines in reversed(records))
    assert by_workers == beside
    assert [line["step"] for line in beside] == list(range(0, STEPS + 1, EVERY))
    assert not any(MISSING in line for lines in records for line in lines)
    first, second = (sorted(losses(run.read("metrics.jsonl"))) for run in runs)
    assert first == second
    assert committed_steps(runs[0]) == committed_steps(there)
    assert runs[0].child(CHECKPOINTS).list() == there.child(CHECKPOINTS).list()
    for file in (STUDENT, TEACHER):
        ours, theirs = (
            load_file(Path(run.uri) / CHECKPOINTS / checkpoint_name(STEPS) / file) for run in runs
        )
        assert ours.keys() == theirs.keys()
        assert all(value.equal(theirs[name]) for name, value in ours.items())
    pictures = [run.child("attention").list() for run in runs]
    assert pictures[0] == pictures[1] != []
    assert all(runs[0].read(f"attention/{name}") == there.read(f"attention/{name}") for name in pictures[0])
