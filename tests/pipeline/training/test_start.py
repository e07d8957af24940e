"""Where a run's weights come from: files, an earlier run, and how much of it is taken over."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import NUM_IMAGES, tiny_batch, tiny_config

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.checkpoint import save_checkpoint
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step


def trained(steps: int, **changes: dict) -> TrainState:
    config = tiny_config(**changes)
    state = build_state(config, num_images=NUM_IMAGES)
    for seed in range(steps):
        train_step(state, tiny_batch(config, seed=seed))
    return state


def checkpoint(state: TrainState, folder: Path) -> str:
    folder.mkdir()
    save_checkpoint(state, folder, num_images=NUM_IMAGES, quarantine=Quarantine())
    return str(folder)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_all_of_a_run_is_taken_over_and_it_goes_on_as_it_would_have(tmp_path: Path) -> None:
    first = trained(5)
    weights = read_weights(checkpoint(first, tmp_path / "first"))
    second = build_state(tiny_config(), num_images=NUM_IMAGES)
    folder = tmp_path / "first"
    assert load_initial_weights(second, weights, "run") == [
        f"student from 'student' of {folder}: backbone (30 tensors), head (8 tensors)",
        f"teacher from 'teacher' of {folder}: backbone (30 tensors), head (8 tensors)",
        f"centre from 'center' of {folder}",
        "optimizer state of 37 of 37 parameters; training continues at epoch 0.5, step 5",
        "skipped: nothing",
        "new: nothing",
    ]
    for state in (first, second):
        train_step(state, tiny_batch(state.config, seed=5))
    assert same(first.dino, second.dino)


def test_weights_alone_start_at_step_0_with_a_new_optimiser(tmp_path: Path) -> None:
    first = trained(3)
    second = build_state(tiny_config(train={"seed": 1}), num_images=NUM_IMAGES)
    load_initial_weights(second, read_weights(checkpoint(first, tmp_path / "first")), "weights")
    assert same(first.dino, second.dino)
    assert (second.step, second.optimizer.state_dict()["state"]) == (0, {})


def test_a_backbone_alone_leaves_head_and_centre_fresh(tmp_path: Path) -> None:
    first = trained(3)
    second = build_state(tiny_config(train={"seed": 1}), num_images=NUM_IMAGES)
    head = {k: v.clone() for k, v in second.dino.student.head.state_dict().items()}
    load_initial_weights(second, read_weights(checkpoint(first, tmp_path / "first")), "backbone")
    assert same(first.dino.teacher.backbone, second.dino.teacher.backbone)
    assert all(torch.equal(v, head[k]) for k, v in second.dino.student.head.state_dict().items())
    assert same(second.dino.student.head, second.dino.teacher.head)
    assert not second.dino.center.any()


def test_a_file_of_a_backbone_is_read_by_its_suffix(tmp_path: Path) -> None:
    backbone = trained(1).dino.teacher.backbone
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    for name in ("backbone.safetensors", "backbone.pth"):
        state = build_state(tiny_config(train={"seed": 1}), num_images=NUM_IMAGES)
        load_initial_weights(state, read_weights(str(tmp_path / name)), "weights")
        assert same(state.dino.student.backbone, backbone)
        assert same(state.dino.teacher.backbone, backbone)


def test_weights_alone_cannot_be_gone_on_from(tmp_path: Path) -> None:
    save_file(trained(0).dino.teacher.backbone.state_dict(), tmp_path / "backbone.safetensors")
    weights = read_weights(str(tmp_path / "backbone.safetensors"))
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    with pytest.raises(ConfigError, match=r"init.load=run needs .*; set init.load=weights"):
        load_initial_weights(state, weights, "run")


def test_a_run_that_is_over_cannot_be_gone_on_from(tmp_path: Path) -> None:
    weights = read_weights(checkpoint(trained(20), tmp_path / "first"))
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    with pytest.raises(
        ConfigError, match=r"train.epochs=2 is not more than the 2 epochs .*; set train.epochs=3 or more"
    ):
        load_initial_weights(state, weights, "run")


def test_another_layer_decay_starts_the_optimiser_fresh_and_says_so(tmp_path: Path) -> None:
    weights = read_weights(checkpoint(trained(3), tmp_path / "first"))
    state = build_state(tiny_config(optim={"layer_decay": 0.5}), num_images=NUM_IMAGES)
    lines = load_initial_weights(state, weights, "run")
    expected = "optimizer state: none of 37 parameters restored, because optim.layer_decay=0.5 is 1.0 there"
    assert [line for line in lines if line.startswith(expected)]
    assert state.optimizer.state_dict()["state"] == {}


def test_backbone_of_another_run_is_proposed_as_it_was(tmp_path: Path) -> None:
    kwargs = {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 4}
    weights = read_weights(checkpoint(trained(1, backbone={"kwargs": kwargs}), tmp_path / "first"))
    with pytest.raises(
        ConfigError,
        match=r"; set backbone.kwargs.embed_dim=48 backbone.kwargs.depth=1 backbone.kwargs.num_heads=4$",
    ):
        load_initial_weights(build_state(tiny_config(), num_images=NUM_IMAGES), weights, "weights")
    load_initial_weights(
        build_state(tiny_config(backbone={"kwargs": kwargs}), num_images=NUM_IMAGES), weights, "weights"
    )


def test_run_without_a_checkpoint_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(DataError, match=r"^init.from=.*run is a run that has no checkpoint yet; "):
        read_weights(str(tmp_path / "run"))


@pytest.mark.parametrize("file", ["train_state.pt", "teacher.safetensors"])
def test_damaged_checkpoint_of_a_run_is_named(tmp_path: Path, file: str) -> None:
    folder = checkpoint(trained(1), tmp_path / "first")
    (Path(folder) / file).write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"^checkpoint {folder} is damaged: .*; pass another checkpoint"):
        read_weights(folder)


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "none"])
def test_what_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/none"):
        read_weights(str(tmp_path / name))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(DataError, match=f"{tmp_path}/{name}"):
            read_weights(str(tmp_path / name))
