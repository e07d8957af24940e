"""A run whose number of train workers follows the nodes, leaves a node in time, and replaces a worker that hangs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jobs_processes import TINY, Job, Resume, losses, resumes, start_job
from paths import ROOT
from ray_head import RAY, RayHead, RayNode, ray_head, ray_node
from spot_metadata import Metadata, metadata, notice
from tiny_run import write_images

from dinoray.pipeline.data.demo_images import PATTERNS
from dinoray.pipeline.storage.files import Directory

pytestmark = [
    *(pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow),
    pytest.mark.skipif(shutil.which("wget") is None, reason="deploy/spot_watcher.sh needs wget"),
]


def resumed(job: Job, number: int) -> Resume:
    """What the run says when it resumes for the `number`-th time."""
    found = job.wait_until(lambda: (all_of := resumes(job.output))[number - 1 :] and all_of[number - 1])
    assert found.after_step - found.from_step == found.steps_repeated
    return found


def take_back(head: RayHead, node: RayNode, service: Metadata, folder: Path) -> None:
    """Run the watcher that runs on spot nodes, until it has drained `node`; here, several nodes are on one machine."""
    stub = folder / "ray"
    stub.write_text(f'#!/bin/bash\nexec {RAY} "${{@/--node-id=*/--node-id={node.node_id}}}"\n')
    stub.chmod(0o755)
    env = head.env | {"PATH": f"{folder}{os.pathsep}{head.env['PATH']}", "IMDS_URL": service.url}
    subprocess.run(
        ["bash", ROOT / "deploy" / "spot_watcher.sh", head.gcs],
        env=env | {"SPOT_PAUSE_SECONDS": "0.1"},
        check=True,
        timeout=120,
    )


def test_train_workers_follow_the_nodes_that_there_are(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", "train", labels=tuple(PATTERNS)[:3], per_label=8)
    run = Directory(str(tmp_path / "elastic"))
    arguments = [
        *TINY,
        *("name=elastic", f"data.path={images}", f"storage_path={tmp_path}", "eval.val_path=null"),
        *("train.epochs=30000", "train.global_batch_size=24", "log.every_steps=5"),
        *("optim.warmup_epochs=0", "head.use_bn=false", "checkpoint.every_steps=1000000"),
        *("resources.train_workers=[1,2]", "resources.cpus_per_train_worker=3", "resources.hang_seconds=40"),
    ]
    with ray_head(num_cpus=2) as head, ray_node(head, num_cpus=3) as first:
        env = head.env | {"RAY_ADDRESS": head.gcs, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        with start_job("jobs.pretrain", *arguments, env=env) as job:
            job.wait_until(lambda: run.exists("metrics.jsonl"))
            with ray_node(head, num_cpus=3) as second:
                grown = resumed(job, 1)
                assert (grown.why, grown.steps_repeated) == ("from 1 to 2 train workers", 0)

                job.wait_until(lambda: losses(run.read("metrics.jsonl"))[-1][0] > grown.from_step)
                with metadata(None, notice(60)) as service:
                    take_back(head, second, service, tmp_path)
                left = resumed(job, 2)
                assert re.fullmatch(r"node [\d.]+ taken back", left.why)
                assert left.steps_repeated == 0
                assert re.search(
                    r"node [\d.]+ taken back in [1-6]?\d s: the run saves a checkpoint", job.output
                )

            job.wait_until(lambda: losses(run.read("metrics.jsonl"))[-1][0] > left.from_step)
            (worker,) = [p for p in first.processes() if "RayTrainWorker" in " ".join(p.cmdline())]
            worker.suspend()
            line = job.wait_until(lambda: re.search(r"^warning: train worker 0 .*", job.output, re.M))[0]
            assert re.search(rf"\(process {worker.pid}\) has given no sign for 3\d s, after step \d+;", line)
            assert re.fullmatch(r"train worker 0 on node [\d.]+ died", resumed(job, 3).why)
