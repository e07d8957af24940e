"""Checkpoints and initial weights that cannot be used: following the message's remedy ends the error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import checkpoint, trained
from jobs_processes import TINY
from remedies import settings_to_set
from tiny import NUM_IMAGES, tiny_config

from dinoray.jobs.cli.config import apply_overrides, load_config
from dinoray.jobs.runs.open_checkpoint import open_network
from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.ray_private.train import SNAPSHOT
from dinoray.pipeline.reporting.run_report import build_report
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import load_checkpoint
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.published_weights import fetch_published_weights
from dinoray.pipeline.training.state import build_state


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"name": "sgd"}},
        {"optim": {"layer_decay": 0.5}},
        {"head": {"out_dim": 16}},
        {"backbone": {"name": "deit_tiny_distilled_patch16_224"}},
        {"head": {"use_bn": True}},
        {"head": {"out_dim": 16}, "optim": {"layer_decay": 0.5}},
        {"backbone": {"kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}}},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_a_checkpoint_are_set_back(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(checkpoint(trained(tiny_config()), tmp_path / "lone"))
    config = tiny_config(**changes)
    with pytest.raises(DinorayError) as error:
        load_checkpoint(build_state(config, num_images=NUM_IMAGES), folder)
    mended = apply_overrides(config.model_dump(mode="json"), settings_to_set(str(error.value)))
    load_checkpoint(build_state(type(config).model_validate(mended), num_images=NUM_IMAGES), folder)


# Damage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path / "run"
    names = [checkpoint_name(step) for step in (2, 3)]
    for step, name in zip((2, 3), names, strict=True):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        checkpoint(trained(tiny_config(), steps=step), folder / "checkpoints" / name)
    results = [{"checkpoint_dir_name": name} for name in names]
    (folder / "checkpoints" / SNAPSHOT).write_text(json.dumps({"checkpoint_results": results}))
    return folder


def torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [torn, Path.unlink], ids=["torn", "gone"])
@pytest.mark.parametrize("file", ["teacher.safetensors", "meta.json"])
def test_another_checkpoint_of_the_run_is_taken_by_its_step(
    file: str, damage: Callable[[Path], object], run: Path
) -> None:
    damage(run / "checkpoints" / checkpoint_name(3) / file)
    with pytest.raises(DataError, match=r" is damaged: .*; pass another checkpoint") as error:
        open_network(str(run), None, "teacher")
    assert "\n" not in str(error.value)
    assert open_network(str(run), 2, "teacher").step == 2


def test_training_goes_on_from_another_checkpoint_of_the_run(run: Path) -> None:
    last = run / "checkpoints" / checkpoint_name(3)
    torn(last / "train_state.pt")
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    with pytest.raises(DataError, match=r"; pass another checkpoint"):
        load_checkpoint(state, last)
    with pytest.raises(DataError, match=r"; pass another checkpoint"):
        read_weights(str(last))
    other = build_state(tiny_config(), num_images=NUM_IMAGES)
    load_initial_weights(other, read_weights(str(run / "checkpoints" / checkpoint_name(2))), "run")
    assert other.step == 2


def test_a_report_is_of_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"; give the directory that the run printed$"):
        build_report(Directory(str(tmp_path)))
    (run / "config.yaml").write_text(load_config("demo", None, [*TINY, "name=run"]).to_yaml())
    assert "<html" in build_report(Directory(str(run)))


# Initial weights


def test_what_is_no_weights_gives_way_to_a_file_a_run_or_a_checkpoint(run: Path, tmp_path: Path) -> None:
    weights = {
        "file": f"{tmp_path}/x.pth",
        "run": str(run),
        "checkpoint": f"{run}/checkpoints/{checkpoint_name(2)}",
    }
    backbone = build_state(tiny_config(), num_images=NUM_IMAGES).dino.teacher.backbone
    torch.save(backbone.state_dict(), weights["file"])
    for name in ("empty", "other", "young/checkpoints"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "other/readme.txt").write_text("x")
    (tmp_path / "x.onnx").write_bytes(b"\x08")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    for wrong, says, followed in (
        ("empty", "; pass a file of weights, or a run directory", ["file", "run"]),
        ("none", "; check the path", ["file"]),
        ("other", "; pass a file of weights, or a run directory", ["file", "run"]),
        ("young", "; wait for its first, or pass another run", ["run"]),
        (
            "x.onnx",
            "that it was made from, a run directory or a checkpoint folder",
            ["file", "run", "checkpoint"],
        ),
        ("bad.safetensors", "; save or download it anew", ["file"]),
    ):
        with pytest.raises(DinorayError, match=f"{says}$"):
            read_weights(f"{tmp_path}/{wrong}")
        for name in followed:
            read_weights(weights[name])


def test_a_run_that_is_young_is_read_once_it_has_a_checkpoint(run: Path, tmp_path: Path) -> None:
    (tmp_path / "young/checkpoints").mkdir(parents=True)
    with pytest.raises(DataError, match=r"; wait for its first, or pass another run$"):
        read_weights(f"{tmp_path}/young")
    shutil.copytree(run / "checkpoints", tmp_path / "young/checkpoints", dirs_exist_ok=True)
    read_weights(f"{tmp_path}/young")


def test_published_weights_or_a_file_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    config = tiny_config(backbone={"pretrained": True})
    with pytest.raises(ConfigError) as error:
        fetch_published_weights(config, init_path="/x.pth")
    mended = apply_overrides(config.model_dump(mode="json"), settings_to_set(str(error.value)))
    assert not type(config).model_validate(mended).backbone.pretrained  # then a job fetches nothing


# Bad images


def test_a_higher_limit_lets_a_run_go_on() -> None:
    quarantine = Quarantine()
    quarantine.counts["corrupt"] = 11
    words = {"num_seen": 1000, "num_images": 1000, "file": "quarantine.jsonl"}
    with pytest.raises(
        DataError, match=r"; mend or remove them, or raise data\.max_bad_fraction; they are named"
    ):
        quarantine.check(limit=0.01, **words)  # type: ignore[arg-type]
    quarantine.check(limit=0.02, **words)  # type: ignore[arg-type]
