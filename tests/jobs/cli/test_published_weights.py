"""`backbone.pretrained=true` without a network: one line, exit code 3, in bounded time, before Ray starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs_processes import TINY
from paths import ROOT, START_UP
from safetensors.torch import save_file
from tiny_run import write_images

NAME = "test_vit.r160_in1k"
SETTINGS = [
    "recipe=demo",
    *TINY[:3],
    f"backbone.name={NAME}",
    "backbone.kwargs={}",
    "backbone.drop_path_rate=0",
]
SETTINGS += ["train.global_batch_size=8"]
PROGRAM = """
import sys, ray
from dinoray.jobs.cli.main import run_main
from dinoray.jobs import JOB as job
ray.init = lambda *_, **__: sys.exit("Ray was started")
sys.argv = ["job", *sys.argv[1:]]
run_main(job.main)
"""


def run(
    tmp_path: Path, *settings: str, job: str = "pretrain", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A process of its own, because offline is a state of the process."""
    if not (tmp_path / "images").exists():
        write_images(tmp_path / "images", "train", labels=("dots", "rings"), per_label=8)
    data = [f"data.path={tmp_path}/images", "eval.val_path=null", f"storage_path={tmp_path}/runs"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "AWS_", "RAY_"))}
    variables |= {
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": f"{START_UP}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("JOB", job), "name=x", *SETTINGS, *data, *settings],
        cwd=tmp_path,
        env=variables,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


# A port on which nothing listens. The hub's own client would try for minutes.
@pytest.mark.parametrize(
    ("job", "offline"),
    [("pretrain", {"HF_ENDPOINT": "http://127.0.0.1:9"}), ("tune", {"HF_HUB_OFFLINE": "1"})],
)
def test_weights_that_cannot_be_downloaded_end_the_job_before_ray_starts(
    tmp_path: Path, job: str, offline: dict[str, str]
) -> None:
    ended = run(tmp_path, "backbone.pretrained=true", job=job, **offline)
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"error: backbone.pretrained=true: the weights that timm publishes for {NAME} cannot be had"
    )
    assert "set backbone.pretrained=false" in line
    assert "init.from=FILE" in line
    assert ended.returncode == 3
    assert not re.search("Retry|Traceback", ended.stdout + ended.stderr)


def test_a_local_file_in_their_place_is_the_remedy_that_it_names(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model(NAME.partition(".")[0]).state_dict(), tmp_path / "weights.safetensors")
    mended = run(
        tmp_path, "backbone.pretrained=false", f"init.from={tmp_path}/weights.safetensors", HF_HUB_OFFLINE="1"
    )
    assert mended.stderr.splitlines()[-1] == "Ray was started"
