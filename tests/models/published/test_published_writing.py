"""Checkpoints go out as published ones: what came in goes out as it was, for the published code to resume."""

from typing import Any

import pytest
import torch
from published import Head, MultiCropWrapper, Run, ViT, load_pretrained_weights, saved
from published_twins import (
    RESNET,
    assert_same,
    assert_same_moments,
    dino,
    moments,
    optimizer_of,
    read,
    torchvision_resnet,
)
from tiny import TINY_RESNET

from dinoray.models.published.checkpoint import load, load_optimizer, to_official


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"norm_last_layer": False, "optimizer": "sgd"}, {"norm_last_layer": False}),
        ({"use_bn": True, "optimizer": "lars"}, {"use_bn": True}),
        (
            {"backbone": torchvision_resnet, "use_bn": True, "optimizer": "lars"},
            {"backbone": RESNET, "use_bn": True},
        ),
    ],
    ids=["adamw", "sgd, learnt magnitude", "lars, batch norm", "resnet"],
)
def test_what_comes_in_goes_out_as_it_was(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    run, networks = Run(**theirs).train(), dino(**ours)
    load(networks, weights := read(run.state()))
    optimizer = optimizer_of(networks, name=theirs.get("optimizer", "adamw"))
    load_optimizer(optimizer, networks.student, weights.optimizer)
    data = saved(to_official(networks, optimizer, epoch=9, args={"arch": "vit_small", "lr": 0.001}))

    other = Run(**theirs).train(1)
    assert other.restart(data) == 9
    for part in ("student", "teacher", "dino_loss"):
        before, after = run.state()[part], other.state()[part]
        assert list(before) == list(after)
        for k, v in before.items():
            assert torch.equal(v, after[k]), k
    assert_same_moments(moments(other.optimizer, other.networks[0]), moments(run.optimizer, run.networks[0]))
    other.train(1)  # its groups have all that a step looks up
    body = networks.teacher.backbone
    copy = torchvision_resnet() if "backbone" in theirs else ViT()
    load_pretrained_weights(copy, data)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_same(body.eval()(x), copy.eval()(x))


def test_a_written_checkpoint_says_what_the_published_one_says() -> None:
    run, ours = Run().train(), dino()
    load(ours, read(run.state()))
    state = to_official(ours, optimizer_of(ours), epoch=9, args={"arch": "vit_small"})
    assert state.keys() == run.state().keys() - {"fp16_scaler"}
    assert state["args"] == {"arch": "vit_small"}
    groups, published = (s["optimizer"]["param_groups"] for s in (state, run.state()))
    assert [g["params"] for g in groups] == [g["params"] for g in published]
    assert groups[1]["weight_decay"] == 0


def test_rates_of_their_own_become_the_published_two_groups() -> None:
    ours = dino(norm_last_layer=False)
    optimizer = optimizer_of(ours, layer_decay=0.5)
    ours.student([torch.randn(2, 3, 16, 16)]).logits.square().mean().backward()
    for group in optimizer.param_groups:
        group |= {"lr": 0.1 * group["lr_scale"], "weight_decay": 0.3 if group["decays"] else 0.0}
    optimizer.step()
    state = to_official(ours, optimizer, epoch=1, args={})
    assert [(g["lr"], g["weight_decay"]) for g in state["optimizer"]["param_groups"]] == [
        (0.1, 0.3),
        (0.1, 0.0),
    ]
    run = Run(norm_last_layer=False)
    run.restart(saved(state))
    assert_same_moments(moments(run.optimizer, run.networks[0]), moments(optimizer, ours.student))


def test_a_tiny_resnet_of_ours_survives_the_round_trip() -> None:
    theirs, ours = (dino(backbone=TINY_RESNET, use_bn=True) for _ in range(2))
    weights = read(to_official(theirs, optimizer_of(theirs), epoch=1, args={"pos_embed": "timm"}))
    load(ours, weights)
    for k, v in theirs.state_dict().items():
        assert torch.equal(v, ours.state_dict()[k])


@pytest.mark.parametrize(("pos_embed", "official"), [("timm", False), ("official", True)])
def test_an_exported_checkpoint_says_how_its_position_embeddings_are_resized(
    pos_embed: str, official: bool
) -> None:
    ours = dino(pos_embed=pos_embed)
    state = to_official(ours, optimizer_of(ours), epoch=1, args={"pos_embed": pos_embed})
    assert read(state).official is official


def test_the_head_of_this_test_is_the_head_that_ours_is() -> None:
    wrapper = MultiCropWrapper(ViT(), Head(32))
    assert wrapper.state_dict().keys() == dino().student.state_dict().keys()
