"""Mistakes that ports of DINO have made and that no other file here holds: each is a test of the whole step."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from side_by_side import copies
from tiny import NUM_IMAGES, tiny_batch, tiny_config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step


def run(state: TrainState, *, num_steps: int) -> None:
    for seed in range(num_steps):
        train_step(state, tiny_batch(state.config, seed=seed))


def freezing_config() -> DINOConfig:
    """The last layer, magnitudes included, is frozen for two steps."""
    return tiny_config(head={"norm_last_layer": False}, optim={"freeze_last_layer_epochs": 0.2})


def test_the_teacher_sees_the_global_crops_alone_when_local_ones_are_as_large() -> None:
    state = build_state(tiny_config(crops={"local_crop_size": 16}), num_images=NUM_IMAGES)
    rows: dict[str, list[int]] = {"student": [], "teacher": []}
    for name, network in (("student", state.dino.student), ("teacher", state.dino.teacher)):
        network.backbone.register_forward_hook(lambda *call, name=name: rows[name].append(len(call[1][0])))
    run(state, num_steps=1)
    assert rows == {"student": [4 * 4], "teacher": [2 * 4]}


def test_the_optimiser_holds_the_students_parameters_and_none_of_the_teachers() -> None:
    state = build_state(tiny_config(), num_images=NUM_IMAGES)
    held = {p for group in state.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in state.dino.student.parameters() if p.requires_grad}
    assert not held & set(state.dino.teacher.parameters())
    run(state, num_steps=1)
    assert all(p.grad is None for p in state.dino.teacher.parameters())


def test_moments_of_the_last_layer_begin_when_its_freeze_ends() -> None:
    state = build_state(freezing_config(), num_images=NUM_IMAGES)
    run(state, num_steps=2)
    head: Any = state.dino.student.head
    last_layer = list(head.last_layer.parameters())
    assert len(last_layer) == 2
    assert not any(p in state.optimizer.state for p in last_layer)
    run(state, num_steps=1)
    assert [float(state.optimizer.state[p]["step"]) for p in last_layer] == [1, 1]
    others = [p for p in state.optimizer.state if all(p is not q for q in last_layer)]
    assert {float(state.optimizer.state[p]["step"]) for p in others} == {3}


def test_a_frozen_last_layer_does_not_stall_a_distributed_step() -> None:
    alone = build_state(freezing_config(), num_images=NUM_IMAGES)
    run(alone, num_steps=4)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{Path(folder) / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            state = build_state(freezing_config(), num_images=NUM_IMAGES)
            state.student = DistributedDataParallel(state.dino.student)
            run(state, num_steps=4)
        finally:
            dist.destroy_process_group()
    for name, expected in alone.dino.state_dict().items():
        torch.testing.assert_close(state.dino.state_dict()[name], expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_too_slow_for_bf16_follows_in_float32() -> None:
    config = tiny_config(
        train={"precision": "bf16"},
        teacher={"teacher_momentum": 0.9995, "final_teacher_momentum": 0.9995},
    )
    state = build_state(config, num_images=NUM_IMAGES)
    before = copies(state.dino.teacher.state_dict())
    run(state, num_steps=1)
    moved = 0
    for name, student in state.dino.student.state_dict().items():
        teacher = state.dino.teacher.state_dict()[name]
        assert student.dtype == teacher.dtype == torch.float32
        expected = 0.9995 * before[name].double() + 0.0005 * student.double()
        torch.testing.assert_close(teacher.double(), expected, rtol=1e-7, atol=1e-9)
        moved += int((teacher != before[name]).sum())
    assert moved > 10_000
    assert state.dino.center.dtype == torch.float32


def test_a_run_past_its_end_goes_on_and_its_teacher_stays() -> None:
    state = build_state(tiny_config(train={"epochs": 0.2}), num_images=NUM_IMAGES)
    assert state.schedule.total_steps == 2
    run(state, num_steps=2)
    student, teacher = (copies(n.state_dict()) for n in (state.dino.student, state.dino.teacher))
    run(state, num_steps=2)
    assert equal(state.dino.teacher.state_dict(), teacher)
    assert not equal(state.dino.student.state_dict(), student)


@pytest.mark.parametrize(
    ("first", "loss"),
    [([0.0, 0.0, 0.0, 0.0], "ln K"), ([9.0, 0.0, 0.0, 0.0], "zero")],
    ids=["uniform", "one"],
)
def test_in_either_collapse_the_divergence_vanishes_and_the_entropy_tells_which(
    first: list[float], loss: str
) -> None:
    config = tiny_config(head={"out_dim": 4, "norm_last_layer": False})
    state = build_state(config, num_images=NUM_IMAGES)
    direction = torch.zeros(16)
    direction[0] = 1.0
    for network in (state.dino.student, state.dino.teacher):
        collapse(network, direction, magnitudes=torch.tensor(first))
    metrics = {name: float(value) for name, value in train_step(state, tiny_batch(config)).items()}
    expected = {"ln K": 4.0, "zero": 1.0}[loss]
    log_expected = float(torch.tensor(expected).log())
    assert metrics["loss"] == pytest.approx(log_expected, abs=1e-5)
    assert metrics["teacher_entropy"] == pytest.approx(log_expected, abs=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def collapse(network: Any, direction: Tensor, *, magnitudes: Tensor) -> None:
    """Let every image come out as `direction`, and each prototype point there too, as long as its magnitude."""
    network.head.mlp[-1].weight.zero_()
    network.head.mlp[-1].bias.copy_(direction)
    network.head.last_layer.weight_v.copy_(direction.expand(len(magnitudes), -1))
    network.head.last_layer.weight_g.copy_(magnitudes[:, None])


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
