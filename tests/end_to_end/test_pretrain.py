"""The main job, end to end, in real processes: S3 in, S3 out, killed and continued."""

import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from faults import fault_proxy
from jobs_processes import TINY, losses, run_job, start_job
from safetensors.torch import load
from servers import S3Server, aws_environment
from tiny_states import flip

from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import SNAPSHOT, checkpoint_name, committed_steps

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]

NUM_PER_CLASS = 15
BATCH = 32
STEPS = 104
"""So many that a kill comes before the last, and not all images fit in the buffers before the trainer.

15 images x 4 classes, 32 a step: epochs of less than two steps end inside steps.
"""
EPOCHS = STEPS * BATCH / (4 * NUM_PER_CLASS)
ALONE = "resources.train_workers=1"
"""Where nothing is compared with the run of two: a worker takes seconds to start."""


@dataclass
class Bucket:
    """A bucket with a labelled image set, and access to what runs write into it."""

    server: S3Server
    name: str

    def put(self, key: str, data: bytes) -> None:
        self.server.client().put_object(Bucket=self.name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return self.server.client().get_object(Bucket=self.name, Key=key)["Body"].read()

    def pretrain_arguments(self, name: str, *more: str) -> list[str]:
        return [
            *TINY,
            f"name={name}",
            f"data.path=s3://{self.name}/images/train",
            f"eval.val_path=s3://{self.name}/images/val",
            f"storage_path=s3://{self.name}/runs",
            f"train.epochs={EPOCHS}",
            f"train.global_batch_size={BATCH}",
            "resources.train_workers=2",
            "checkpoint.every_steps=8",
            "eval.every_steps=1000",
            *more,
        ]

    def committed(self, name: str) -> list[str]:
        try:
            snapshot = json.loads(self.get(f"runs/{name}/checkpoints/checkpoint_manager_snapshot.json"))
        except self.server.client().exceptions.NoSuchKey:
            return []
        return [r["checkpoint_dir_name"] for r in snapshot["checkpoint_results"]]

    def final(self, name: str, file: str = "teacher.safetensors") -> dict[str, torch.Tensor]:
        return load(self.get(f"runs/{name}/checkpoints/step_{STEPS:08d}/{file}"))

    def losses(self, name: str) -> list[tuple[int, float]]:
        return losses(self.get(f"runs/{name}/metrics.jsonl"))


@pytest.fixture(scope="module")
def images(s3: S3Server) -> Bucket:
    bucket = Bucket(s3, "pretrain-test")
    s3.client().create_bucket(Bucket=bucket.name)
    for split, count in (("train", NUM_PER_CLASS), ("val", 6)):
        for label in list(PATTERNS)[:4]:
            for i in range(count):
                bucket.put(f"images/{split}/{label}/{i}.jpg", draw_demo_image(label, split, i))
    return bucket


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for MLflow and W&B."""
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def reference(images: Bucket, services: Path) -> str:
    """Name of a run that nothing interrupted, and that MLflow and W&B follow."""
    where = {"MLFLOW_TRACKING_URI": f"sqlite:///{services}/mlflow.db"}
    where |= {"WANDB_MODE": "offline", "WANDB_DIR": str(services)}
    arguments = images.pretrain_arguments("reference", "track.mlflow=true", "track.wandb=true")
    output = run_job("jobs.pretrain", *arguments, env=images.server.env | where, cwd=services)
    assert "warning: mlflow" not in output
    assert "warning: wandb" not in output
    assert "before training" in output
    assert f"after {STEPS} steps" in output
    assert "majority guess" in output
    return "reference"


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def test_a_run_writes_all_that_its_directory_promises(images: Bucket, reference: str) -> None:
    run = f"runs/{reference}"
    for file in ("config.yaml", "environment.json", "manifest.parquet", "result.json"):
        assert images.get(f"{run}/{file}")
    sheet = cv2.imdecode(np.frombuffer(images.get(f"{run}/crops.png"), np.uint8), cv2.IMREAD_COLOR)
    assert sheet.shape[0] > 100
    assert [step for step, _ in images.losses(reference)] == list(range(1, STEPS + 1))
    events = images.server.client().list_objects_v2(
        Bucket=images.name, Prefix=f"{run}/tensorboard/{reference}/events."
    )
    assert events["KeyCount"] >= 1
    for file in ("attention/step_00000000.png", f"attention/step_{STEPS:08d}.png"):
        assert images.get(f"{run}/{file}")
    projector = images.get(f"{run}/tensorboard/{reference}/projector_config.pbtxt").decode()
    assert "start: teacher, step 0" in projector
    assert f"newest: teacher, step {STEPS}" in projector
    labels = images.get(f"{run}/tensorboard/{reference}/projector_newest/metadata.tsv").decode().split()
    assert sorted(labels) == sorted([*PATTERNS][:4] * 6)
    assert images.committed(reference) == [f"step_{STEPS - past:08d}" for past in (16, 8, 0)]


def test_every_step_logs_the_metrics_that_people_watch(images: Bucket, reference: str) -> None:
    lines = [json.loads(x) for x in images.get(f"runs/{reference}/metrics.jsonl").splitlines()]
    step = next(x for x in lines if x["step"] == 5 and "loss" in x)
    rates = {"images_per_second", "data_wait", "fetch_cpu_ms", "decode_cpu_ms", "crop_cpu_ms"}
    schedules = {"lr", "weight_decay", "teacher_momentum", "teacher_temp", "epoch"}
    for name in {"grad_norm", "teacher_entropy", "kl"} | rates | schedules:
        assert isinstance(step[name], float), name
    assert step["loss"] == pytest.approx(step["teacher_entropy"] + step["kl"], abs=1e-5)
    assert [x["step"] for x in lines if "knn_10" in x] == [0, STEPS]


def test_mlflow_and_wandb_have_followed_the_run(images: Bucket, reference: str, services: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{services}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dinoray").experiment_id])
    assert (run.info.run_name, run.info.status) == (reference, "FINISHED")
    points = client.get_metric_history(run.info.run_id, "train/loss")
    logged = [loss for _, loss in images.losses(reference)]
    assert [(p.step, p.value) for p in points] == list(enumerate(logged, start=1))
    assert [p.step for p in client.get_metric_history(run.info.run_id, "eval/knn_20")] == [0, STEPS]
    assert run.data.params["train.global_batch_size"] == str(BATCH)
    artifacts = f"runs/mlartifacts/{run.info.run_id}/artifacts"
    for file in ("crops/step_00000000.png", f"attention/step_{STEPS:08d}.png", "report.html"):
        assert images.get(f"{artifacts}/{file}")
    number = json.loads(images.get(f"runs/{reference}/tracking.json"))["id"]
    assert [*services.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")]


@pytest.mark.parametrize("outage_seconds", [0, pytest.param(180, marks=pytest.mark.nightly)])
def test_a_run_that_loses_a_worker_its_store_its_driver_and_a_checkpoint_ends_with_the_same_weights(
    images: Bucket, reference: str, tmp_path: Path, run_here: Callable[..., str], outage_seconds: float
) -> None:
    run = Directory(str(tmp_path / "lost"))
    arguments = images.pretrain_arguments("lost", f"storage_path={tmp_path}")

    def logged() -> list[tuple[int, float]]:
        return losses(run.read("metrics.jsonl")) if run.exists("metrics.jsonl") else []

    with fault_proxy(images.server.endpoint) as proxy:
        proxy.delay_seconds = 0.3  # else all images are read before the first step
        environment = aws_environment(proxy.endpoint)
        with start_job("jobs.pretrain", *arguments, env=environment) as job:
            job.wait_until(lambda: run.exists(f"checkpoints/{SNAPSHOT}"))  # Ray Train knows of a checkpoint
            workers = [p for p in job.ray_processes() if "RayTrainWorker" in _title(p)]
            assert len(workers) == 2, [_title(p) for p in job.ray_processes()]
            workers[1].send_signal(signal.SIGKILL)
            job.wait_until(lambda: "resuming from step" in job.output)

            proxy.go_down()
            since = time.monotonic()
            job.wait_until(lambda: "storage has not answered for" in job.output)
            job.wait_until(lambda: time.monotonic() - since >= outage_seconds)
            proxy.come_up()
            job.wait_until(lambda: "storage answers again after" in job.output)

            job.wait_until(lambda: len(committed_steps(run)) == 3)
            job.kill_driver()
        oldest, before, newest = committed_steps(run)
        assert newest < STEPS, "killed too late to prove anything"

        flip(tmp_path / "lost/checkpoints" / checkpoint_name(newest) / "student.safetensors")
        snapshot = tmp_path / "lost/checkpoints" / SNAPSHOT
        snapshot.write_text(snapshot.read_text().replace(checkpoint_name(oldest), "../elsewhere"))
        with start_job(
            "jobs.pretrain", *arguments, "storage.give_up_after_seconds=3", env=environment
        ) as job:
            job.wait_until(lambda: f"/{STEPS}  loss" in job.output)
            proxy.go_down()
            assert job.wait() == 3, job.output
        assert "names '../elsewhere', which is not a checkpoint of this run" in job.output
        assert re.search(
            rf"warning: checkpoint {checkpoint_name(newest)} is refused: student.safetensors has checksum "
            rf"crc32:\w{{8}}, not crc32:\w{{8}} as written; going back to {checkpoint_name(before)} repeats "
            rf"{newest - before} steps",
            job.output,
        )
        assert f"resuming from step {before}" in job.output
        error = job.output.splitlines()[-1]
        assert f"error: s3://{images.name}/images/train/" in error
        assert "storage.give_up_after_seconds=3" in error
        assert "Traceback" not in job.output
        step = committed_steps(run)[-1]
        assert step == logged()[-1][0] < STEPS  # none is lost

    # What makes the crops may differ: two streams with an actor each.
    output = run_here("jobs.pretrain", *arguments, "data.streams=2", "resources.augment_actors=2")

    assert f"resuming from step {step}" in output
    # Each step once over all lives, each with the loss of the uninterrupted run: the same images, the same
    # crops, the same weights, centre and schedules.
    assert logged() == images.losses(reference)
    for file in ("teacher.safetensors", "student.safetensors"):
        weights = load(run.read(f"checkpoints/{checkpoint_name(STEPS)}/{file}"))
        assert_same_weights(weights, images.final(reference, file))


@pytest.mark.nightly  # beside the steps of several processes in tests/pipeline/training
def test_the_number_of_workers_does_not_change_what_is_learnt(
    images: Bucket, run_here: Callable[..., str]
) -> None:
    # Without stochastic depth, whose random numbers depend on the rank.
    alike = ["backbone.drop_path_rate=0", "head.use_bn=true", "train.epochs=3"]
    curves = []
    for workers in (1, 2):
        name = f"workers-{workers}"
        arguments = images.pretrain_arguments(name, f"resources.train_workers={workers}", *alike)
        run_here("jobs.pretrain", *arguments)
        curves.append(images.losses(name))
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert np.abs(np.array(curves[0]) - np.array(curves[1])).max() < 1e-4


def test_a_finished_run_says_so_and_does_nothing(
    images: Bucket, reference: str, run_here: Callable[..., str]
) -> None:
    before = images.get(f"runs/{reference}/metrics.jsonl")
    output = run_here("jobs.pretrain", *images.pretrain_arguments(reference))
    assert "is finished" in output
    assert images.get(f"runs/{reference}/metrics.jsonl") == before


def test_evaluate_finds_the_accuracy_that_the_run_logged(
    images: Bucket, reference: str, run_here: Callable[..., str]
) -> None:
    run_here("jobs.evaluate", f"s3://{images.name}/runs/{reference}")
    logged = json.loads(images.get(f"runs/{reference}/result.json"))["after"]
    found = json.loads(images.get(f"runs/{reference}/evaluation_step_{STEPS:08d}.json"))
    assert (found["num_train"], found["num_val"], found["num_unreadable"]) == (60, 24, 0)
    assert {k: found[k] for k in ("knn_10", "knn_20", "majority")} == {
        k: logged[k] for k in ("knn_10", "knn_20", "majority")
    }


@pytest.fixture(scope="module")
def spoilt(images: Bucket) -> list[str]:
    """Overrides that read 32 images, two of which are bad."""
    good = draw_demo_image("dots", "train", 0)
    for i in range(30):
        images.put(f"spoilt/{i:02d}.jpg", draw_demo_image("dots", "train", i))
    images.put("spoilt/cut.jpg", good[: len(good) // 2])
    images.put("spoilt/text.jpg", b"<html>not an image</html>")
    path = f"data.path=s3://{images.name}/spoilt"
    return [path, "data.label_from_parent=false", "eval.val_path=null", "train.epochs=2"]


def test_images_that_are_bad_or_forbidden_are_replaced_counted_and_named(
    images: Bucket, spoilt: list[str]
) -> None:
    arguments = images.pretrain_arguments("spoilt", *spoilt, "data.max_bad_fraction=0.1", ALONE)
    with fault_proxy(images.server.endpoint) as proxy:
        proxy.fail("forbid", pattern=f"^GET /{images.name}/spoilt/07.jpg", times=1_000_000)
        output = run_job("jobs.pretrain", *arguments, env=aws_environment(proxy.endpoint))
    assert "64 images seen = 58 trained on + 6 replaced (4 corrupt, 2 denied), listed in" in output
    lines = [json.loads(x) for x in images.get("runs/spoilt/quarantine.jsonl").splitlines()]
    bad = {line["key"]: line for line in lines}
    assert len(bad) == len(lines)
    assert {key: (line["status"], line["epochs"]) for key, line in bad.items()} == {
        "spoilt/cut.jpg": ("corrupt", [0, 1]),
        "spoilt/text.jpg": ("corrupt", [0, 1]),
        "spoilt/07.jpg": ("denied", [0, 1]),
    }
    assert bad["spoilt/text.jpg"]["bytes"] == len(b"<html>not an image</html>")
    assert f"s3://{images.name}/spoilt/07.jpg: AccessDenied" in bad["spoilt/07.jpg"]["reason"]
    assert all(line["reason"] for line in lines)
    result = json.loads(images.get("runs/spoilt/result.json"))
    assert result["last"]["bad_images"] == 6


@pytest.mark.nightly  # beside the same of the jobs that write tables, and of Quarantine
def test_more_bad_images_than_allowed_end_the_run(
    images: Bucket, spoilt: list[str], run_here: Callable[..., str]
) -> None:
    strict = images.pretrain_arguments("strict", *spoilt, "data.max_bad_fraction=0.01", ALONE)
    output = run_here("jobs.pretrain", *strict, code=3)
    assert "error: " in output
    assert "max_bad_fraction=0.01" in output
    assert "Traceback" not in output
    named = images.get("runs/strict/quarantine.jsonl")  # the file that the error names
    assert b"spoilt/cut.jpg" in named or b"spoilt/text.jpg" in named
    page = images.get("runs/strict/report.html")  # which sums it up
    assert b"spoilt/cut.jpg" in page or b"spoilt/text.jpg" in page


@pytest.mark.nightly  # beside the same of a source, and of the error of an actor in tests/pipeline/stream
def test_a_bucket_that_forbids_all_images_ends_the_run_at_once(images: Bucket) -> None:
    with fault_proxy(images.server.endpoint) as proxy:
        proxy.fail("forbid", pattern=f"^GET /{images.name}/images/train/", times=1_000_000)
        arguments = images.pretrain_arguments("closed", "eval.val_path=null", ALONE)
        output = run_job("jobs.pretrain", *arguments, env=aws_environment(proxy.endpoint), code=3)
    last_line = output.splitlines()[-1]
    assert last_line.startswith(f"error: s3://{images.name}/images/train/")
    assert "AccessDenied" in last_line
    assert "s3:GetObject" in last_line
    assert "Traceback" not in output


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
