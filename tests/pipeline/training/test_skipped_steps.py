"""Steps that are not finite are skipped: nothing is learnt from them, and schedules wait, a few steps later."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch
from tiny_states import after, save

from dinoray.pipeline.training.checkpoint import load_checkpoint
from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.training.skips import LAG, Skips
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train_step


def poisoned(state: TrainState) -> None:
    """A weight that makes every output of the student NaN."""
    with torch.no_grad():
        state.dino.student.head.last_layer.weight_v[0, 0] = float("nan")


def everything(state: TrainState) -> dict[str, Any]:
    """A copy of all that a step may change."""
    return copy.deepcopy(
        {"dino": state.dino.state_dict(), "optimizer": state.optimizer.state_dict()["state"]}
    )


@pytest.mark.parametrize("backbone", [{}, TINY_RESNET], ids=["vit", "resnet"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(backbone: dict[str, Any]) -> None:
    changes = {"backbone": backbone} if backbone else {}
    state = after(2, **changes)
    poisoned(state)
    before = everything(state)
    metrics = train_step(state, tiny_batch(state.config, seed=7))
    assert not torch.isfinite(torch.as_tensor(metrics["loss"]))
    for (name, a), b in zip(everything(state)["dino"].items(), before["dino"].values(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
    for number, moments in everything(state)["optimizer"].items():
        for name, a in moments.items():
            assert torch.equal(a, before["optimizer"][number][name]), (number, name)
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 0, 0)
    state.skips.settle()
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 1, 1)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped_too() -> None:
    state = after(1)
    next(state.dino.student.parameters()).register_hook(lambda grad: grad * float("inf"))
    before = everything(state)["dino"]
    metrics = train_step(state, tiny_batch(state.config, seed=7))
    assert torch.isfinite(torch.as_tensor(metrics["loss"]))
    assert all(torch.equal(a, before[k]) for k, a in state.dino.state_dict().items())
    state.skips.settle()
    assert state.skipped == 1


@pytest.mark.parametrize("settles", [False, True])
def test_schedules_wait_for_a_skipped_step_once_the_lag_is_over(settles: bool) -> None:
    state = after(1, optim={"warmup_epochs": 1})
    rates = [train_step_of(state, is_finite=step != 1, settles=settles)["lr"] for step in range(1, 6)]
    schedule = Schedule(state.config, num_images=NUM_IMAGES)
    # The skipped step is the second of these, counted from 0; those that began before the answer did not wait.
    assert LAG == 2
    assert rates == [schedule.at(step).lr for step in (1, 2, 3, 3, 4)]
    assert state.step == 6


def train_step_of(state: TrainState, *, is_finite: bool, settles: bool = False) -> dict[str, Any]:
    """Run the next step on its own images, with a NaN in one gradient unless it is to be finite."""
    weight = next(state.dino.student.parameters())
    hook = weight.register_hook(lambda grad: grad if is_finite else grad * float("nan"))
    metrics = train_step(state, tiny_batch(state.config, seed=state.step))
    hook.remove()
    if settles:
        state.skips.settle()
    return metrics


BAD = {2, 4, 5}


def run_to(state: TrainState, step: int, *, settles: bool = False) -> None:
    while state.step < step:
        train_step_of(state, is_finite=state.step not in BAD, settles=settles)


@pytest.mark.parametrize("stop", range(3, 9))
def test_a_run_resumed_beside_skipped_steps_equals_the_one_that_was_not_stopped(
    stop: int, tmp_path: Path
) -> None:
    whole, saving = (after(0, optim={"warmup_epochs": 1}) for _ in range(2))
    run_to(whole, 10)
    run_to(saving, stop)
    resumed = after(0, optim={"warmup_epochs": 1})
    load_checkpoint(resumed, save(saving, tmp_path))
    run_to(resumed, 10, settles=True)  # when the host learns of a step changes nothing either
    for state in (whole, resumed):
        state.skips.settle()
        assert (state.step, state.skipped, state.skipped_in_a_row) == (10, 3, 0)
    a, b = everything(whole), everything(resumed)
    assert all(torch.equal(x, b["dino"][name]) for name, x in a["dino"].items())
    assert str(a["optimizer"]) == str(b["optimizer"])


def test_a_checkpoint_from_before_the_lag_continues_with_schedules_that_wait_for_all_its_skips() -> None:
    skips = Skips.restored({"skipped": 3, "skipped_in_a_row": 1}, torch.device("cpu"))
    assert (skips.total, skips.in_a_row, skips.before_lag) == (3, 1, 3)


def test_each_skip_is_told_once_with_its_counts_and_lag_steps_later() -> None:
    state = after(0)
    told = []
    for step in range(10):
        train_step_of(state, is_finite=step not in BAD)
        told.append(state.skips.take())
    told.append(state.skips.take())
    assert [(at, *skip) for at, skips in enumerate(told, 1) for skip in skips] == [
        (5, 3, 1, 1),
        (7, 5, 2, 1),
        (8, 6, 3, 2),
    ]


def test_the_health_of_skipped_steps_is_that_of_no_steps() -> None:
    state = after(2)
    state.health.read(2, state.dino.center)
    train_step_of(state, is_finite=False)
    assert state.health.read(3, state.dino.center) == {"verdict": "healthy"}
    train_step_of(state, is_finite=True)
    train_step_of(state, is_finite=False)
    assert state.health.read(5, state.dino.center)["kl_mean"] > 0
