"""Which parameters decay, how gradients are clipped, what a frozen last layer means, and what a step moves."""

import copy
from typing import Any, Literal

import pytest
import timm
import torch
from oracles import clip_one_by_one
from tiny import tiny_config
from torch import Tensor, nn

from dinoray.models.backbone import image_layers
from dinoray.models.config import OptimConfig
from dinoray.models.dino import DINO
from dinoray.models.errors import ConfigError
from dinoray.models.lars import LARS
from dinoray.models.optim import (
    build_optimizer,
    clip_per_parameter,
    drop_last_layer_grads,
    param_groups,
    restore_optimizer,
    set_hyperparameters,
    step_if,
)
from dinoray.models.schedules import scaled_lr


def tiny_student(**head: object) -> Any:
    config = tiny_config(head=head)
    torch.manual_seed(0)
    return DINO(config.backbone, config.head, crop_sizes=(16, 8)).student


def with_grads(student: Any, *, scale: float = 1.0) -> Any:
    """The student after a backward pass on noise."""
    logits = student([torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))]).logits
    (scale * logits[:, 0].sum()).backward()
    return student


def names_in_groups(student: nn.Module) -> list[set[str]]:
    names = {id(p): name for name, p in student.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in param_groups(student)]


def test_biases_and_vectors_are_not_decayed_and_all_else_is() -> None:
    student = tiny_student(use_bn=True)
    decayed, plain = names_in_groups(student)
    shapes = {name: p.ndim for name, p in student.named_parameters()}
    assert {"backbone.pos_embed", "backbone.cls_token", "head.last_layer.weight_v"} <= decayed
    assert {"backbone.norm.weight", "backbone.blocks.0.attn.qkv.bias", "head.mlp.1.weight"} <= plain
    assert all(shapes[name] > 1 and not name.endswith(".bias") for name in decayed)
    assert all(shapes[name] == 1 for name in plain)
    assert decayed | plain | {"head.last_layer.weight_g"} == set(shapes)


def test_a_frozen_magnitude_is_left_out_and_a_learnt_one_is_decayed() -> None:
    magnitude = "head.last_layer.weight_g"
    assert not any(magnitude in group for group in names_in_groups(tiny_student()))
    assert magnitude in names_in_groups(tiny_student(norm_last_layer=False))[0]


def test_a_bias_of_two_dimensions_is_not_decayed() -> None:
    module = nn.Module()
    module.layer = nn.Module()
    module.layer.bias = nn.Parameter(torch.zeros(2, 2))
    assert names_in_groups(module) == [set(), {"layer.bias"}]


@pytest.mark.parametrize("max_norm", [0.3, 3.0])
def test_each_gradient_is_clipped_by_its_own_norm(max_norm: float) -> None:
    student = with_grads(tiny_student(), scale=10)
    trained = [p for p in student.parameters() if p.grad is not None]
    before = [p.grad.clone() for p in trained]
    norms = [grad.norm() for grad in before]
    assert any(norm > max_norm for norm in norms)
    total = clip_per_parameter(student, max_norm)
    for p, expected in zip(trained, clip_one_by_one(before, max_norm), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-9)
    assert total.item() == pytest.approx(sum(float(norm) ** 2 for norm in norms) ** 0.5, rel=1e-5)


def test_clipping_is_not_that_of_the_global_norm() -> None:
    student: Any = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))])
    long, short = student
    twins = copy.deepcopy(student)
    for network in (student, twins):
        network[0].grad, network[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
    total = clip_per_parameter(student, 1.0)
    assert long.grad.tolist() == pytest.approx([0.6, 0.8])
    assert short.grad.tolist() == [0.5]
    assert total.item() == pytest.approx(25.25**0.5)
    torch.nn.utils.clip_grad_norm_(list(twins), 1.0)
    assert twins[1].grad.item() == pytest.approx(0.5 / 25.25**0.5, rel=1e-4)


def test_clipping_at_zero_leaves_gradients_alone() -> None:
    student = with_grads(tiny_student(), scale=100)
    before = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    total = clip_per_parameter(student, 0.0)
    after = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert total > 100


def test_a_frozen_last_layer_gets_no_update_no_decay_and_no_moments() -> None:
    student = tiny_student(norm_last_layer=False)
    optimizer = build_optimizer(OptimConfig(), student)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.5)
    layer = student.head.last_layer
    before = [p.detach().clone() for p in layer.parameters()]
    backbone_before = student.backbone.pos_embed.detach().clone()

    def step(*, frozen: bool) -> None:
        optimizer.zero_grad()
        with_grads(student)
        if frozen:
            drop_last_layer_grads(student.head)
        optimizer.step()

    step(frozen=True)
    step(frozen=True)
    assert all(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    assert not any(p in optimizer.state for p in layer.parameters())
    assert not torch.equal(student.backbone.pos_embed, backbone_before)
    step(frozen=False)
    assert not any(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    assert all(float(optimizer.state[p]["step"]) == 1 for p in layer.parameters())


@pytest.mark.parametrize(("global_batch_size", "lr"), [(256, 5e-4), (1024, 2e-3), (64, 1.25e-4)])
def test_learning_rate_follows_the_global_batch(global_batch_size: int, lr: float) -> None:
    assert scaled_lr(5e-4, global_batch_size) == pytest.approx(lr)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_an_optimizer_moves_all_that_has_a_gradient(name: Literal["adamw", "sgd", "lars"]) -> None:
    student = tiny_student()
    optimizer = build_optimizer(OptimConfig(name=name), student)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    with_grads(student)
    set_hyperparameters(optimizer, lr=0.5, weight_decay=0.04)
    optimizer.step()
    for n, p in student.named_parameters():
        moves = p.grad is not None and bool(p.grad.any())
        assert torch.equal(p, before[n]) is not moves, n
        assert p.isfinite().all()


def one_weight_and_bias() -> Any:
    layer: Any = nn.Linear(1, 1)
    layer.weight.data.fill_(2.0)
    layer.bias.data.fill_(2.0)
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 1), torch.zeros(1)
    return layer


def values(layer: nn.Module) -> list[float]:
    return [float(x) for x in layer.state_dict().values()]


def test_adamw_decays_by_lr_times_weight_decay_and_only_group_zero() -> None:
    layer = one_weight_and_bias()
    optimizer = build_optimizer(OptimConfig(), layer)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert values(layer) == pytest.approx([2 * (1 - 0.05), 2])


def test_sgd_keeps_the_configured_momentum() -> None:
    layer = one_weight_and_bias()
    optimizer = build_optimizer(OptimConfig(name="sgd", momentum=0.5), layer)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.0)
    for _ in range(2):
        layer.weight.grad = torch.ones(1, 1)
        optimizer.step()
    assert values(layer)[0] == pytest.approx(2 - 0.1 * 1 - 0.1 * 1.5)


def test_lars_scales_a_decayed_parameters_step_by_its_own_length() -> None:
    def moved(weight: float) -> Tensor:
        layer = one_weight_and_bias()
        layer.weight.data.fill_(weight)
        layer.weight.grad = torch.full((1, 1), 5.0)
        optimizer = build_optimizer(OptimConfig(name="lars"), layer)
        set_hyperparameters(optimizer, lr=1.0, weight_decay=1e-6)
        optimizer.step()
        return weight - layer.weight.detach()

    assert moved(4.0).item() == pytest.approx(2 * moved(2.0).item(), rel=1e-2)
    assert 0 < moved(2.0).item() < 0.1


def test_hyperparameters_reach_both_groups_and_decay_only_the_first() -> None:
    optimizer = build_optimizer(OptimConfig(), tiny_student())
    set_hyperparameters(optimizer, lr=0.25, weight_decay=0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.125, 0.0]


@pytest.mark.parametrize(
    "wrong", [{"name": "adam"}, {"base_lr": 0}, {"clip_grad": -1}, {"momentum": 1}, {"warmup_epochs": -1}]
)
def test_a_setting_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig.model_validate(wrong)


# Layer-wise decay of the learning rate


def scales(student: nn.Module, layer_decay: float) -> dict[str, float]:
    names = {id(p): name for name, p in student.named_parameters()}
    return {
        names[id(p)]: group["lr_scale"]
        for group in param_groups(student, layer_decay=layer_decay)
        for p in group["params"]
    }


def test_each_block_learns_slower_than_the_one_above_it() -> None:
    found = scales(tiny_student(norm_last_layer=False), 0.5)  # a stem and two blocks
    by_part = {
        "head.": 1.0,
        "backbone.norm.": 0.5,
        "backbone.blocks.1.": 0.5,
        "backbone.blocks.0.": 0.25,
        "backbone.patch_embed.": 0.125,
        "backbone.pos_embed": 0.125,
        "backbone.cls_token": 0.125,
    }
    for name, scale in found.items():
        assert [v for part, v in by_part.items() if name.startswith(part)] == [scale], name
    assert set(found) == {name for name, _ in tiny_student(norm_last_layer=False).named_parameters()}


def test_the_scale_multiplies_the_rate_and_leaves_the_decay() -> None:
    student = tiny_student()
    optimizer = build_optimizer(OptimConfig(layer_decay=0.5), student)
    set_hyperparameters(optimizer, lr=0.8, weight_decay=0.125)
    assert {g["lr"] for g in optimizer.param_groups} == {0.8, 0.4, 0.2, 0.1}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.125 if group["decays"] else 0)
        assert all((p.ndim > 1) == group["decays"] for p in group["params"])


def test_a_backbone_whose_blocks_timm_does_not_tell_apart_is_refused() -> None:
    module = nn.Module()
    module.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"optim.layer_decay .* set optim.layer_decay=1"):
        param_groups(module, layer_decay=0.5)


def test_patch_embedding_has_a_scale_of_its_own_beside_the_decay() -> None:
    groups = param_groups(tiny_student(), layer_decay=0.5, patch_embed_lr_scale=0.2)
    stem = {p.shape: group["lr_scale"] for group in groups for p in group["params"] if p.ndim == 4}
    assert stem == {(32, 3, 4, 4): 0.125 * 0.2}


@pytest.mark.parametrize(("name", "first"), [("test_convnext", "stem.0"), ("resnet10t", "conv1.0")])
def test_first_convolution_is_the_patch_embedding_of_other_networks(name: str, first: str) -> None:
    layers = image_layers(timm.create_model(name, num_classes=0))
    assert {layer.rpartition(".")[0] for layer in layers} == {first}


def test_a_backbone_whose_first_layer_timm_does_not_name_is_refused() -> None:
    module = nn.Module()
    module.backbone = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"patch_embed_lr_scale=0.2 .* set optim.patch_embed_lr_scale=1$"):
        param_groups(module, patch_embed_lr_scale=0.2)


def test_an_optimizer_of_other_groups_is_not_restored() -> None:
    student = tiny_student()
    saved = build_optimizer(OptimConfig(layer_decay=0.5), student).state_dict()
    with pytest.raises(ValueError, match=r"was optim.layer_decay or .* changed"):
        restore_optimizer(build_optimizer(OptimConfig(), student), saved)


def test_a_state_saved_by_an_adamw_that_is_not_fused_is_resumed() -> None:
    """Older checkpoints hold one. Rounding apart, the next steps are those that it would have made."""
    student, twin = tiny_student(), tiny_student()
    groups = [{k: v for k, v in g.items() if k == "params"} for g in param_groups(twin)]
    old = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0)
    new = build_optimizer(OptimConfig(), student)
    for step in range(4):
        if step == 2:
            student.load_state_dict(twin.state_dict())
            restore_optimizer(new, copy.deepcopy(old.state_dict()))
            set_hyperparameters(new, lr=0.01, weight_decay=0.0)
        for network, optimizer in ((twin, old), (student, new)):
            optimizer.zero_grad()
            with_grads(network)
            if step >= 2 or optimizer is old:
                optimizer.step()
    for (name, p), q in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")
    assert {float(state["step"]) for state in new.state.values()} == {4}


# LARS


def written_out_lars(
    params: list[Tensor], grads: list[list[Tensor]], *, lr: float, weight_decay: float, momentum: float
) -> list[Tensor]:
    """One parameter after the other, in float64."""
    params = [p.detach().double().clone() for p in params]
    moved = [torch.zeros_like(p) for p in params]
    for step in grads:
        for i, grad in enumerate(step):
            update = grad.double()
            if params[i].ndim != 1:
                update = update + weight_decay * params[i]
                ours, theirs = float(params[i].norm()), float(update.norm())
                if ours > 0 and theirs > 0:
                    update = update * 0.001 * ours / theirs
            moved[i] = momentum * moved[i] + update
            params[i] = params[i] - lr * moved[i]
    return params


def test_lars_equals_the_published_one_step_by_step() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), (2, 2, 3), (5, 1)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    with torch.no_grad():
        params[3].zero_()  # no norm: an update as it is
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    expected = written_out_lars(params, grads, lr=0.5, weight_decay=0.1, momentum=0.9)
    optimizer = LARS(params, lr=0.5, momentum=0.9)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, step, strict=True))
    for p, twin in zip(params, expected, strict=True):
        torch.testing.assert_close(p.double(), twin, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_is_taken_whole_or_not_at_all(name: str) -> None:
    """Beside the optimiser's own step, on a network that has the same gradients; NaN in those not taken."""
    networks = [_seeded_network() for _ in range(2)]
    ours, theirs = (build_optimizer(OptimConfig(name=name), network) for network in networks)  # type: ignore[arg-type]
    for number, is_finite in enumerate([False, True, True, False, True]):
        before = copy.deepcopy(networks[0].state_dict())
        for optimizer, network in zip((ours, theirs), networks, strict=True):
            set_hyperparameters(optimizer, lr=0.1, weight_decay=0.04)
            for place, p in enumerate(network.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + place))
                if optimizer is ours and not is_finite:
                    p.grad[0] = float("nan")
        step_if(ours, torch.tensor(is_finite))
        if is_finite:
            theirs.step()
        for (key, a), b in zip(
            networks[0].state_dict().items(), networks[1].state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), key
            assert torch.equal(a, before[key]) is not is_finite, key
    moments = [optimizer.state_dict()["state"] for optimizer in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(x, moments[1][i][k]) for i, one in moments[0].items() for k, x in one.items())


def _seeded_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
