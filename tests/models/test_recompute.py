"""Activation checkpointing: the same numbers, bit for bit, from fewer kept activations."""

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from tiny import TINY_RESNET, tiny_batch
from tiny_states import after
from torch import nn

from dinoray.models import recompute
from dinoray.models.errors import ConfigError
from dinoray.models.recompute import blocks, is_recomputing, recompute_blocks
from dinoray.pipeline.training.non_finite import watched
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train_step

VIT = {"drop_path_rate": 0.5}
BACKBONES = pytest.mark.parametrize("backbone", [VIT, TINY_RESNET], ids=["vit", "resnet"])


def after_two_steps(mode: str, backbone: dict[str, Any]) -> TrainState:
    return after(2, train={"activation_checkpointing": mode}, backbone=backbone)


def differing(a: TrainState, b: TrainState) -> list[str]:
    theirs = b.dino.state_dict()
    return [name for name, x in a.dino.state_dict().items() if not torch.equal(x, theirs[name])]


@BACKBONES
def test_what_is_learnt_is_the_same_bit_for_bit(backbone: dict[str, Any]) -> None:
    plain = after_two_steps("none", backbone)
    for mode in ("selective", "full"):
        assert differing(after_two_steps(mode, backbone), plain) == []


def test_without_copies_the_running_statistics_would_be_updated_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recompute, "_contexts", lambda _: (nullcontext(), nullcontext()))
    apart = differing(after_two_steps("full", TINY_RESNET), after_two_steps("none", TINY_RESNET))
    assert any(name.endswith("running_mean") for name in apart)
    assert any(name.endswith("num_batches_tracked") for name in apart)


@BACKBONES
def test_each_mode_keeps_fewer_bytes_than_the_one_before(backbone: dict[str, Any]) -> None:
    kept = dict.fromkeys(("none", "selective", "full"), 0)
    for mode in kept:
        state = after(0, train={"activation_checkpointing": mode}, backbone=backbone)
        storages = {}

        def keep(x: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = state.dino.student.backbone(torch.zeros(8, 3, 16, 16))
        kept[mode] = sum(storages.values())
        assert features.requires_grad
    assert kept["full"] < kept["selective"] < kept["none"]


@pytest.mark.parametrize(
    ("name", "kwargs", "count"),
    [
        ("vit_tiny_patch16_224", {"depth": 3}, 3),
        ("resnet18", {}, 8),
        ("convnext_atto", {}, 12),
    ],
)
def test_the_blocks_of_networks_of_timm_are_found(name: str, kwargs: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **kwargs)
        found = blocks(model)
    assert len(found) == count
    assert len({type(block) for block in found}) == 1


def test_a_network_without_known_blocks_is_refused_with_the_remedy() -> None:
    recompute_blocks(nn.Linear(2, 2), "none")
    with pytest.raises(
        ConfigError, match=r"=full needs .* Linear is none; set train.activation_checkpointing=none"
    ):
        recompute_blocks(nn.Linear(2, 2), "full")


def test_what_is_not_finite_is_found_in_the_first_forward_alone() -> None:
    state = after(0, train={"activation_checkpointing": "full"})
    seen: list[bool] = []
    block = state.dino.student.backbone.blocks[0]
    block.norm1.register_forward_hook(lambda *_: seen.append(is_recomputing()))
    with torch.no_grad():
        block.mlp.fc1.bias[0] = float("nan")
    with watched(state) as found:
        train_step(state, tiny_batch(state.config))
    assert [(bad.network, bad.module) for bad in found.outputs] == [
        ("student", "backbone.blocks.0.mlp.fc1")
    ] * 2
    assert seen == [False, False, True, True]
