"""The first stage of a run from weights: only heads learn, by a rule that ends it; then a ramp, alike when resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from test_checkpoint import assert_same_run, run_to
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch, tiny_config
from tiny_states import save
from torch import Tensor

from dinoray.models.schedules import FrozenLimits, frozen_limits
from dinoray.pipeline.training import frozen_stage
from dinoray.pipeline.training.checkpoint import load_checkpoint
from dinoray.pipeline.training.config import DINOConfig, Schedule
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.frozen_stage import FrozenStage, is_flat
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

FREEZE = 3


def config(**changes: dict[str, Any]) -> DINOConfig:
    sections: dict[str, dict[str, Any]] = {
        "init": {"freeze_steps": FREEZE, "freeze_base_lr": 0.128, "freeze_teacher_momentum": 0.9},
        "optim": {"warmup_epochs": 0.3, "layer_decay": 0.5, "patch_embed_lr_scale": 0.2},
        **changes,
    }
    return tiny_config(**sections)


def start(settings: DINOConfig) -> TrainState:
    """A state whose student and teacher differ, as those of a run do."""
    state = build_state(settings, num_images=NUM_IMAGES)
    with torch.no_grad():
        for parameter in state.dino.teacher.parameters():
            parameter += 0.01
    return state


def backbones(state: TrainState) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in state.dino.state_dict().items() if ".backbone." in k}


def num_changed(state: TrainState, before: dict[str, Tensor]) -> int:
    return sum(not torch.equal(v, before[k]) for k, v in backbones(state).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": {"drop_path_rate": 0.5}},
        {"backbone": TINY_RESNET, "head": {"use_bn": True}, "train": {"accumulate_steps": 2}},
        {"optim": {"name": "sgd"}, "loss": {"koleo_weight": 0.1}},
    ],
    ids=["vit", "batch norm", "sgd"],
)
def test_frozen_backbone_keeps_its_bits_and_has_no_moments(changes: dict[str, dict[str, Any]]) -> None:
    state = start(config(**changes))
    before, teacher = backbones(state), state.dino.teacher.head.mlp[0].weight.clone()
    run_to(state, FREEZE)
    assert num_changed(state, before) == 0
    assert not torch.equal(state.dino.teacher.head.mlp[0].weight, teacher)  # its head follows
    body = {*state.dino.student.backbone.parameters()}
    assert not body & {*state.optimizer.state}
    assert all(p.grad is None for p in body)
    run_to(state, FREEZE + 2)  # the first step of the ramp has a rate of 0
    assert num_changed(state, before) > len(body)
    assert body <= {*state.optimizer.state}


def test_parameters_that_never_learn_stay_so_after_the_stage() -> None:
    state = build_state(config(), num_images=NUM_IMAGES)
    state.dino.thaw_backbone()
    fixed = state.dino.student.backbone.cls_token.requires_grad_(False)
    state.dino.freeze_backbone()
    state.dino.thaw_backbone()
    assert not fixed.requires_grad
    assert state.dino.student.backbone.pos_embed.requires_grad


def test_run_resumed_in_any_stage_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, at and after the end of the stage; `auto`, whose limits are 2 and 10 steps here, ends it by the loss."""
    monkeypatch.setattr(frozen_stage, "_FLAT", 0.2)  # batches are noise, and so are their losses
    settings = config(init={"freeze_steps": "auto"}, backbone={"drop_path_rate": 0.3})
    whole = build_state(settings, num_images=NUM_IMAGES)
    ended_at, last = None, 20
    while whole.step < last:
        save(whole, tmp_path / str(whole.step))
        run_to(whole, whole.step + 1)
        if ended_at is None and not whole.stage.is_on:
            ended_at, last = whole.step, whole.step + 3
    assert ended_at is not None
    assert "the loss is flat" in whole.stage.take_ending()
    assert whole.stage.take_ending() == ""
    for step in (0, ended_at - 1, ended_at, ended_at + 1):
        resumed = build_state(settings, num_images=NUM_IMAGES)
        load_checkpoint(resumed, tmp_path / str(step))
        assert resumed.stage.is_on == (step < ended_at)
        run_to(resumed, last)
        assert_same_run(resumed, whole)


def test_checkpoint_of_a_run_without_the_stage_is_past_it(tmp_path: Path) -> None:
    run = build_state(tiny_config(), num_images=NUM_IMAGES)
    run_to(run, 1)
    resumed = build_state(tiny_config(init={"freeze_steps": 3}), num_images=NUM_IMAGES)
    load_checkpoint(resumed, save(run, tmp_path))
    assert not resumed.stage.is_on
    for state in (run, resumed):
        run_to(state, 3)
    assert_same_run(resumed, run)


def test_skipped_step_counts_but_its_loss_does_not() -> None:
    stage = FrozenStage("auto", total_steps=200, device=torch.device("cpu"))  # windows of 2 steps
    for loss, is_finite in ((1.0, True), (float("nan"), False), (3.0, True), (5.0, True)):
        assert not stage.add(torch.tensor(loss), torch.tensor(is_finite))
    assert stage.state_dict()["means"] == [1.0, 4.0]


@pytest.mark.parametrize(
    ("losses", "length"),
    [
        ([5.0] * 100, 20),  # flat at once: the least length
        ([5.0 - 0.04 * i for i in range(100)], 100),  # falls to the end: the greatest
        ([5.0 - 0.1 * i for i in range(30)] + [2.1] * 70, 40),  # 15 windows fall; from 17 to 20 none does
    ],
)
def test_auto_ends_when_the_loss_is_flat_within_its_limits(losses: list[float], length: int) -> None:
    stage = FrozenStage("auto", total_steps=200, device=torch.device("cpu"))
    for num_steps, loss in enumerate(losses, start=1):
        resumed = FrozenStage("auto", total_steps=200, device=torch.device("cpu"))
        resumed.load_state_dict(stage.state_dict())
        stage = resumed
        if stage.add(torch.tensor(loss), torch.tensor(True)):
            assert num_steps == length
            return
    pytest.fail("the stage did not end")


def test_limits_follow_the_length_of_the_run() -> None:
    assert frozen_limits("auto", 100_000) == FrozenLimits(1000, 5000, 100)
    assert frozen_limits("auto", 800) == FrozenLimits(80, 400, 8)
    assert frozen_limits("auto", 5) == FrozenLimits(1, 5, 1)
    assert frozen_limits(7, 5)[:2] == (7, 7)


def test_few_windows_are_not_flat() -> None:
    assert not is_flat([1.0] * 5)
    assert is_flat([1.0] * 6)
    assert is_flat([9.0, 1.00, 1.01, 1.02, 1.00, 1.01, 1.01])
    assert not is_flat([1.0, 1.0, 1.0, 1.02, 1.02, 1.02])


def test_ramp_and_decay_are_those_of_a_table_by_hand() -> None:
    """Peak 0.001 after 3 steps of ramp from step 3 on, the rest of the 20 steps a cosine down to 1e-6."""
    schedule = Schedule(config(optim={"base_lr": 0.064, "warmup_epochs": 0.3}), num_images=NUM_IMAGES)
    frozen = schedule.at(2, thawed_at=None)
    assert (frozen.lr, frozen.teacher_momentum) == pytest.approx((0.002, 0.9))  # 0.128 * 4 / 256
    rates = [schedule.at(step, thawed_at=3).lr for step in (3, 4, 5, 6, 13, 20)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3, 5.005e-4, 1e-6])
    momenta = [schedule.at(step, thawed_at=3).teacher_momentum for step in (3, 20)]
    assert momenta == pytest.approx([0.996, 1.0])


def test_scales_of_the_rates_are_those_of_a_slow_oracle() -> None:
    """Blocks 0 and 1 of 2 have 0.5 ** 2 and 0.5, the stem 0.5 ** 3; the patch embedding a fifth of that."""
    state = build_state(config(), num_images=NUM_IMAGES)
    run_to(state, FREEZE + 2)
    lr = {id(p): group["lr"] for group in state.optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in state.optimizer.param_groups) == len(lr)
    for name, parameter in state.dino.student.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("backbone.patch_embed."):
            scale = 0.125 * 0.2
        elif name in ("backbone.cls_token", "backbone.pos_embed"):
            scale = 0.125
        elif name.startswith("backbone.blocks."):
            scale = 0.5 ** (2 - int(name.split(".")[2]))
        elif name.startswith("backbone."):
            scale = 0.5  # the final norm belongs to the last block
        assert lr[id(parameter)] == pytest.approx(5e-4 * scale), name


def test_ranks_end_the_stage_together_and_as_one_process_does() -> None:
    alone = build_state(config(train={"global_batch_size": 8}), num_images=NUM_IMAGES)
    for step in range(FREEZE + 3):
        train_step(alone, tiny_batch(alone.config, num_images=8, seed=step))
    for student in on_two_ranks(_train_on_a_rank):
        for name, value in alone.dino.student.state_dict().items():
            torch.testing.assert_close(student[name], value, atol=1e-5, rtol=1e-4)


def _train_on_a_rank(rank: int) -> dict[str, Tensor]:
    state = build_state(config(train={"global_batch_size": 8}), num_images=NUM_IMAGES)
    state.student = distribute(state.dino, state.device)
    for step in range(FREEZE + 3):
        batch = tiny_batch(state.config, num_images=8, seed=step)
        train_step(state, {name: column[rank * 4 : rank * 4 + 4] for name, column in batch.items()})
    return state.dino.student.state_dict()
