"""A run whose storage does not take what it writes trains on, and ends as if nothing had been, or with what to do."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults import fault_proxy
from jobs_processes import TINY, losses, start_job
from safetensors.torch import load
from samples import put_all
from servers import S3Server, aws_environment
from small_disk import SmallDisk, small_disk

from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT, committed_steps
from dinoray.pipeline.training.config import CheckpointConfig

# Nightly beside tests/pipeline/worker/test_background_save.py and tests/simulation, which refuse saves too.
pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.slow]

STEPS = 240
EVER = 1_000_000
SETTINGS = [
    *TINY,
    "eval.val_path=null",
    "resources.train_workers=1",
    "train.epochs=120",
    "checkpoint.every_steps=20",
    "eval.every_steps=1000",
]
"""Two steps of 8 images an epoch."""


@pytest.mark.s3
def test_a_run_whose_saves_are_refused_for_a_while_ends_as_one_whose_saves_were_not(
    s3: S3Server, bucket: str, run_here: Callable[..., str]
) -> None:
    put_all(s3, bucket, {f"images/{i}.jpg": draw_demo_image("dots", "train", i) for i in range(16)})
    places = [f"data.path=s3://{bucket}/images", f"storage_path=s3://{bucket}/runs"]
    run_here("jobs.pretrain", *SETTINGS, *places, "name=calm")
    refused = Directory(f"s3://{bucket}/runs/refused")
    with fault_proxy(s3.endpoint) as proxy:
        environment = aws_environment(proxy.endpoint)
        with start_job("jobs.pretrain", *SETTINGS, *places, "name=refused", env=environment) as job:
            job.wait_until(lambda: 20 in committed_steps(refused))
            proxy.fail("slow_down", pattern="^(PUT|POST) ", times=EVER)
            kept = committed_steps(refused)
            job.wait_until(lambda: "the run continues, and it is tried again" in job.output)
            job.wait_until(lambda: "is not written yet" in job.output)
            assert set(committed_steps(refused)) <= {*kept, kept[-1] + 20}
            proxy.heal()
            assert job.wait() == 0, job.output
        assert_older_ones_go_last(proxy.requests)
    line = rf"s3://{bucket}/runs/refused/\S+ could not be written for \d+ s \(.*SlowDown.*at most 15 minutes"
    assert re.search(line, job.output)
    assert re.search(r"all files are written again, after \d+ s", job.output)
    left_out = re.search(
        r"warning: no checkpoint of step (\d+): the checkpoint of step (\d+) is not", job.output
    )
    assert left_out is not None
    assert int(left_out[1]) > int(left_out[2])  # it has trained on
    assert committed_steps(refused)[-1] == STEPS
    assert "resuming from" not in job.output
    calm = Directory(f"s3://{bucket}/runs/calm")
    assert losses(refused.read("metrics.jsonl")) == losses(calm.read("metrics.jsonl"))
    for file in ("student.safetensors", "teacher.safetensors"):
        path = f"checkpoints/step_{STEPS:08d}/{file}"
        weights, expected = load(refused.read(path)), load(calm.read(path))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def assert_older_ones_go_last(requests: list[str]) -> None:
    """A checkpoint is deleted only once as many newer ones as are kept are complete, and Ray's list has them."""
    kept, num_complete, num_deleted, is_listed = CheckpointConfig().num_to_keep, 0, 0, False
    for line in requests:
        num_complete += bool(re.match("PUT .*/meta.json", line))
        is_listed |= bool(re.match(f"PUT .*/{SNAPSHOT}", line))
        if re.match(r"POST .*\?delete", line):
            num_deleted += 1
            assert num_complete >= num_deleted + kept
            assert is_listed
            is_listed = False
    assert num_deleted > 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 64 << 20) as mounted:
        yield mounted


def test_a_run_whose_disk_is_full_ends_with_path_and_bytes_and_resumes_once_there_is_space(
    disk: SmallDisk, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    (tmp_path / "images").mkdir()
    for i in range(16):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(draw_demo_image("dots", "train", i))
    arguments = [*SETTINGS, f"data.path={tmp_path}/images", f"storage_path={disk.folder}", "name=run"]
    arguments += ["head.out_dim=32768", "train.epochs=40", "storage.give_up_after_seconds=7"]
    disk.resize(5 << 19)  # the log has space, the 2.2 MB of a network have not
    output = run_here("jobs.pretrain", *arguments, code=3)
    run = disk.folder / "run"
    file = rf"{run}/checkpoints/step_00000020/\w+\.\w+"
    assert re.search(rf"{file} could not be written for \d+ s .*the run continues", output)
    last_line = output.splitlines()[-1]
    assert re.match(
        rf"error: {file}: no success for \d+ s, .*No space left on device: [\d,]+ bytes are needed, "
        r"[\d,]+ are free; free space on its disk, or raise storage.give_up_after_seconds=7$",
        last_line,
    ), last_line
    assert "Traceback" not in output
    assert "resuming" not in output
    assert "no checkpoint of step 40" in output
    disk.resize(64 << 20)
    run_here("jobs.pretrain", *arguments)
    assert committed_steps(Directory(str(run)))[-1] == 80
