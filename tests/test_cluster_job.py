"""`ray job submit` against a running Ray head, as on a cluster: the README's way to run the job for real."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import RAY, ray_head
from jobs_processes import ROOT, TINY

from pipeline.demo_images import PATTERNS, draw_demo_image

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    with ray_head(num_cpus=4) as env:
        yield {name: value for name, value in env.items() if name != "RAY_ADDRESS"}


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
