"""The training step against one written out by hand, alone and over processes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracles import WrittenOutRun
from ranks import NUM_STEPS, run_steps, training_config, two_ranks
from tiny import tiny_batch, tiny_config
from tiny_states import METRICS, same, tiny_state, weights
from torch import nn

from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.pixels import pixels
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import autocast, train_step


def run(state: TrainState, *, num_steps: int = 3) -> list[dict[str, float]]:
    """Steps on batches that only the step's number decides."""
    metrics = []
    for _ in range(num_steps):
        batch = tiny_batch(state.config, num_images=state.config.train.global_batch_size, seed=state.step)
        metrics.append({name: float(value) for name, value in train_step(state, batch).items()})
    return metrics


def assert_close_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=f"{name} differs")


# One step


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crops": {"num_local_crops": 0}},
        {"crops": {"num_global_crops": 1, "global_blur_prob": [1], "global_solarize_prob": [0]}},
        {"head": {"norm_last_layer": False}, "optim": {"clip_grad": 0.0, "base_lr": 0.064}},
        {"optim": {"freeze_last_layer_epochs": 0.2}},
    ],
    ids=["default", "no local crops", "one global crop", "learnt magnitude", "frozen last layer"],
)
def test_steps_equal_those_written_out_by_hand(changes: dict[str, dict[str, Any]]) -> None:
    changes = {**changes, "optim": {"name": "sgd", "base_lr": 0.64, **changes.get("optim", {})}}
    changes["loss"] = {"teacher_temp": 0.07, "warmup_teacher_temp": 0.04, "warmup_teacher_temp_epochs": 1}
    config = tiny_config(**changes, teacher={"teacher_momentum": 0.9})
    state, twin = tiny_state(config), tiny_state(config)
    written_out = WrittenOutRun(twin.dino.student, twin.dino.teacher, config)
    for step in range(4):
        batch = tiny_batch(config, seed=step)
        expected = written_out.step(batch, state.schedule.at(step))
        loss = float(train_step(state, batch)["loss"])
        assert loss == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(state.dino.center, written_out.center, rtol=1e-3, atol=1e-5)
    assert_close_parameters(state.dino.student, twin.dino.student)
    assert_close_parameters(state.dino.teacher, twin.dino.teacher)


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    config = tiny_config(backbone={"drop_path_rate": 0.5})
    first, second = tiny_state(config), tiny_state(config)
    assert same(weights(first), weights(second))
    run(first)
    torch.rand(7)  # what else the process draws does not matter
    run(second)
    assert same(weights(first), weights(second))


def test_another_seed_gives_other_weights_and_other_stochastic_depth() -> None:
    def config(seed: int) -> DINOConfig:
        return tiny_config(backbone={"drop_path_rate": 0.5}, train={"seed": seed})

    first, second = tiny_state(config(0)), tiny_state(config(1))
    assert not same(weights(first), weights(second))
    second.dino.load_state_dict(first.dino.state_dict())
    assert run(first, num_steps=1)[0]["loss"] != run(second, num_steps=1)[0]["loss"]


@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 10**12])
def test_a_large_seed_is_a_seed(seed: int) -> None:
    run(tiny_state(tiny_config(train={"seed": seed})), num_steps=1)


def test_stochastic_depth_is_drawn_anew_at_each_step() -> None:
    config = tiny_config(backbone={"drop_path_rate": 0.5}, optim={"base_lr": 1e-20})
    state = tiny_state(config)
    state.dino.center.zero_()
    losses = set()
    for _ in range(4):
        losses.add(float(train_step(state, tiny_batch(config))["loss"]))
        state.dino.center.zero_()
    assert len(losses) == 4


def test_a_step_reports_all_metrics_and_they_are_finite() -> None:
    state = tiny_state()
    for metrics in run(state):
        assert metrics.keys() == METRICS
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["kl"] == pytest.approx(metrics["loss"] - metrics["teacher_entropy"], abs=1e-6)
        assert metrics["grad_norm"] > 0
    assert state.step == 3


def test_a_step_reports_the_settings_it_ran_with() -> None:
    state = tiny_state()
    for step, metrics in enumerate(run(state)):
        now = state.schedule.at(step)
        assert (metrics["lr"], metrics["teacher_temp"]) == (now.lr, now.teacher_temp)
        assert (metrics["weight_decay"], metrics["teacher_momentum"]) == (
            now.weight_decay,
            now.teacher_momentum,
        )


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_read_only_batch_is_read_and_not_written_to() -> None:
    state, batch = tiny_state(), tiny_batch(tiny_config())
    before = {name: column.copy() for name, column in batch.items()}
    for column in batch.values():
        column.setflags(write=False)
    train_step(state, batch)
    assert all(np.array_equal(batch[name], before[name]) for name in batch)


def test_a_writable_batch_is_not_written_to_either() -> None:
    config = tiny_config(crops={"num_global_crops": 1, "global_blur_prob": [1], "global_solarize_prob": [0]})
    batch = tiny_batch(config)
    before = {name: column.copy() for name, column in batch.items()}
    train_step(
        tiny_state(config), {name: torch.from_numpy(batch[name]) for name in ("global_crops", "local_crops")}
    )
    assert all(np.array_equal(batch[name], before[name]) for name in batch)


def test_pixels_are_normalised_and_ordered_by_crop() -> None:
    crops = np.zeros((3, 2, 8, 8, 3), np.uint8)
    for b in range(3):
        for c in range(2):
            crops[b, c] = (100 * c + 10 * b, 0, 255)
    x = pixels(crops, tiny_config().crops, torch.device("cpu"))
    assert x.dtype == torch.float32
    reds = [((100 * c + 10 * b) / 255 - 0.485) / 0.229 for c in range(2) for b in range(3)]
    torch.testing.assert_close(x[:, 0, 5, 6], torch.tensor(reds))
    torch.testing.assert_close(x[:, 1, 0, 0], torch.full((6,), -0.456 / 0.224))
    torch.testing.assert_close(x[:, 2, 0, 0], torch.full((6,), (1 - 0.406) / 0.225))


def test_images_are_paired_with_their_own_crops() -> None:
    # Each image is of one grey and all its crops alike: a teacher and a student that see the same image agree.
    config = tiny_config(loss={"center_momentum": 0.0})
    greys = np.array([0, 80, 160, 255], np.uint8)[:, None, None, None, None]
    batch = {
        "global_crops": np.broadcast_to(greys, (4, 2, 16, 16, 3)),
        "local_crops": np.broadcast_to(greys, (4, 2, 8, 8, 3)),
    }
    mixed = {
        name: np.stack([np.roll(column[:, i], i, axis=0) for i in range(2)], 1)
        for name, column in batch.items()
    }
    state, other = tiny_state(config), tiny_state(config)
    for twin in (state, other):
        twin.dino.center.copy_(
            twin.dino.teacher_output(pixels(batch["global_crops"], config.crops, twin.device)).logits.mean(0)
        )
    assert float(train_step(state, batch)["loss"]) < float(train_step(other, mixed)["loss"]) - 0.5


def test_the_center_of_a_step_is_the_one_from_before_it() -> None:
    config = tiny_config(loss={"center_momentum": 0.0})
    batch = tiny_batch(config)
    from_zero, from_ten = tiny_state(config), tiny_state(config)
    from_ten.dino.center[0] = -10.0  # the teacher then names prototype 0 alone
    losses = [float(train_step(state, batch)["loss"]) for state in (from_zero, from_ten)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(
        from_zero.dino.center, from_ten.dino.center
    )  # afterwards it is the batch's mean
    assert from_zero.dino.center.any()


def test_the_last_layer_waits_until_its_freeze_ends() -> None:
    state = tiny_state(tiny_config(optim={"freeze_last_layer_epochs": 0.2}))  # 2 of 10 steps an epoch
    parameters = dict(state.dino.student.named_parameters())
    last_layer, other = parameters["head.last_layer.weight_v"], parameters["backbone.pos_embed"]
    before, other_before = last_layer.detach().clone(), other.detach().clone()
    run(state, num_steps=2)
    assert torch.equal(last_layer, before)
    assert not torch.equal(other, other_before)
    run(state, num_steps=1)
    assert not torch.equal(last_layer, before)


def test_the_teacher_follows_after_the_students_step() -> None:
    state = tiny_state(tiny_config(teacher={"teacher_momentum": 0.0, "final_teacher_momentum": 0.0}))
    run(state, num_steps=1)
    student, teacher = state.dino.student.state_dict(), state.dino.teacher.state_dict()
    assert same(student, teacher)
    assert not same(student, tiny_state().dino.student.state_dict())


def test_loss_falls_towards_the_entropy_of_a_teacher_that_stays() -> None:
    config = tiny_config(
        teacher={"teacher_momentum": 1.0},
        loss={"teacher_temp": 0.1, "center_momentum": 0.0},
        train={"epochs": 4},
    )
    state, batch = tiny_state(config), tiny_batch(config, num_images=8)
    metrics = [{k: float(v) for k, v in train_step(state, batch).items()} for _ in range(30)]
    # From the second step on the centre is the mean over the batch, and so the targets are always the same.
    entropies, kl = ([m[name] for m in metrics[1:]] for name in ("teacher_entropy", "kl"))
    assert entropies == pytest.approx([entropies[0]] * 29)
    assert kl[-1] < 0.2 * kl[0]


def test_bf16_is_autocast_where_it_is_asked_for() -> None:
    config = tiny_config(train={"precision": "bf16"})
    state, exact = tiny_state(config), tiny_state()
    loss, exact_loss = (run(s, num_steps=1)[0]["loss"] for s in (state, exact))
    assert loss != exact_loss
    assert loss == pytest.approx(exact_loss, rel=0.1, abs=0.05)
    assert all(x.dtype == torch.float32 for x in weights(state).values() if x.is_floating_point())
    assert state.dino.center.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "device", "casts"),
    [("auto", "cpu", False), ("fp32", "cpu", False), ("bf16", "cpu", True), ("fp32", "cuda", False)],
)
def test_precision_auto_is_bf16_on_a_gpu_alone(precision: str, device: str, casts: bool) -> None:
    with autocast(precision, torch.device(device)):
        assert torch.is_autocast_enabled(device) is casts


# Several processes, one result


def test_two_processes_of_four_equal_one_of_eight() -> None:
    state = tiny_state(training_config())
    metrics, centers = run_steps(state, rows=slice(None))
    assert len(metrics) == NUM_STEPS
    for rank in two_ranks():
        for ours, theirs in zip(rank.metrics, metrics, strict=True):
            for name in ("loss", "teacher_entropy", "kl"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        torch.testing.assert_close(rank.centers, centers, rtol=0, atol=1e-5)


def test_all_processes_end_with_the_same_weights() -> None:
    first, second = two_ranks()
    assert same(first.student, second.student)
    assert same(first.teacher, second.teacher)
    assert torch.equal(first.centers, second.centers)
    assert first.metrics == second.metrics


def test_each_process_draws_its_own_stochastic_depth() -> None:
    first, second = two_ranks()
    assert not torch.equal(first.drop_path_logits, second.drop_path_logits)
