"""A folder on a disk and Parquet on S3, mixed: a killed run ends with the weights of one that was not; both embed."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jobs_processes import TINY
from killed_runs import kill_and_resume
from samples import parquet, put_all, write_all
from servers import S3Server

from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.storage.files import Directory

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.nightly]

LABELS = tuple(PATTERNS)[:3]
STEPS, BATCH = 120, 8
NUM_PHOTOS, NUM_WEB = 24, 48


def photos() -> dict[str, bytes]:
    """Class folders, and one image that is damaged."""
    files = {f"{label}/{i}.jpg": draw_demo_image(label, "train", i) for label in LABELS for i in range(8)}
    return {**files, f"{LABELS[0]}/3.jpg": b"no image", "notes.txt": b"x"}


def web() -> bytes:
    """Parquet with labels of the same names, in row groups of four."""
    labels = [LABELS[i % 3] for i in range(NUM_WEB)]
    images = [draw_demo_image(label, "train", 100 + i) for i, label in enumerate(labels)]
    return parquet({"image": images, "label": labels}, row_group_size=4)


def test_a_run_on_a_mix_resumes_bit_for_bit_and_its_images_are_embedded(
    s3: S3Server, bucket: str, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    folder, address = str(tmp_path / "photos"), f"s3://{bucket}/web"
    write_all(tmp_path / "photos", photos())
    put_all(s3, bucket, {"web/a.parquet": web()})

    def arguments(name: str) -> list[str]:
        return [
            *TINY,
            f"name={name}",
            f"data.mix={{{folder}: 1, {address}: 1}}",
            "data.row_group_cache_bytes=60000",  # windows of a few row groups
            "data.max_bad_fraction=0.1",
            f"storage_path={tmp_path}",
            f"train.epochs={STEPS * BATCH / (NUM_PHOTOS + NUM_WEB)}",
            f"train.global_batch_size={BATCH}",
            "resources.train_workers=1",
            "optim.warmup_epochs=0",
            "head.use_bn=false",
            "checkpoint.every_steps=10",
            "eval.every_steps=1000",
        ]

    output = run_here("jobs.pretrain", *arguments("whole"))
    assert (
        "mixing: photos 50% (24 images, 1.5 passes an epoch), web 50% (48 images, 0.75 passes an epoch)"
        in output
    )
    assert "ignored in photos: 1 .txt" in output
    assert "others of data.mix" in output  # labels of both, for k-NN
    whole = Directory(str(tmp_path / "whole"))
    bad = [json.loads(line) for line in whole.read("quarantine.jsonl").splitlines()]
    assert {one["key"] for one in bad} == {f"photos: {LABELS[0]}/3.jpg"}
    report = whole.read("report.html").decode()
    assert "mixing: photos 50%" in report
    assert f"dinoray embed {whole.uri} {folder}" in report

    kill_and_resume(tmp_path, arguments, run_here, steps=STEPS, env=s3.env)

    embed = ["jobs.embed", str(tmp_path / "whole")]
    more = ["resources.augment_actors=1", "data.max_bad_fraction=0.1"]
    output = run_here(*embed, folder, f"--out={tmp_path}/vectors-photos", *more)
    assert "24 images in = 23 vectors out + 1 quarantined" in output
    output = run_here(*embed, address, f"--out={tmp_path}/vectors-web", *more)
    assert "48 images in = 48 vectors out + 0 quarantined" in output
    assert set(pq.read_table(tmp_path / "vectors-web", columns=["label"])["label"].to_pylist()) == set(LABELS)
