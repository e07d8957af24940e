"""A run that is saved, loaded and continued is the run that went on; what cannot be continued says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
import torch
from ray.train import Checkpoint
from safetensors.torch import load_file
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch, tiny_config
from tiny_states import commit, save

from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.training.checkpoint import (
    Found,
    download_checkpoint,
    find_checkpoint,
    load_checkpoint,
    own_copy,
    pick_checkpoint,
    read_frozen,
    read_meta,
)
from dinoray.pipeline.training.config import CheckpointConfig, DINOConfig
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

FILES = ("meta.json", "student.safetensors", "teacher.safetensors", "train_state.pt")
NUM_STEPS = 6


def eventful_config(**changes: dict[str, Any]) -> DINOConfig:
    """Everything that a step's number decides: drop path, warm-up, temperature stairs, and a freeze that ends."""
    sections: dict[str, dict[str, Any]] = {
        "backbone": {"drop_path_rate": 0.5},
        "loss": {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 1},
        "optim": {"warmup_epochs": 0.3, "freeze_last_layer_epochs": 0.2},
        **changes,
    }
    return tiny_config(**sections)


def state_at(step: int, config: DINOConfig) -> TrainState:
    """A run after its first steps, without a stop."""
    state = build_state(config, num_images=NUM_IMAGES)
    run_to(state, step)
    return state


def run_to(state: TrainState, step: int) -> None:
    while state.step < step:
        train_step(state, tiny_batch(state.config, seed=state.step))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equality bit by bit through nested mappings and sequences."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(a: TrainState, b: TrainState) -> None:
    assert a.step == b.step
    assert_same(a.dino.state_dict(), b.dino.state_dict())
    # Each step writes the hyper-parameters anew.
    assert_same(a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"])


def test_a_run_continued_from_any_step_equals_the_one_that_was_not_stopped(tmp_path: Path) -> None:
    config = eventful_config()
    whole = build_state(config, num_images=NUM_IMAGES)
    for step in range(NUM_STEPS):
        save(whole, tmp_path / str(step))
        run_to(whole, step + 1)
    for step in range(NUM_STEPS):
        torch.rand(step)  # another process: nothing that it draws may matter
        resumed = build_state(config, num_images=NUM_IMAGES)
        load_checkpoint(resumed, tmp_path / str(step))
        assert resumed.step == step
        run_to(resumed, NUM_STEPS)
        assert_same_run(resumed, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": {"name": "sgd"}, "head": {"norm_last_layer": False}},
        {"optim": {"name": "lars"}, "backbone": TINY_RESNET, "head": {"use_bn": True}},
    ],
    ids=["sgd", "lars and batch norm"],
)
def test_other_optimisers_and_batch_statistics_are_continued_too(
    tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    config = eventful_config(**changes)
    whole = state_at(2, config)
    resumed = build_state(config, num_images=NUM_IMAGES)
    load_checkpoint(resumed, save(whole, tmp_path))
    for state in (whole, resumed):
        run_to(state, 4)
    assert_same_run(resumed, whole)


def test_a_checkpoint_is_four_files_that_load_without_pickle(tmp_path: Path) -> None:
    folder = save(state_at(2, eventful_config()), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == list(FILES)
    assert torch.load(folder / "train_state.pt", weights_only=True).keys() == {
        "step",
        "optimizer",
        "center",
        "health",
    }
    assert (
        load_file(folder / "student.safetensors").keys() == load_file(folder / "teacher.safetensors").keys()
    )


def test_the_meta_data_say_what_the_run_was(tmp_path: Path) -> None:
    config = eventful_config()
    meta = read_meta(save(state_at(3, config), tmp_path, corrupt=2))
    assert (meta["step"], meta["total_steps"], meta["num_images"]) == (3, 20, NUM_IMAGES)
    assert meta["bad_images"] == {"corrupt": 2}
    assert DINOConfig.model_validate(meta["config"]) == config


def test_loading_returns_the_meta_data(tmp_path: Path) -> None:
    config = eventful_config()
    folder = save(state_at(1, config), tmp_path, missing=1)
    assert load_checkpoint(build_state(config, num_images=NUM_IMAGES), folder) == read_meta(folder)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    config = eventful_config()
    state = state_at(2, config)
    save(state, tmp_path)
    run_to(state, 4)
    assert_same_run(state, state_at(4, config))


def assert_not_loaded(folder: Path) -> None:
    with pytest.raises(DataError, match=str(folder)) as caught:
        load_checkpoint(build_state(tiny_config(), num_images=NUM_IMAGES), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_with_a_file_missing_or_cut_off_is_named(tmp_path: Path, file: str) -> None:
    folder = save(state_at(1, tiny_config()), tmp_path)
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    assert_not_loaded(folder)
    (folder / file).unlink()
    assert_not_loaded(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("data", [b"", b"something else entirely"])
def test_a_checkpoint_with_other_bytes_in_a_file_is_named(tmp_path: Path, file: str, data: bytes) -> None:
    folder = save(state_at(1, tiny_config()), tmp_path)
    (folder / file).write_bytes(data)
    assert_not_loaded(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": {"out_dim": 16}},
        {"head": {"use_bn": True}},
        {"head": {"norm_last_layer": False}},
        {"optim": {"name": "sgd"}},
    ],
    ids=["fewer prototypes", "more layers", "more to optimise", "another optimiser"],
)
def test_a_checkpoint_of_another_model_or_optimiser_is_refused(
    tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    folder = save(state_at(1, tiny_config()), tmp_path)
    other = build_state(tiny_config(**changes), num_images=NUM_IMAGES)
    with pytest.raises(DinorayError) as caught:
        load_checkpoint(other, folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(state_at(1, tiny_config()), tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksums"]
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    with pytest.raises(DataError, match="has format 1, this version reads 2 and 3"):
        read_meta(folder)


# The teacher alone


def test_the_teachers_backbone_is_rebuilt_from_its_checkpoint_alone(tmp_path: Path) -> None:
    config = eventful_config()
    state = state_at(3, config)
    teacher = read_frozen(save(state, tmp_path))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    backbone = teacher.backbone()
    assert not backbone.training
    np.testing.assert_array_equal(
        embed(backbone, images, teacher.config.crops, precision="fp32"),
        embed(state.dino.teacher.backbone, images, config.crops, precision="fp32"),
    )
    student = embed(state.dino.student.backbone.eval(), images, config.crops, precision="fp32")
    assert not np.allclose(embed(backbone, images, config.crops, precision="fp32"), student, atol=1e-4)


def test_a_folder_that_is_no_checkpoint_has_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        read_frozen(tmp_path)


# Where a checkpoint is


def test_the_newest_is_taken_unless_a_step_is_asked_for(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    for name in ("step_00000200", "step_00000100"):
        run.write(f"checkpoints/{name}/meta.json", b"{}")
    commit(run, "step_00000200", "step_00000100")
    assert pick_checkpoint(run) == "step_00000200"
    assert pick_checkpoint(run, 100) == "step_00000100"
    with pytest.raises(
        ConfigError, match=r"step=150 is not among step_00000100, step_00000200 of .*" + tmp_path.name
    ):
        pick_checkpoint(run, 150)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path} has no committed checkpoint"):
        pick_checkpoint(Directory(str(tmp_path)))


def test_a_checkpoint_is_downloaded_whole(tmp_path: Path) -> None:
    config = eventful_config()
    state = state_at(2, config)
    save(state, tmp_path / "run" / "checkpoints" / checkpoint_name(2))
    folder = download_checkpoint(
        Directory(str(tmp_path / "run" / "checkpoints" / checkpoint_name(2))), tmp_path / "copy"
    )
    resumed = build_state(config, num_images=NUM_IMAGES)
    load_checkpoint(resumed, folder)
    assert_same_run(resumed, state)


def test_a_checkpoint_is_found_by_its_run_or_by_its_own_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = save(state_at(0, tiny_config()), run / "checkpoints" / checkpoint_name(0))
    commit(Directory(str(run)), checkpoint_name(0))
    here = Directory(str(folder))
    assert find_checkpoint(str(run)) == Found(checkpoint_name(0), here, Directory(str(run)))
    assert find_checkpoint(f"{folder}/") == Found(checkpoint_name(0), here, Directory(str(run)))
    shutil.copytree(folder, tmp_path / "copy")
    assert find_checkpoint(str(tmp_path / "copy")) == Found("copy", Directory(str(tmp_path / "copy")), None)


@pytest.mark.parametrize("file", FILES)
def test_a_checkpoint_that_lacks_a_file_is_not_downloaded(tmp_path: Path, file: str) -> None:
    folder = save(state_at(0, tiny_config()), tmp_path / "run" / "checkpoints" / checkpoint_name(0))
    (folder / file).unlink()
    with pytest.raises(DataError, match=rf"checkpoints/step_00000000 is damaged: it lacks {file}"):
        download_checkpoint(Directory(str(folder)), tmp_path / "copy")


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_steps": 0},
        {"every_minutes": 0},
        {"every_minutes": "never"},
        {"failures_per_day": 0},
        {"num_to_keep": 0},
        {"num_best_to_keep": -1},
        {"keep_every_steps": 0},
    ],
)
def test_a_run_cannot_do_without_checkpoints(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckpointConfig.model_validate(wrong)


def test_each_process_reads_a_copy_of_its_own_which_goes_when_it_is_done(tmp_path: Path) -> None:
    (tmp_path / "step_00000008").mkdir()
    (tmp_path / "step_00000008" / "meta.json").write_text("{}")
    # Any filesystem but the plain local one is remote to Ray.
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    checkpoint = Checkpoint("step_00000008", filesystem=remote)
    with own_copy(checkpoint) as mine, own_copy(checkpoint) as other:
        assert mine != other
        (other / "meta.json").write_text("")  # as a download that begins
        assert (mine / "meta.json").read_text() == "{}"
    assert not mine.exists()
    assert not other.exists()
    here = str(tmp_path / "step_00000008")
    with own_copy(Checkpoint(here)) as local:
        assert str(local) == here
    assert local.exists()
