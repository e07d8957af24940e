"""`ray job submit` against a running Ray head, as on a cluster: the README's way to run the job for real."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs_processes import ROOT, TINY, end_processes, processes_with
from servers import free_ports

from pipeline.demo_images import PATTERNS, draw_demo_image

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A Ray head with a dashboard on ports of its own; yields the environment that leads clients to it."""
    port, dashboard, agent, grpc, metrics, client = free_ports(6)
    temp_dir = tempfile.mkdtemp(prefix="dr-", dir="/tmp")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # the job's `python`
    process = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", "--num-cpus=4", "--num-gpus=0", f"--temp-dir={temp_dir}"),
            *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"),
            *(f"--ray-client-server-port={client}", "--object-store-memory=300000000"),
            *("--min-worker-port=0", "--max-worker-port=0"),  # else a fixed range that may hold our ports
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, "ray start ended"
                assert time.monotonic() < deadline, "the dashboard did not come up"
                time.sleep(0.2)
        yield env | {"RAY_API_SERVER_ADDRESS": address}
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        end_processes([*processes_with(temp_dir), *processes_with(f"127.0.0.1:{port}")])
        shutil.rmtree(temp_dir, ignore_errors=True)


def submit(head: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.pretrain", *arguments],
        cwd=ROOT,
        env=head,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_submitted_job_runs_on_the_cluster_it_was_submitted_to(
    head: dict[str, str], tmp_path: Path
) -> None:
    for i in range(24):
        label = list(PATTERNS)[i % 2]
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.jpg").write_bytes(draw_demo_image(label, "train", i))
    done = submit(
        head,
        *TINY,
        "name=submitted",
        f"data.path={tmp_path}/images",
        "data.label_from_parent=false",
        "eval.val_path=null",
        f"storage_path={tmp_path}/runs",
        "train.epochs=2",
        "resources.train_workers=1",
    )
    assert done.returncode == 0, done.stdout
    assert "step 6/6" in done.stdout
    assert json.loads((tmp_path / "runs/submitted/result.json").read_text())["steps"] == 6


def test_a_submitted_job_with_a_mistake_fails_with_one_line(head: dict[str, str]) -> None:
    failed = submit(head, "optim.lrr=1")
    assert failed.returncode == 1
    assert "error: optim.lrr=1" in failed.stdout
    assert "Traceback" not in failed.stdout
