"""Two drivers on one run: one trains, the other is refused; who was taken over ends and writes no more."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jobs_processes import PATIENCE_SECONDS, losses, processes_with, start_job, wait_until
from leases import record, stored, write
from ray_head import RayHead
from tiny_run import local_run

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_steps

# Nightly beside tests/pipeline/storage/test_lease.py and tests/jobs/test_leases.py.
pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]

STEPS, EVERY = 60, 4
"""So many that another driver comes before the last, and between two checkpoints. Each step takes all 24 images."""


def train_workers(cluster: RayHead) -> list[str]:
    """Titles of the cluster's train workers, which are children of its raylet."""
    found = []
    for process in processes_with(str(cluster.temp_dir)):
        with contextlib.suppress(psutil.Error):
            found += [" ".join(child.cmdline()) for child in process.children()]
    return [title for title in found if "RayTrainWorker" in title]


def test_a_run_has_one_driver_at_a_time(
    cluster: RayHead, run_here: Callable[..., str], tmp_path: Path
) -> None:
    arguments = local_run(tmp_path, "two", steps=STEPS, checkpoint_every=EVERY)
    run = Directory(str(tmp_path / "two"))
    environment = {**cluster.env, "RAY_ADDRESS": cluster.gcs}

    with start_job("jobs.pretrain", *arguments, env=environment) as first:
        first.wait_until(lambda: committed_steps(run))
        assert train_workers(cluster)
        write(run, record("b"))  # as one that took over after a pause of this one
        before = max(committed_steps(run))
        assert first.wait() == 4, first.output
        wait_until(lambda: not train_workers(cluster), PATIENCE_SECONDS)
        assert max(committed_steps(run)) <= before + EVERY, "more was committed than what was under way"
        error = first.output.splitlines()[-1]
        assert error.startswith(
            f"error: {run.uri} was taken over by host-b pid 7 at 2023-11-14 22:13:20 UTC, "
        )
        assert "Traceback" not in first.output
        assert stored(run) == record("b")
    step = max(committed_steps(run))
    assert 0 < step < STEPS
    write(run, record("b", is_given_back=True))

    with start_job("jobs.pretrain", *arguments, env=environment) as driver:
        driver.wait_until(lambda: "resuming from step" in driver.output)
        assert f"resuming from step {step}" in driver.output
        refused = run_here("jobs.pretrain", *arguments, code=4)
        (line,) = refused.splitlines()
        assert line.startswith(f"error: {run.uri} is in use by ")
        assert f" pid {driver.process.pid} since " in line
        assert driver.wait() == 0, driver.output
    assert [n for n, _ in losses(run.read("metrics.jsonl"))] == list(range(1, STEPS + 1))
    assert run_here("jobs.pretrain", *arguments).splitlines()[0].startswith(f"{run.uri} is finished")
