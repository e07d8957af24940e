"""Steps that are not finite are skipped: nothing is learnt from them, and schedules wait."""

import copy
from typing import Any

import pytest
import torch
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch
from tiny_states import after

from dinoray.pipeline.training.config import Schedule
from dinoray.pipeline.training.step import TrainState, train_step


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
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 1, 1)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped_too() -> None:
    state = after(1)
    next(state.dino.student.parameters()).register_hook(lambda grad: grad * float("inf"))
    before = everything(state)["dino"]
    metrics = train_step(state, tiny_batch(state.config, seed=7))
    assert torch.isfinite(torch.as_tensor(metrics["loss"]))
    assert all(torch.equal(a, before[k]) for k, a in state.dino.state_dict().items())
    assert state.skipped == 1


def test_schedules_wait_while_steps_are_skipped() -> None:
    state = after(1, optim={"warmup_epochs": 1})
    weight = state.dino.student.head.last_layer.weight_v
    whole = weight.detach().clone()
    poisoned(state)
    skipped = train_step(state, tiny_batch(state.config, seed=1))
    with torch.no_grad():
        weight.copy_(whole)
    retried = train_step(state, tiny_batch(state.config, seed=2))
    assert retried["lr"] == skipped["lr"] == Schedule(state.config, num_images=NUM_IMAGES).at(1).lr
    assert (state.step, state.skipped, state.skipped_in_a_row) == (3, 1, 0)
