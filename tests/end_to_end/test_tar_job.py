"""Tar files on a disk and on S3: a killed run ends with the weights of one that was not, and images are embedded."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from jobs_processes import TINY, losses, start_job
from safetensors.torch import load_file
from samples import put_all, write_all
from servers import S3Server
from tars import tar_of

from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name, committed_steps

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.nightly]

LABELS = tuple(PATTERNS)[:3]
STEPS = 40


def tar_files() -> dict[str, bytes]:
    """24 images with their classes, in three files."""
    tars = {}
    for number in range(3):
        members: dict[str, bytes] = {}
        for i in range(8):
            label = LABELS[i % 3]
            members |= {
                f"{i:02}.jpg": draw_demo_image(label, "train", 8 * number + i),
                f"{i:02}.cls": label.encode(),
            }
        tars[f"{number}.tar"] = tar_of(members)
    return tars


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_run_on_tar_files_resumes_bit_for_bit_and_its_images_are_embedded(
    store: str, s3: S3Server, bucket: str, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    path = str(tmp_path / "tars") if store == "local" else f"s3://{bucket}/tars"
    if store == "local":
        write_all(tmp_path / "tars", tar_files())
    else:
        put_all(s3, bucket, {f"tars/{name}": data for name, data in tar_files().items()})

    def arguments(name: str) -> list[str]:
        return [
            *TINY,
            f"name={name}",
            f"data.path={path}",
            f"storage_path={tmp_path}",
            f"train.epochs={STEPS / 3}",
            "train.global_batch_size=8",
            "resources.train_workers=1",
            "optim.warmup_epochs=0",
            "head.use_bn=false",
            "checkpoint.every_steps=4",
            "eval.every_steps=1000",
        ]

    output = run_here("jobs.pretrain", *arguments("whole"))
    assert "24 images in 3 tar files" in output
    run = Directory(str(tmp_path / "killed"))
    with start_job("jobs.pretrain", *arguments("killed"), env=s3.env) as job:
        job.wait_until(lambda: run.exists("checkpoints") and committed_steps(run))
        job.kill_driver()
    assert committed_steps(run)[-1] < STEPS, "killed too late to prove anything"
    assert "resuming from step" in run_here("jobs.pretrain", *arguments("killed"))
    whole = Directory(str(tmp_path / "whole"))
    assert losses(run.read("metrics.jsonl")) == losses(whole.read("metrics.jsonl"))
    for file in ("student.safetensors", "teacher.safetensors"):
        ours, theirs = (
            load_file(tmp_path / name / "checkpoints" / checkpoint_name(STEPS) / file)
            for name in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    out = tmp_path / "vectors"
    output = run_here(
        "jobs.embed", str(tmp_path / "whole"), path, f"--out={out}", "resources.augment_actors=1"
    )
    assert "24 images in = 24 vectors out + 0 quarantined" in output
    table = pq.read_table(out, columns=["key", "label"])
    prefix = "" if store == "local" else "tars/"
    assert table["key"].to_pylist() == [
        f"{prefix}{number}.tar#{i:02}.jpg" for number in range(3) for i in range(8)
    ]
    assert table["label"].to_pylist() == [LABELS[i % 3] for _ in range(3) for i in range(8)]
