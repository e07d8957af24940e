"""Tar files, Parquet of Hugging Face, images by address, TIFF of four channels: a killed run ends as one that was not.

Their images are embedded then.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from jobs_processes import TINY
from killed_runs import kill_and_resume
from samples import put_all, write_all
from servers import S3Server
from source_sets import Set, addresses, hugging_face, tar_files, tiffs_of_four_channels

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.nightly]

STEPS = 120


@pytest.mark.parametrize(
    ("make", "store"),
    [
        (tar_files, "local"),
        (tar_files, "s3"),
        (hugging_face, "s3"),
        (addresses, "local"),
        (tiffs_of_four_channels, "local"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit_and_its_images_are_embedded(
    make: Callable[[], Set],
    store: str,
    s3: S3Server,
    bucket: str,
    tmp_path: Path,
    run_here: Callable[..., str],
) -> None:
    data = make()
    path = str(tmp_path / "images") if store == "local" else f"s3://{bucket}/images"
    if store == "local":
        write_all(tmp_path / "images", data.files)
    else:
        put_all(s3, bucket, {f"images/{name}": body for name, body in data.files.items()})

    def arguments(name: str) -> list[str]:
        return [
            *TINY,
            *data.settings,
            *data.crops,
            f"name={name}",
            f"data.path={path}",
            f"storage_path={tmp_path}",
            f"train.epochs={STEPS / 3}",
            "resources.train_workers=1",
            "optim.warmup_epochs=0",
            "head.use_bn=false",
            "checkpoint.every_steps=10",
            "eval.every_steps=1000",
        ]

    assert data.line in run_here("jobs.pretrain", *arguments("whole"))
    kill_and_resume(tmp_path, arguments, run_here, steps=STEPS, env=s3.env)

    out = tmp_path / "vectors"
    embed = (str(tmp_path / "whole"), path, f"--out={out}", "resources.augment_actors=1", *data.settings)
    counted = f"24 images in = {24 - data.num_bad} vectors out + {data.num_bad} quarantined"
    assert counted in run_here("jobs.embed", *embed)
    table = pq.read_table(out, columns=["key", "label"])
    prefix = "" if store == "local" else "images/"
    assert table["key"].to_pylist() == [f"{prefix}{key}" for key in data.keys]
    assert table["label"].to_pylist() == data.labels
