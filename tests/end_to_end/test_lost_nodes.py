"""Nodes that train are lost in mid-run: the run says what is missing, goes on when it comes back, and ends in time."""

import re
from pathlib import Path

import pytest
from jobs_processes import TINY, resumes, start_job
from ray_head import ray_head, ray_node
from tiny_run import write_images

from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT, committed_steps

# Nightly beside tests/pipeline/cluster, which has the same with a clock of its own.
pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]

STEPS = 3000
"""So many that the run does not end before it has lost its node."""


def test_a_run_waits_for_a_node_in_place_of_the_lost_one_and_not_for_ever(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "train", labels=tuple(PATTERNS)[:3], per_label=8)
    run = Directory(str(tmp_path / "lost"))
    arguments = [
        *TINY,
        *("name=lost", f"data.path={images}", f"storage_path={tmp_path}", "eval.val_path=null"),
        *(f"train.epochs={STEPS}", "train.global_batch_size=24", "log.every_steps=5"),
        *("optim.warmup_epochs=0", "head.use_bn=false", "checkpoint.every_steps=20"),
        *("resources.train_workers=2", "resources.cpus_per_train_worker=2"),
    ]
    with ray_head(num_cpus=3) as head:
        env = head.env | {"RAY_ADDRESS": head.gcs}
        with start_job("jobs.pretrain", *arguments, env=env) as job:
            with ray_node(head, num_cpus=3) as node:
                job.wait_until(lambda: run.exists(f"checkpoints/{SNAPSHOT}"))
                node.lose()
            job.wait_until(lambda: "waiting for nodes: have 3 of 6 CPUs, for " in job.output)
            with ray_node(head, num_cpus=3):
                (resumed,) = job.wait_until(lambda: resumes(job.output))
                assert re.fullmatch(r"node [\d.]+ lost", resumed.why)
                assert resumed.steps_repeated == resumed.after_step - resumed.from_step
                job.wait_until(lambda: committed_steps(run)[-1] > resumed.from_step)
                job.kill_driver()

        with start_job("jobs.pretrain", *arguments, "resources.wait_for_nodes_minutes=0.1", env=env) as job:
            assert job.wait() == 4, job.output
        error = job.output.splitlines()[-1]
        assert error.startswith("error: resources.wait_for_nodes_minutes=0.1: ")
        assert "(have 3 of 6 CPUs)" in error
        assert "Traceback" not in job.output
