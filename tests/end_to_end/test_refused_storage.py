"""An object store that refuses ends a job before Ray starts, with one line that names the remedy."""

import subprocess
import sys
from pathlib import Path

import pytest
from no_ray import RayStarted
from paths import ROOT
from samples import put_all
from servers import S3Server, aws_environment, use_aws
from wrong_inputs import CONFIG, DATA, TINY, Ending, Job, runner_in

from dinoray.jobs import pretrain
from dinoray.pipeline.data.demo_images import draw_demo_image


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    return runner_in(tmp_path, monkeypatch, capsys)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("argument", "environment", "code", "words"),
    [
        (
            "data.path=s3://no-such-bucket/x",
            {},
            DATA,
            ["s3://no-such-bucket/x", "NoSuchBucket", "check the bucket's name"],
        ),
        ("data.path=s3://BUCKET/none", {}, DATA, ["no images under s3://BUCKET/none", "check data.path"]),
        (
            "data.path=s3://BUCKET/x",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            DATA,
            ["s3://BUCKET/x", "SignatureDoesNotMatch", "check AWS_ACCESS_KEY_ID"],
        ),
        (
            "data.path=s3://BUCKET/x",
            {"AWS_ACCESS_KEY_ID": "nobody"},
            DATA,
            ["s3://BUCKET/x", "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"],
        ),
        (
            "data.path=s3://BUCKET/x",
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            DATA,
            ["no AWS credentials", "set AWS_PROFILE or AWS_ACCESS_KEY_ID"],
        ),
        (
            "data.path=s3://BUCKET/x",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            DATA,
            ["s3://BUCKET/x", "failed after 5 attempts", "check the network, AWS_ENDPOINT_URL"],
        ),
        (
            "data.path=s3://BUCKET/x",
            {"AWS_ENDPOINT_URL": "127.0.0.1:9"},
            CONFIG,
            ["127.0.0.1:9", "AWS_ENDPOINT_URL must look like"],
        ),
        (
            "storage_path=s3://no-such-bucket/runs",
            {},
            DATA,
            ["s3://no-such-bucket/runs/run", "NoSuchBucket", "check the bucket's name"],
        ),
        (
            "storage_path=s3://BUCKET/runs",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            DATA,
            ["s3://BUCKET/runs/run", "SignatureDoesNotMatch (HTTP 403)", "check AWS_ACCESS_KEY_ID"],
        ),
    ],
    ids=[
        "missing bucket",
        "empty prefix",
        "wrong secret",
        "wrong key",
        "no credentials",
        "no server",
        "bad endpoint",
        "storage bucket missing",
        "storage closed",
    ],
)
def test_an_object_store_that_refuses_is_named_with_the_remedy(
    run: Job,
    s3: S3Server,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    environment: dict[str, str | None],
    code: int,
    words: list[str],
) -> None:
    changed = aws_environment(s3.endpoint) | environment
    use_aws(monkeypatch, {name: value for name, value in changed.items() if value is not None})
    arguments = ["storage_path=WORLD/runs", "data.path=WORLD/images"]
    ending = run(pretrain.main, *TINY, *arguments, argument.replace("BUCKET", bucket))
    ending.check(code, [word.replace("BUCKET", bucket) for word in words])
    # What the line says to set or check, as it should be: the same command goes on.
    use_aws(monkeypatch, aws_environment(s3.endpoint))
    put_all(s3, bucket, {f"x/{i}.jpg": draw_demo_image("dots", "train", i) for i in range(8)})
    mended = argument.replace("no-such-bucket", bucket).replace("BUCKET", bucket).replace("/none", "/x")
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, *arguments, "eval.val_path=null", mended)


@pytest.mark.nightly  # beside the processes of tests/test_package.py and tests/jobs/cli/test_published_weights.py
@pytest.mark.s3
def test_a_real_process_ends_in_the_same_way(s3: S3Server, tmp_path: Path) -> None:
    def start(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.pretrain", *TINY, f"storage_path={tmp_path}", *arguments],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **s3.env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    config = start("data.path=/data", "train.epochs=many", "optim.lrr=1")
    data = start("data.path=s3://no-such-bucket/x")
    output, errors = config.communicate()
    Ending(config.returncode, output, errors).check(CONFIG, ["optim.lrr=1"], ["train.epochs='many'"])
    output, errors = data.communicate()
    Ending(data.returncode, output, errors).check(DATA, ["s3://no-such-bucket/x", "NoSuchBucket"])
