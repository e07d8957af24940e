"""Wrong inputs end a job before anything is started: its exit code, one line per mistake, never a traceback.

Most cases run the job's main within this process, as `python -m` does but without the seconds that imports
take; one test runs real processes and finds the same. Ray must not start: the guard fails the test if it does.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import published
import pytest
import torch
from jobs_processes import run_job
from no_ray import RayStarted, forbid_ray
from paths import ROOT
from published import ViT
from samples import parquet, write_all
from servers import S3Server, aws_environment, use_aws

from dinoray.jobs import evaluate, pretrain
from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.cli.main import run_main
from dinoray.jobs.runs.run_files import write_environment
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.storage.files import Directory

TINY = [
    "--recipe=vit_small_imagenet_vanilla",
    "name=run",
    "backbone.kwargs={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}",
    "crops.global_crop_size=32",
    "crops.local_crop_size=16",
    "head.out_dim=64",
    "train.global_batch_size=8",
    "resources.train_workers=2",
]
CONFIG, DATA, RESOURCES = 2, 3, 4


@dataclass
class Ending:
    """How a job ended: its exit code and its two streams."""

    code: int
    output: str
    errors: str

    def check(self, code: int, *lines: Sequence[str]) -> None:
        """The exit code, and for each line of stderr the words that it must hold."""
        found = self.errors.splitlines()
        assert self.code == code, self.errors
        assert "Traceback" not in self.output + self.errors
        assert len(found) == len(lines), found
        for line, words in zip(found, lines, strict=True):
            assert line.startswith("error: ")
            for word in words:
                assert word in line


Job = Callable[..., Ending]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs a job's main as its command line does, in a folder of its own; `WORLD` stands for that folder."""

    def run(main: Callable[[Sequence[str]], None], *arguments: str) -> Ending:
        monkeypatch.setattr(sys, "argv", ["job", *(x.replace("WORLD", str(tmp_path)) for x in arguments)])
        with pytest.raises(SystemExit) as exit_:
            run_main(main)
        assert isinstance(exit_.value.code, int)
        return Ending(exit_.value.code, *capsys.readouterr())

    forbid_ray(monkeypatch)
    monkeypatch.setenv("DINORAY_CACHE", str(tmp_path / "cache"))
    use_aws(monkeypatch, {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"})
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    image = draw_demo_image("dots", "train", 0)
    write_all(
        tmp_path,
        {
            **{f"images/{label}/{i}.jpg": image for label in ("dots", "rings") for i in range(4)},
            **{f"loose/{i}.jpg": image for i in range(8)},
            "one/1.jpg": image,
            "texts/readme.txt": b"words",
            "shards/a.parquet": parquet({"jpeg": [image], "label": [1]}),
            "tables/a.parquet": parquet({"url": ["http://x/1.jpg"], "label": [1]}),
            "corrupt/a.parquet": b"PAR1 nothing of the kind PAR1",
            "mixed/1.jpg": image,
            "mixed/a.parquet": parquet({"image": [image]}),
            "broken.yaml": b"optim: {base_lr: 1\n",
            "list.yaml": b"- optim\n",
            "file": b"",
        },
    )
    (tmp_path / "empty").mkdir()
    return run


WRONG: dict[str, tuple[list[str], int, list[list[str]]]] = {
    "unknown key": (["optim.lrr=1e-3"], CONFIG, [["optim.lrr=0.001", "did you mean optim.base_lr"]]),
    "unknown section": (
        ["optimizer.base_lr=1"],
        CONFIG,
        [["optimizer.base_lr=1", "did you mean optim.base_lr"]],
    ),
    "bad type": (["train.epochs=many"], CONFIG, [["train.epochs='many'", "must be a number"]]),
    "not among the choices": (
        ["optim.name=adam"],
        CONFIG,
        [["optim.name='adam'", "'adamw', 'sgd' or 'lars'"]],
    ),
    "several at once": (
        ["optim.base_lr=0", "head.out_dims=8", "train.precision=fp8"],
        CONFIG,
        [
            ["head.out_dims=8", "did you mean head.out_dim?"],
            ["optim.base_lr=0", "greater than 0"],
            ["train.precision='fp8'", "'auto', 'bf16' or 'fp32'"],
        ],
    ),
    "override without =": (
        ["optim.base_lr"],
        CONFIG,
        [["'optim.base_lr'", "must look like section.key=value"]],
    ),
    "wrong option": (["--optim.base_lr=1"], CONFIG, [["--optim.base_lr=1", "written as section.key=value"]]),
    "unknown recipe": (["--recipe=vit_tiny"], CONFIG, [["recipe='vit_tiny'", "demo, photos_small"]]),
    "missing file": (
        ["--config=WORLD/none.yaml"],
        CONFIG,
        [["WORLD/none.yaml", "No such file", "check the path"]],
    ),
    "broken YAML": (
        ["--config=WORLD/broken.yaml"],
        CONFIG,
        [["WORLD/broken.yaml is not YAML", "line 2", "fix this line"]],
    ),
    "YAML of another shape": (
        ["--config=WORLD/list.yaml"],
        CONFIG,
        [["WORLD/list.yaml must hold a mapping"]],
    ),
    "bad name": (["name=a/b"], CONFIG, [["name='a/b'", "must be letters, digits"]]),
    "data.path not set": (
        ["-data.path"],
        CONFIG,
        [["data.path: must be set, e.g. data.path=s3://bucket/train"]],
    ),
    "data.path elsewhere": (
        ["data.path=gs://bucket/x"],
        CONFIG,
        [["gs://bucket/x", "use a local path or s3://"]],
    ),
    "storage_path elsewhere": (
        ["storage_path=gs://bucket/x"],
        CONFIG,
        [["gs://bucket/x", "use a local path or s3://"]],
    ),
    "storage_path is in a file": (
        ["storage_path=WORLD/file/runs"],
        DATA,
        [["WORLD/file/runs/run", "Not a directory", "check"]],
    ),
    "indivisible batch": (
        ["train.global_batch_size=9"],
        CONFIG,
        [["train.global_batch_size=9", "resources.train_workers=2", "try 8 or 10"]],
    ),
    "unknown backbone": (
        ["backbone.name=vit_smal_patch16_224"],
        CONFIG,
        [["'vit_smal_patch16_224'", "did you mean vit_small_patch16_224"]],
    ),
    "unknown backbone argument": (
        ["backbone.kwargs.patchsize=8"],
        CONFIG,
        [["backbone.kwargs=", "'patchsize'", "vit_small_patch16_224"]],
    ),
    "crop that patches do not tile": (
        ["crops.local_crop_size=20"],
        CONFIG,
        [["20 px", "patch size (8)", "set crops.local_crop_size=16"]],
    ),
    "an infinite run": (["train.epochs=inf"], CONFIG, [["train.epochs='inf'", "must be a finite number"]]),
    "evaluation size that patches do not tile": (
        ["eval.image_size=30", "eval.val_path=WORLD/images", "data.label_from_parent=true"],
        CONFIG,
        [["30 px", "patch size (8)"]],
    ),
    "evaluation elsewhere": (
        ["eval.val_path=gs://x/y"],
        CONFIG,
        [["eval.val_path: 'gs://x/y'", "use a local path"]],
    ),
    "no neighbours": (["eval.k=[0]"], CONFIG, [["eval.k=[0]", "must be greater than 0"]]),
    "no number of neighbours": (["eval.k=[]"], CONFIG, [["eval.k=[]", "must have at least 1 item"]]),
    "no bucket": (
        ["data.path=s3://"],
        CONFIG,
        [["data.path: 's3://' is not an S3 address", "write s3://bucket/prefix"]],
    ),
    "no actors": (
        ["resources.augment_actors=0"],
        CONFIG,
        [["resources.augment_actors=0", "must be greater than 0"]],
    ),
    "actors from many to few": (
        ["resources.augment_actors=[3, 1]"],
        CONFIG,
        [["resources.augment_actors: [3, 1] must be [least, most]"]],
    ),
    "no such folder": (["data.path=WORLD/none"], DATA, [["data.path=WORLD/none", "no such folder"]]),
    "empty folder": (["data.path=WORLD/empty"], DATA, [["no images under WORLD/empty", "check data.path"]]),
    "folder without images": (
        ["data.path=WORLD/texts"],
        DATA,
        [["no images under WORLD/texts, 1 other objects ignored", "check data.path"]],
    ),
    "corrupt Parquet": (
        ["data.path=WORLD/corrupt"],
        DATA,
        [["WORLD/corrupt/a.parquet is not a readable Parquet file"]],
    ),
    "wrong image column": (
        ["data.path=WORLD/shards", "data.image_column=image"],
        CONFIG,
        [["no column 'image'", "it has 'jpeg', 'label'", "set data.image_column"]],
    ),
    "no image column": (
        ["data.path=WORLD/tables"],
        CONFIG,
        [
            [
                "tables/a.parquet has no column of image bytes",
                "'url' (string)",
                "point data.path at the images",
            ]
        ],
    ),
    "image column of numbers": (
        ["data.path=WORLD/shards", "data.image_column=label"],
        CONFIG,
        [["data.image_column='label'", "int64", "must hold the encoded image"]],
    ),
    "images beside shards": (
        ["data.path=WORLD/mixed"],
        CONFIG,
        [["1 images and 1 Parquet shards", "point data.path at a folder with one kind"]],
    ),
    "label column of images": (
        ["data.label_column=label"],
        CONFIG,
        [["data.label_column='label' is for Parquet", "data.label_from_parent=true"]],
    ),
    "evaluation without labels": (
        ["eval.val_path=WORLD/loose"],
        CONFIG,
        [["eval.val_path needs labels", "eval.val_path=WORLD/loose has none", "data.label_from_parent=true"]],
    ),
    "evaluation by images without labels": (
        ["data.path=WORLD/loose", "eval.val_path=WORLD/images"],
        CONFIG,
        [["eval.val_path needs labels", "data.path=WORLD/loose has none", "eval.train_path"]],
    ),
    "evaluation without images": (
        ["eval.val_path=WORLD/none", "data.label_from_parent=true"],
        DATA,
        [["WORLD/none", "no such folder"]],
    ),
}


def settings_to_set(line: str) -> list[str]:
    """The settings that a line says to set."""
    found = re.search(r"; set ((?:[a-z_.]+=[^\s,]+ ?)+)", line)
    assert found, line
    return found[1].split()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train.global_batch_size=512"], CONFIG),
        (["data.path=WORLD/loose", "train.global_batch_size=16", "train.accumulate_steps=8"], CONFIG),
        (["resources.train_workers=512", "train.global_batch_size=512"], RESOURCES),
        (["resources.use_gpu=true"], RESOURCES),
    ],
)
def test_following_the_remedies_for_size_starts_the_run(run: Job, arguments: list[str], code: int) -> None:
    arguments = [*TINY, "storage_path=WORLD/runs", "data.path=WORLD/images", *arguments]
    ending = run(pretrain.main, *arguments)
    assert ending.code == code
    for _ in range(3):  # another rule may speak after the first
        arguments += settings_to_set(ending.errors)
        try:
            ending = run(pretrain.main, *arguments)
        except RayStarted:
            return
    pytest.fail(ending.errors)


def test_one_image_is_refused(run: Job) -> None:
    run(pretrain.main, *TINY, "storage_path=WORLD/runs", "data.path=WORLD/one").check(
        CONFIG, ["data.path=", "holds 1 image", "add images"]
    )


def test_warnings_of_size_stand_before_ray_starts(run: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, "storage_path=WORLD/runs", "data.path=WORLD/images", "train.epochs=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    named = [line.split()[1].partition("=")[0] for line in lines]
    assert named == ["data.path", "train.epochs"]


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_input_is_named_with_its_remedy(run: Job, tmp_path: Path, mistake: str) -> None:
    arguments, code, lines = WRONG[mistake]
    data = [] if arguments == ["-data.path"] else ["data.path=WORLD/images"]
    more = [argument for argument in arguments if argument != "-data.path"]
    ending = run(pretrain.main, *TINY, "storage_path=WORLD/runs", *data, *more)
    ending.check(code, *[[word.replace("WORLD", str(tmp_path)) for word in words] for words in lines])


def test_the_input_that_the_wrong_ones_differ_from_is_right(run: Job) -> None:
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, "storage_path=WORLD/runs", "data.path=WORLD/images")


@pytest.fixture
def started(run: Job, tmp_path: Path) -> Directory:
    """The directory of a run that has begun."""
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, "storage_path=WORLD/runs", "data.path=WORLD/images")
    return Directory(str(tmp_path / "runs" / "run"))


def test_a_name_in_use_by_a_run_with_other_settings(run: Job, started: Directory) -> None:
    again = ["storage_path=WORLD/runs", "data.path=WORLD/images"]
    run(pretrain.main, *TINY, *again, "optim.base_lr=0.1", "train.seed=3").check(
        CONFIG,
        [
            "name=run is in use",
            "optim.base_lr: 0.0005 -> 0.1; train.seed: 0 -> 3",
            "another name=",
            "--resume",
        ],
    )
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, *again, "log.every_steps=3")
    with pytest.raises(RayStarted):
        run(pretrain.main, *TINY, *again, "optim.base_lr=0.1", "--resume")


def test_a_run_that_is_to_be_resumed_on_other_images(run: Job, started: Directory) -> None:
    other = ["storage_path=WORLD/runs", "data.path=WORLD/images/dots"]
    ending = run(pretrain.main, *TINY, *other)
    ending.check(CONFIG, ["name=run is in use", "data.path: ", "choose another name="])
    assert "--resume" not in ending.errors  # it would not help
    elsewhere = [*other, "--resume"]
    run(pretrain.main, *TINY, *elsewhere).check(
        CONFIG, ["data.path=", "was listed with", "give the run another name"]
    )


def test_a_mistake_once_mended_does_not_hold_the_name(run: Job) -> None:
    again = [*TINY, "storage_path=WORLD/runs", "data.path=WORLD/images", "eval.val_path=WORLD/images"]
    assert run(pretrain.main, *again, "data.label_from_parent=false").code == CONFIG
    with pytest.raises(RayStarted):
        run(pretrain.main, *again)


def test_a_wrong_file_of_weights_once_mended_does_not_hold_the_name(run: Job, tmp_path: Path) -> None:
    again = [*TINY, "name=start", "storage_path=WORLD/runs", "data.path=WORLD/images"]
    run(pretrain.main, *again, "--init-from", str(tmp_path / "none.pth")).check(
        DATA, [f"{tmp_path}/none.pth"]
    )
    with pytest.raises(RayStarted):
        run(pretrain.main, *again)


def test_lines_on_initial_weights_are_printed_before_ray_starts(
    run: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def backbone() -> ViT:
        return ViT(size=32, patch=8, dim=16, depth=1)

    state = published.Run(backbone=backbone, size=32, out_dim=64).train().state() | {
        "[/b]": {},
        "\x1b[2J": {},
    }
    (tmp_path / "checkpoint.pth").write_bytes(published.saved(state))
    again = [*TINY, "name=init", "storage_path=WORLD/runs", "data.path=WORLD/images", "train.epochs=9"]
    again += ["head.hidden_dim=48", "head.bottleneck_dim=16", "init.load=run"]
    with pytest.raises(RayStarted):
        run(pretrain.main, *again, "--init-from", f"{tmp_path}/checkpoint.pth")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("init: ")]
    file = f"{tmp_path}/checkpoint.pth"
    assert [line.partition("; training continues")[0] for line in lines] == [
        f"init: student from 'student.module.backbone' of {file}: backbone (18 tensors), head (8 tensors)",
        f"init: teacher from 'teacher.backbone' of {file}: backbone (18 tensors), head (8 tensors)",
        f"init: centre from 'dino_loss.center' of {file}",
        "init: optimizer state of 25 of 25 parameters",
        "init: skipped: fp16_scaler, [/b]",
        "init: new: nothing",
    ]
    directory = Directory(f"{tmp_path}/runs/init")
    for reasons in (None, []):  # as the run began, and as it is resumed
        if reasons is not None:
            write_environment(directory, load_run_config(directory), reasons)
        assert json.loads(directory.read("environment.json"))["automatic"][-len(lines) :] == lines


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("x.onnx", b"\x08\x08", CONFIG, ["init.path=", "x.onnx is not a file of weights", "pass the .pth"]),
        ("x.ckpt", b"no weights", DATA, ["x.ckpt is not a file of weights, or damaged"]),
        ("folder/x.png", b"", CONFIG, ["folder is a folder but no dinoray run", "pass a file of weights"]),
    ],
)
def test_initial_weights_of_a_wrong_kind(
    run: Job, tmp_path: Path, name: str, content: bytes, code: int, words: list[str]
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    again = [*TINY, "name=init", "storage_path=WORLD/runs", "data.path=WORLD/images"]
    path = name.removesuffix("/x.png")
    run(pretrain.main, *again, f"--init-from=WORLD/{path}").check(code, words)
    with pytest.raises(RayStarted):
        run(pretrain.main, *again)


def test_evaluating_what_is_no_run(run: Job, started: Directory, tmp_path: Path) -> None:
    run(evaluate.main, "WORLD/runs/none").check(CONFIG, [f"{tmp_path}/runs/none is not a run directory"])
    run(evaluate.main, "WORLD/runs/run").check(DATA, [f"{started.uri} has no committed checkpoint"])
    run(evaluate.main, "WORLD/runs/run", "--step=x").check(
        CONFIG, ["argument --step: invalid int value: 'x'"]
    )
    run(evaluate.main, "WORLD/runs/run", "eval.kk=1").check(CONFIG, ["eval.kk=1", "did you mean eval.k?"])


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
            ["s3://BUCKET/x", "failed after 2 attempts", "check the network, AWS_ENDPOINT_URL"],
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
            ["s3://BUCKET/runs/run", "403", "to these credentials"],
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
    arguments = ["storage_path=WORLD/runs", "data.path=WORLD/images", "data.fetch_attempts=2"]
    ending = run(pretrain.main, *TINY, *arguments, argument.replace("BUCKET", bucket))
    ending.check(code, [word.replace("BUCKET", bucket) for word in words])


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


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_gpus_that_the_machine_does_not_have(tmp_path: Path) -> None:
    write_all(tmp_path, {"images/1.jpg": draw_demo_image("dots", "train", 0)})
    arguments = [*TINY, f"storage_path={tmp_path}/runs", f"data.path={tmp_path}/images"]
    output = run_job("jobs.pretrain", *arguments, "resources.use_gpu=true", code=RESOURCES)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "resources.use_gpu=true" in line
    assert "this machine has 0" in line
    assert "set resources.use_gpu=false" in line
    assert "Traceback" not in output
