"""The first values of a step that are not finite are found, with the rows that have them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import TINY_RESNET, tiny_batch
from tiny_states import after, same, weights
from torch import Tensor

from dinoray.pipeline.training.non_finite import NonFinite, watched
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train_step


def look(state: TrainState) -> NonFinite:
    """Run a step of two microbatches of two images, and look at it."""
    with watched(state) as found:
        train_step(state, tiny_batch(state.config, seed=5))
    return found


def spoiling(module: torch.nn.Module, call: int, row: int) -> None:
    """Make a row of the output of a call of the module NaN."""
    calls = []

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        calls.append(output)
        if len(calls) == call:
            output = output.clone()
            output[row, 0] = float("nan")
        return output

    module.register_forward_hook(spoil)


@pytest.mark.parametrize("backbone", [{}, TINY_RESNET], ids=["vit", "resnet"])
def test_a_healthy_step_is_not_changed_by_looking_at_it(backbone: dict[str, Any]) -> None:
    changes = {"backbone": backbone} if backbone else {}
    looked, other = after(2, **changes), after(2, **changes)
    found = look(looked)
    metrics = train_step(other, tiny_batch(other.config, seed=5))
    assert found == NonFinite()
    assert same(weights(looked), weights(other))
    assert all(not module._forward_hooks for module in looked.dino.modules())
    assert float(metrics["loss"]) > 0


@pytest.mark.parametrize(
    ("call", "row", "part", "found_row"),
    [(1, 3, 0, 3), (2, 1, 0, 4 + 1), (3, 0, 1, 0), (4, 2, 1, 4 + 2)],
    ids=["global, first part", "local, first part", "global, second part", "local, second part"],
)
def test_the_first_output_is_found_with_the_row_of_its_crop(
    call: int, row: int, part: int, found_row: int
) -> None:
    state = after(1, train={"accumulate_steps": 2})
    spoiling(state.dino.student.backbone.blocks[1].norm2, call, row)
    (bad,) = look(state).outputs
    assert (bad.part, bad.network, bad.module) == (part, "student", "backbone.blocks.1.norm2")
    assert bad.inputs_are_finite
    assert bad.rows == [found_row]


def test_the_first_output_of_each_microbatch_is_found() -> None:
    state = after(1, train={"accumulate_steps": 2})
    for call in (1, 2):
        spoiling(state.dino.student.head, call, 5)
    assert [(bad.part, bad.module, bad.rows) for bad in look(state).outputs] == [
        (0, "head", [5]),
        (1, "head", [5]),
    ]


def test_what_is_computed_between_modules_is_told_by_the_inputs_of_the_next() -> None:
    state = after(1)
    state.dino.student.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * float("nan"),))
    (bad,) = look(state).outputs
    assert (bad.module, bad.inputs_are_finite) == ("head.mlp.0", False)
    assert bad.rows == list(range(16))


def test_the_teacher_is_looked_at_before_the_student() -> None:
    state = after(1)
    for network in (state.dino.student, state.dino.teacher):
        spoiling(network.head, 1, 0)
    assert [(bad.network, bad.module) for bad in look(state).outputs] == [
        ("teacher", "head"),
        ("student", "head"),
    ]


def _poison_center(state: TrainState) -> None:
    state.dino.center[3] = float("inf")


def _poison_weight(state: TrainState) -> None:
    with torch.no_grad():
        state.dino.teacher.backbone.norm.bias[0] = float("nan")


@pytest.mark.parametrize(
    ("poison", "name"), [(_poison_center, "center"), (_poison_weight, "teacher backbone.norm.bias")]
)
def test_weights_that_are_not_finite_before_the_step_are_named(
    poison: Callable[[TrainState], None], name: str
) -> None:
    state = after(1)
    poison(state)
    assert look(state).weights == [name]


def test_gradients_are_named_from_the_loss_backwards() -> None:
    state = after(1)
    state.dino.student.backbone.norm.register_full_backward_hook(
        lambda _, grads, __: (grads[0] * float("inf"),)
    )
    found = look(state)
    assert found.outputs == []
    assert found.gradients[0].startswith("backbone.blocks.1.")
    assert not any(name.startswith("head.") for name in found.gradients)
