"""The recipe auto in the command pretrain: it looks, chooses once, prints and keeps, up to where Ray would start."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import jpeg, scene
from no_ray import RayStarted, forbid_ray
from samples import write_all

from dinoray.jobs import pretrain
from dinoray.jobs.cli.config import load_run_config
from dinoray.jobs.runs import looking
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.storage.files import Directory

Start = Callable[..., str]
COLOUR, GRAY = jpeg(scene(96, 64)), jpeg(scene(96, 64).convert("L"))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Starts the command on images at `photos` up to its Ray, and returns what it printed."""
    forbid_ray(monkeypatch)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(looking, "available_cores", lambda: 2)
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> str:
        with pytest.raises(RayStarted):
            pretrain.main(["data.path=photos", *arguments])
        return capsys.readouterr().out

    return start


def photos(folder: Path, number: int, *, classes: int = 1, data: bytes = COLOUR) -> None:
    """Write images, in folders of classes if there are several."""
    folders = [f"{i % classes}/" if classes > 1 else "" for i in range(number)]
    write_all(folder / "photos", {f"{where}{i}.jpg": data for i, where in enumerate(folders)})


def kept(folder: Path, name: str = "auto") -> str:
    return load_run_config(Directory(str(folder / "runs" / name))).to_yaml()


def test_the_choices_are_printed_and_kept(start: Start, tmp_path: Path) -> None:
    photos(tmp_path, 70, classes=7)
    lines = start().splitlines()
    begin = lines.index(
        "recipe auto: 70 images of 96 x 64 pixels (median), 3 channels, 7 classes; no GPU, 2 CPU cores"
    )
    assert lines[begin + 1].startswith("backbone.name=resnet10t: 70 images and no GPU; ")
    assert lines[-1] == f"run directory {tmp_path}/runs/auto"
    run = Directory(str(tmp_path / "runs" / "auto"))
    config = load_run_config(run)
    assert (config.recipe, config.train.global_batch_size, config.eval.k) == ("auto", 16, (2,))
    about = json.loads(run.read("environment.json"))
    assert about["automatic"][: len(lines) - 1 - begin] == lines[begin:-1]
    assert about["recipe"] == {
        "name": "auto",
        "changed": {"data.path": {"recipe": None, "run": "photos"}},
    }


def test_a_resumed_run_does_not_choose_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path, 70)
    first, config = start(), kept(tmp_path)
    photos(tmp_path, 700)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(looking, "available_cores", lambda: 64)
    assert start() == first
    assert kept(tmp_path) == config
    (tmp_path / "runs" / "auto" / "choices.json").unlink()
    start()
    assert kept(tmp_path) == config
    with pytest.raises(ConfigError, match=r"train\.global_batch_size: 16 -> 8\): choose another name"):
        pretrain.main(["data.path=photos", "train.global_batch_size=8"])
    start("--resume", "train.global_batch_size=8")
    assert kept(tmp_path) == config.replace("global_batch_size: 16", "global_batch_size: 8")


def test_a_run_that_began_with_another_recipe_resumes_with_it(start: Start, tmp_path: Path) -> None:
    photos(tmp_path, 70)
    start("--recipe=demo", "name=old")
    assert "recipe auto" not in start("name=old")
    assert "recipe: demo" in kept(tmp_path, "old")
    with pytest.raises(ConfigError, match="name=old is in use by a run with other settings"):
        pretrain.main(["data.path=photos", "--recipe=auto", "name=old"])


def test_gpus_and_gray_images_are_seen(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, 70, data=GRAY)
    gpu = type("Properties", (), {"total_memory": 24 * 10**9})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    output = start()
    assert (
        "recipe auto: 70 images of 96 x 64 pixels (median), 1 channel; 2 GPUs of 24 GB, 2 CPU cores\n"
        in output
    )
    assert "crops.saturation=0 crops.hue=0 crops.gray_prob=0: images of 1 channel; " in output
    assert "resources.train_workers=1: 2 GPUs, but batch 16; " in output


def test_settings_of_the_user_win(start: Start, tmp_path: Path) -> None:
    photos(tmp_path, 70)
    assert "train.global_batch_size" not in start("train.global_batch_size=8", "optim.base_lr=0.007")
    config = load_run_config(Directory(str(tmp_path / "runs" / "auto")))
    assert (config.train.global_batch_size, config.optim.base_lr, config.head.use_bn) == (8, 0.007, False)


def test_few_images_are_adapted_to_or_refused(start: Start, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"no images under .*photos; nothing is there; check data\.path"):
        pretrain.main(["data.path=photos"])
    photos(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"data\.path=photos holds 1 image, .* at least 2; add images"):
        pretrain.main(["data.path=photos"])
    photos(tmp_path, 7)
    output = start()
    assert "warning: data.path=photos holds 7 images, fewer than 500: too few to train from random" in output
    assert "train.global_batch_size=2: 7 images; " in output
    with pytest.raises(
        ConfigError, match=r"global_batch_size=64 is more than the 7 images .* set train\.global"
    ):
        pretrain.main(["data.path=photos", "train.global_batch_size=64", "name=b"])


def test_print_config_shows_what_auto_would_choose(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path, 70)
    pretrain.main(["data.path=photos", "train.global_batch_size=8", "--print-config"])
    text = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert re.search(r"^# recipe auto: 70 images of 96 x 64 pixels", text, re.MULTILINE)
    assert re.search(r"^  name: resnet10t  # recipe auto$", text, re.MULTILINE)
    assert re.search(r"^  global_batch_size: 8  # command line$", text, re.MULTILINE)
    assert re.search(r"^  clip_grad: 3.0  # default$", text, re.MULTILINE)
    (tmp_path / "auto.yaml").write_text(text)
    start("train.global_batch_size=8")
    config = kept(tmp_path)
    start("--config=auto.yaml", "name=again")
    assert kept(tmp_path, "again") == config.replace("name: auto", "name: again", 1)
    photos(tmp_path, 700)
    pretrain.main(["data.path=photos", "train.global_batch_size=8", "--print-config"])
    assert capsys.readouterr().out == text  # the run has begun


def test_without_images_of_ones_own_the_demo_stays(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main(["--print-config"])
    assert "recipe: demo  # default" in capsys.readouterr().out
