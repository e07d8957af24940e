"""A Ray that is lost while a job uses it: one line, exit code 4, and the same command goes on."""

import contextlib
import re
from pathlib import Path

import psutil
import pytest
from jobs_processes import Job, start_job
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RaySystemError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from tiny_run import local_run

from dinoray.models.errors import ConfigError
from dinoray.pipeline.cluster import lost_ray
from dinoray.pipeline.cluster.lost_ray import LostRayError, error_to_print
from dinoray.pipeline.ray_private.train import SNAPSHOT
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import committed_steps

STEPS = 80
"""So many that a kill comes before the last. Each takes all 24 images."""


def task_error(cause: Exception) -> RayTaskError:
    """As it comes from a task that raised `cause`."""
    return RayTaskError("f", "Traceback: ...", cause)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ActorDiedError(), "ActorDiedError: The actor died unexpectedly"),
        (NodeDiedError("node 3 is gone"), "NodeDiedError: node 3 is gone"),
        (task_error(NodeDiedError("node 3 is gone")), "NodeDiedError: node 3 is gone"),
        (
            WorkerGroupError("", {0: RuntimeError("connection reset"), 1: NodeDiedError("gone")}),
            "NodeDiedError: gone",
        ),
        (ControllerError(NodeDiedError("gone")), "NodeDiedError: gone"),
        (OutOfMemoryError("a worker was killed"), "killed; set fewer resources.augment_actors, or give"),
    ],
)
def test_a_lost_part_of_ray_is_one_line_with_a_remedy(error: Exception, what: str) -> None:
    found = error_to_print(error)
    assert isinstance(found, LostRayError)
    assert found.exit_code == 4
    assert what in str(found)
    assert str(found).endswith("; run the same command again")
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        ConnectionError("of something else"),
        task_error(KeyError("a bug")),
        WorkerGroupError("", {0: RuntimeError("a bug"), 1: RuntimeError("a bug")}),
        ActorDiedError(task_error(KeyError("a bug in a constructor"))),
        RaySystemError(ImportError("no module named x"), traceback_str="Traceback: ..."),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    assert error_to_print(error) is None


def test_an_error_of_ours_comes_before_the_loss_that_it_led_to() -> None:
    error = NodeDiedError("gone")
    error.__cause__ = ConfigError("train.seed: is wrong")
    found = error_to_print(error)
    assert str(found) == "train.seed: is wrong"


def test_a_lost_ray_is_not_shut_down_under_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("ray.shutdown", lambda: calls.append("shutdown"))
    try:
        lost_ray.notice(LostRayError("it is gone"))
        lost_ray.leave_ray()
        assert calls == []
    finally:
        lost_ray.notice(None)
    lost_ray.leave_ray()
    assert calls == ["shutdown"]


WAITING = """
import time
import ray
from dinoray.jobs.cli.main import run_main, start_ray
from dinoray.pipeline.cluster.lost_ray import last_words
from dinoray.pipeline.cluster.resources import ResourcesConfig

def main(argv):
    start_ray(ResourcesConfig(), verbose=False)
    try:
        print("ready")
        with last_words(lambda loss: {last}):
            while True:
                {wait}
    finally:
        ray.shutdown()

run_main(main)
"""


def part_of_ray(job: Job, name: str) -> psutil.Process:
    """The process of the job's Ray that has this name as its title or program."""
    for process in job.ray_processes():
        with contextlib.suppress(psutil.Error):
            if name in process.cmdline()[0]:
                return process
    raise AssertionError(f"no {name} runs")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "wait", "last", "name"),
    [
        ("raylet", "time.sleep(1)", "0", "raylet"),
        # This call does not come back, nor do the last words: Ray's core ends the process after a minute.
        pytest.param("gcs_server", "ray.nodes()", "time.sleep(1000)", "head", marks=pytest.mark.nightly),
    ],
)
def test_a_job_whose_ray_is_lost_ends_with_one_line(
    part: str, wait: str, last: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "waits.py").write_text(WAITING.replace("{wait}", wait).replace("{last}", last))
    with start_job("waits", cwd=tmp_path) as job:
        job.wait_until(lambda: "ready" in job.output)
        part_of_ray(job, part).kill()
        assert job.wait() == 4, job.output
        ready, error = job.output.splitlines()
    assert ready == "ready"
    assert re.fullmatch(
        rf"error: the local Ray is lost: its {name} at [\d.]+:\d+ has not answered for 5 s; "
        "run the same command again",
        error,
    )


def last_step(run: Directory) -> int:
    """The step of the newest committed checkpoint; 0 where there is none."""
    return max(committed_steps(run), default=0)


@pytest.mark.nightly  # beside the lives of one run in test_pretrain.py
@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_loses_its_controller_or_its_head_resumes_by_the_same_command(tmp_path: Path) -> None:
    arguments = local_run(tmp_path, "lost", steps=STEPS, checkpoint_every=4)
    run = Directory(str(tmp_path / "lost"))

    def lose(part: str, why: str) -> str:
        """Kill a part of Ray after another checkpoint; return what the job printed."""
        before = last_step(run)
        with start_job("jobs.pretrain", *arguments) as job:
            # The first checkpoint is whole a moment before Ray Train lists it.
            job.wait_until(lambda: last_step(run) > before and run.exists(f"checkpoints/{SNAPSHOT}"))
            part_of_ray(job, part).kill()
            assert job.wait(500) == 4, job.output
        error = job.output.splitlines()[-1]
        assert error.startswith("error: ")
        assert why in error
        told = re.search(r"; the same command resumes from step (\d+)$", error)
        assert told
        # The train worker may write one more checkpoint before it notices the loss.
        assert before < int(told[1]) <= last_step(run) < STEPS
        assert "Traceback" not in job.output
        return job.output

    lose("TrainController", "lost its actor TrainController")
    snapshot = tmp_path / "lost" / "checkpoints" / SNAPSHOT
    snapshot.write_bytes(snapshot.read_bytes()[:40])  # as after a kill while Ray writes over it
    whole = last_step(run)
    output = lose("gcs_server", "its head at")
    assert "is torn; it is written again; whole checkpoints: step_" in output
    assert f"resuming from step {whole}" in output
