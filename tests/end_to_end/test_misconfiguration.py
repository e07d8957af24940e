"""Wrong inputs end a job before anything is started: its exit code, one line per mistake, never a traceback.

Most cases run the job's main within this process, as `python -m` does but without the seconds that imports
take; one test runs a real process. In the others Ray must not start: the guard fails the test if it does.
"""

from pathlib import Path

import pytest
import torch
from jobs_processes import run_job
from no_ray import RayStarted
from remedies import settings_to_set
from samples import write_all
from wrong_inputs import CONFIG, DATA, RESOURCES, TINY, Job, runner_in

from dinoray.jobs import evaluate, pretrain
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.storage.files import Directory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    return runner_in(tmp_path, monkeypatch, capsys)


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
        [["storage_path=WORLD/file/runs", "Not a directory", "set storage_path to a folder"]],
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
        [["no images under WORLD/texts; ignored: 1 .txt; check data.path"]],
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


def test_a_mistake_is_named_before_the_name_that_is_in_use(run: Job, started: Directory) -> None:
    again = ["storage_path=WORLD/runs", "data.path=WORLD/images"]
    run(pretrain.main, *TINY, *again, "crops.local_crop_size=9").check(CONFIG, ["crops of 9 px"])
    run(pretrain.main, "--recipe=demo", *TINY[1:], *again, "optim.name=sgd").check(
        CONFIG, ["other settings (optim.name: adamw -> sgd; "]
    )


def test_a_storage_path_that_cannot_be_written(run: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    again = [*TINY, "data.path=WORLD/images", "eval.val_path=null"]
    run(pretrain.main, *again, "storage_path=WORLD/file/runs").check(
        DATA,
        [f"storage_path={tmp_path}/file/runs: no file can be made there", "set storage_path to a folder"],
    )
    with pytest.raises(RayStarted):
        run(pretrain.main, *again, "storage_path=WORLD/runs")


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


def test_evaluating_what_is_no_run(run: Job, started: Directory, tmp_path: Path) -> None:
    run(evaluate.main, "WORLD/runs/none").check(CONFIG, [f"{tmp_path}/runs/none is not a run directory"])
    run(evaluate.main, "WORLD/runs/run").check(DATA, [f"{started.uri} has no committed checkpoint"])
    run(evaluate.main, "WORLD/runs/run", "--step=x").check(
        CONFIG, ["argument --step: invalid step value: 'x'"]
    )
    run(evaluate.main, "WORLD/runs/run", "eval.kk=1").check(CONFIG, ["eval.kk=1", "did you mean eval.k?"])


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
