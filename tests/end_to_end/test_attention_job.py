"""The attention job: which images it takes, what it writes where, and how it ends when something is wrong.

Its main runs within this process as `python -m` runs it; one test runs a real process and finds the same. Runs
are made by hand: committed checkpoints of a tiny network, no Ray.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_runs import Run, attention_job, evaluate_run, make_run, noise
from faults import FaultProxy
from jobs_processes import run_job
from PIL import Image
from samples import parquet
from tiny import TINY_RESNET

from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.figures.attention_sheet import compute_attention, figure
from dinoray.pipeline.figures.drawing import png_bytes
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.checkpoint import read_frozen


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return attention_job(monkeypatch, capsys)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def expected_sheet(
    checkpoint: Path, images: dict[str, bytes], which: Any, step: int, **options: Any
) -> bytes:
    frozen = read_frozen(checkpoint, which)
    decoded = [(key, decode(data, max_pixels=10_000)) for key, data in images.items()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    looked = list(compute_attention(frozen.backbone(device), decoded, frozen.config.crops, **options))
    return png_bytes(figure(looked, title=f"vit_tiny_patch16_224, {which}, step {step}"))


# What is written


def test_a_sheet_and_a_folder_of_overlays_per_image_are_written_into_the_run(
    tmp_path: Path, run: Run
) -> None:
    folder = make_run(tmp_path / "first", steps=(0, 2))
    images = {"one.png": noise(seed=1), "two & three.png": noise(30, 10, seed=2)}
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    code, output, errors = run(folder, *(tmp_path / name for name in images))
    assert (code, errors) == (0, [])
    out = folder / "attention"
    places = [f"{out}/attention_step_00000002{end}" for end in (".png", "/000_one", "/001_two_three")]
    assert output == places
    names = ["head_01", "head_01_mask", "head_02", "head_02_mask", "heads", "image", "mean"]
    assert files_in(out) == sorted(
        [
            "attention_step_00000002.png",
            *(f"attention_step_00000002/000_one/{name}.png" for name in names),
            *(f"attention_step_00000002/001_two_three/{name}.png" for name in names),
        ]
    )
    sheet = (out / "attention_step_00000002.png").read_bytes()
    assert sheet == expected_sheet(folder / "checkpoints/step_00000002", images, "teacher", 2)
    image = Image.open(out / "attention_step_00000002/001_two_three/image.png")
    assert image.size == (64, 192)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_step_network_and_size_can_be_chosen(tmp_path: Path, trained: Path, run: Run, which: str) -> None:
    (tmp_path / "a.png").write_bytes(noise())
    options = ["--step=1", f"--which={which}", "--image-size=24", f"--out={tmp_path}/out"]
    code, output, _ = run(trained, tmp_path / "a.png", *options)
    assert code == 0
    sheet = Path(output[0])
    assert sheet == tmp_path / "out" / "attention_step_00000001.png"
    checkpoint = trained / "checkpoints/step_00000001"
    images = {"a.png": noise()}
    assert sheet.read_bytes() == expected_sheet(checkpoint, images, which, 1, image_size=24)
    assert not (trained / "attention").exists()


def test_a_checkpoint_on_its_own_will_do(
    tmp_path: Path, trained: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone = tmp_path / "copy"
    (trained / "checkpoints/step_00000001").rename(lone)
    try:
        (tmp_path / "a.png").write_bytes(noise())
        monkeypatch.chdir(tmp_path)
        code, output, _ = run(lone, "a.png")
        assert code == 0
        assert output[0] == str(tmp_path / "attention" / "attention_step_00000001.png")
        code, _, errors = run(lone, "a.png", "--animate")
        assert code == 2
        assert errors == [
            f"error: --animate needs the evaluations of a run, but {lone} is a single checkpoint; "
            "give the run directory"
        ]
    finally:
        lone.rename(trained / "checkpoints/step_00000001")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ILSVRC2012_val_00000293.JPEG", "000_ILSVRC2012_val_00000293"),
        ("a.b.tar.webp", "000_a_b_tar"),
        (".hidden.png", "000_hidden"),
        ("été 2024.png", "000_t_2024"),
        ("写真.png", "000_image"),
        ("con-trol.v1.png", "000_con-trol_v1"),
        (f"{'x' * 200}.png", f"000_{'x' * 60}"),
    ],
)
def test_folders_are_called_after_images_without_their_extension(
    tmp_path: Path, trained: Path, run: Run, name: str, folder: str
) -> None:
    (tmp_path / name).write_bytes(noise())
    code, output, _ = run(trained, tmp_path / name, f"--out={tmp_path}/out")
    assert (code, [Path(line).name for line in output[1:]]) == (0, [folder])


def test_images_of_one_name_have_folders_of_their_own(tmp_path: Path, trained: Path, run: Run) -> None:
    paths = [tmp_path / name for name in ("a/x.png", "b/x.png", "b/x.jpg", "b/X.PNG")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(noise())
    code, output, _ = run(trained, *paths, f"--out={tmp_path}/out")
    assert (code, [Path(line).name for line in output[1:]]) == (0, ["000_x", "001_x", "002_x", "003_X"])


def test_the_mass_is_used(tmp_path: Path, trained: Path, run: Run) -> None:
    (tmp_path / "a.png").write_bytes(noise())
    for mass in ("0.1", "1"):
        assert run(trained, tmp_path / "a.png", f"--mass={mass}", f"--out={tmp_path}/{mass}")[0] == 0
    overlay = "attention_step_00000002/000_a/head_01_mask.png"
    shown = [
        (
            np.asarray(Image.open(tmp_path / mass / overlay))
            == np.asarray(Image.open(tmp_path / mass / overlay.replace("head_01_mask", "image")))
        )
        .all(axis=2)
        .mean()
        for mass in ("0.1", "1")
    ]
    assert shown[0] < 0.2
    assert shown[1] == 1
    sheets = [(tmp_path / mass / "attention_step_00000002.png").read_bytes() for mass in ("0.1", "1")]
    assert sheets[0] != sheets[1]


# Which images


def keys_of(output: list[str]) -> list[str]:
    return [line.rpartition("/")[2][4:] for line in output[1:]]


def test_a_folder_gives_a_fixed_choice_of_its_images(tmp_path: Path, trained: Path, run: Run) -> None:
    for number in range(12):
        path = tmp_path / "images" / f"class_{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise(seed=number))
    (tmp_path / "images" / "notes.txt").write_text("no image")

    def chosen(*options: str) -> list[str]:
        code, output, errors = run(trained, tmp_path / "images", f"--out={tmp_path}/out", *options)
        assert (code, errors) == (0, [])
        return keys_of(output)

    assert len(chosen()) == 8
    assert chosen("--max-images=3") == chosen("--max-images=3")
    assert len(set(chosen("--max-images=3"))) == 3
    assert len(chosen("--max-images=40")) == 12
    (tmp_path / "first.png").write_bytes(noise())
    code, output, _ = run(
        trained, tmp_path / "first.png", tmp_path / "images", "--max-images=3", f"--out={tmp_path}/out"
    )
    assert (code, len(keys_of(output)), keys_of(output)[0]) == (0, 3, "first")


def test_parquet_is_read_by_column(tmp_path: Path, trained: Path, run: Run) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet({"image": [noise(), noise(seed=1), b"damaged"]}))
    code, output, errors = run(trained, tmp_path / "a.parquet", f"--out={tmp_path}/out")
    assert code == 0
    assert keys_of(output) == ["a_0", "a_1"]
    assert errors == ["skipped a.parquet#2: not an image: starts with b'damaged'"]
    (tmp_path / "b.parquet").write_bytes(parquet({"jpg": [noise()]}))
    code, _, errors = run(trained, tmp_path / "b.parquet", "--image-column=photo", f"--out={tmp_path}/out")
    assert (code, len(errors)) == (2, 1)
    for arguments in ([], ["--image-column=jpg"]):  # the only column of bytes is found without its name
        code, output, _ = run(trained, tmp_path / "b.parquet", *arguments, f"--out={tmp_path}/out")
        assert (code, keys_of(output)) == (0, ["b_0"])


def test_what_cannot_be_read_is_named_and_skipped(tmp_path: Path, trained: Path, run: Run) -> None:
    (tmp_path / "good.png").write_bytes(noise())
    (tmp_path / "bad.png").write_bytes(noise()[:70])
    paths = [tmp_path / name for name in ("bad.png", "missing.png", "good.png")]
    code, output, errors = run(trained, *paths, f"--out={tmp_path}/out")
    assert code == 0
    assert keys_of(output) == ["good"]
    assert len(errors) == 2
    assert errors[0].startswith(f"skipped {paths[0]}: damaged or cut off PNG")
    assert errors[1] == f"skipped {paths[1]}: there is no such file or folder"


def test_without_a_readable_image_the_job_ends_with_3(tmp_path: Path, trained: Path, run: Run) -> None:
    path = tmp_path / "missing.png"
    code, output, errors = run(trained, path, f"--out={tmp_path}/out")
    assert (code, output) == (3, [])
    assert errors[-1] == f"error: none of the images in {path} can be read; see the lines above"
    assert not (tmp_path / "out").exists()


def test_no_more_images_are_read_than_asked_for(tmp_path: Path, trained: Path, run: Run) -> None:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(noise())
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    code, output, errors = run(
        trained, *paths, tmp_path / "missing", "--max-images=2", f"--out={tmp_path}/out"
    )
    assert (code, keys_of(output), errors) == (0, ["a", "b"], [])


# Mistakes


@pytest.mark.parametrize(
    ("option", "message", "followed"),
    [
        ("--mass=0", "--mass=0.0 must be above 0 and at most 1, e.g. 0.6", "--mass=0.6"),
        ("--mass=1.1", "--mass=1.1 must be above 0", "--mass=1"),
        ("--mass=nan", "--mass=nan must be above 0", "--mass=0.6"),
        ("--image-size=7", "--image-size=7 must be at least 8", "--image-size=8"),
        ("--max-images=0", "--max-images=0 must be at least 1", "--max-images=1"),
        ("--step=7", "step=7 is not among step_00000000, step_00000001, step_00000002", "--step=1"),
        ("--which=both", "invalid choice: 'both'", "--which=student"),
    ],
)
def test_a_wrong_option_is_a_config_error(
    trained: Path, run: Run, tmp_path: Path, option: str, message: str, followed: str
) -> None:
    code, output, errors = run(trained, "a.png", option)
    assert (code, output, len(errors)) == (2, [], 1)
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    (tmp_path / "a.png").write_bytes(noise())
    assert run(trained, tmp_path / "a.png", followed, f"--out={tmp_path}/out")[0] == 0


def test_a_folder_that_is_no_run_is_a_data_error(tmp_path: Path, run: Run) -> None:
    code, _, errors = run(tmp_path, "a.png")
    assert code == 3
    assert errors == [
        f"error: {tmp_path} has no committed checkpoint; give the directory of a run that has written one"
    ]


def test_a_network_without_class_attention_is_told_before_images_are_read(tmp_path: Path, run: Run) -> None:
    folder = make_run(tmp_path / "first", steps=(0,), backbone=TINY_RESNET)
    code, _, errors = run(folder, "missing.png")
    assert (code, len(errors)) == (2, 1)
    assert "ResNet has no class token that attends to patches" in errors[0]


def test_without_figures_the_remedy_ends_the_error(tmp_path: Path, trained: Path, run: Run) -> None:
    evaluate_run(
        resnet := make_run(tmp_path / "resnet", steps=(0,), backbone=TINY_RESNET), backbone=TINY_RESNET
    )
    code, output, errors = run(resnet, "--animate")
    assert (code, output, len(errors)) == (3, [], 1)
    assert errors[0].startswith(f"error: {resnet}/attention holds no figure step_*.png")
    (tmp_path / "a.png").write_bytes(noise())
    code, _, errors = run(trained, tmp_path / "a.png", "--animate", f"--out={tmp_path}/out")
    assert (code, len(errors)) == (3, 1)
    assert errors[0].endswith("or leave out --animate")
    assert run(trained, tmp_path / "a.png", f"--out={tmp_path}/out")[0] == 0


def test_without_images_the_remedies_end_the_error(tmp_path: Path, run: Run) -> None:
    folder = make_run(evaluate_run(tmp_path / "first"))
    code, output, errors = run(folder)
    assert (code, output) == (2, [])
    assert errors == [
        "error: no images are given; name files or folders, or pass --animate for the run's own images"
    ]
    (tmp_path / "a.png").write_bytes(noise())
    assert run(folder, tmp_path / "a.png")[0] == run(folder, "--animate")[0] == 0


# Processes and S3


@pytest.mark.nightly  # beside the same in this process, and other jobs as processes
def test_the_job_runs_as_a_process(tmp_path: Path, trained: Path) -> None:
    (tmp_path / "a.png").write_bytes(noise())
    output = run_job("jobs.attention", str(trained), str(tmp_path / "a.png"), f"--out={tmp_path}/out")
    assert output.splitlines()[0] == f"{tmp_path}/out/attention_step_00000002.png"


@pytest.mark.s3
def test_runs_images_and_pictures_may_be_on_s3(bucket: str, trained: Path, tmp_path: Path, run: Run) -> None:
    store = Directory(f"s3://{bucket}")
    for folder in (trained, evaluate_run(tmp_path / "evaluated")):
        for path in folder.rglob("*"):
            if path.is_file():
                store.write(f"runs/first/{path.relative_to(folder).as_posix()}", path.read_bytes())
    images = {"a.png": noise(), "sub/b.png": noise(seed=1)}
    for name, data in images.items():
        store.write(f"images/{name}", data)
    code, output, errors = run(f"s3://{bucket}/runs/first", f"s3://{bucket}/images", "--animate")
    assert (code, errors) == (0, [])
    root = f"s3://{bucket}/runs/first/attention"
    assert output[0] == f"{root}/attention_step_00000002.png"
    assert keys_of(output[:-1]) == ["a", "b"]
    assert store.read("runs/first/attention/attention_step_00000002.png") == expected_sheet(
        trained / "checkpoints/step_00000002", {f"images/{k}": v for k, v in images.items()}, "teacher", 2
    )
    assert Image.open(io.BytesIO(store.read("runs/first/attention/attention.gif"))).n_frames == 3
    # One object, by its whole name; and one that is not there.
    code, output, _ = run(trained, f"s3://{bucket}/images/a.png", f"--out={tmp_path}/out")
    assert (code, keys_of(output)) == (0, ["a"])
    code, _, errors = run(trained, f"s3://{bucket}/nothing/", f"--out={tmp_path}/out")
    assert (code, len(errors)) == (3, 1)


@pytest.mark.s3
def test_images_are_asked_for_as_the_settings_say(
    proxy: FaultProxy, bucket: str, trained: Path, tmp_path: Path, run: Run
) -> None:
    Directory(f"s3://{bucket}").write("images/a.png", noise())
    arguments = (trained, f"s3://{bucket}/images", f"--out={tmp_path}/out")
    for settings, paid in (([], False), (["storage.requester_pays=true"], True)):
        proxy.headers.clear()
        code, output, errors = run(*arguments, *settings)
        assert (code, errors, keys_of(output)) == (0, [], ["a"])
        assert {"x-amz-request-payer" in headers for headers in proxy.headers} == {paid}
    code, _, errors = run(*arguments, "storage.requester_pay=true")
    assert (code, len(errors)) == (2, 1)
    assert "did you mean storage.requester_pays?" in errors[0]
