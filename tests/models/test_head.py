"""The head: cosines with prototypes, in float32, under the published checkpoints' names."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import prototype_logits
from torch import Tensor, nn

from dinoray.models.config import HeadConfig
from dinoray.models.head import DINOHead

SMALL = {"out_dim": 12, "hidden_dim": 10, "bottleneck_dim": 6}


def small_head(**changes: object) -> Any:
    torch.manual_seed(0)
    return DINOHead(HeadConfig.model_validate(SMALL | changes), in_dim=8)


def prototypes(head: Any) -> Tensor:
    """The prototype layer's matrix [K, bottleneck], read off from its answers to unit vectors."""
    return head.last_layer(torch.eye(6)).T.detach()


def test_logits_are_cosines_with_the_prototypes() -> None:
    head, x = small_head(), torch.randn(5, 8)
    oracle = prototype_logits(head.mlp(x), head.last_layer.weight_v, head.last_layer.weight_g)
    torch.testing.assert_close(head(x).detach().double(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_logits_without_a_gradient_are_the_same(norm_last_layer: bool) -> None:
    """The teacher's way through the layer differs from the student's."""
    head, x = small_head(norm_last_layer=norm_last_layer), torch.randn(5, 8)
    head.last_layer.weight_g.data.uniform_(0.5, 2)
    with torch.no_grad():
        logits = head(x)
    oracle = prototype_logits(head.mlp(x), head.last_layer.weight_v, head.last_layer.weight_g)
    torch.testing.assert_close(logits.double(), oracle, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, head(x).detach())


def test_prototypes_stay_on_the_unit_sphere_while_they_learn() -> None:
    head = small_head()
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=1.0)
    before = prototypes(head)
    for _ in range(3):
        head(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(prototypes(head), before)
    torch.testing.assert_close(prototypes(head).norm(dim=1), torch.ones(12))
    assert head(1000 * torch.randn(50, 8)).abs().max() <= 1 + 1e-6


def test_prototypes_of_a_learnt_magnitude_have_that_length() -> None:
    head = small_head(norm_last_layer=False)
    assert head.last_layer.weight_g.requires_grad
    head.last_layer.weight_g.data.fill_(2.5)
    torch.testing.assert_close(prototypes(head).norm(dim=1), torch.full((12,), 2.5))


def test_magnitude_is_frozen_by_default() -> None:
    assert not small_head().last_layer.weight_g.requires_grad
    assert small_head().last_layer.weight_v.requires_grad


def test_the_bottlenecks_length_does_not_matter() -> None:
    head, x = small_head(), torch.randn(3, 8)
    before = head(x)
    head.mlp[-1].weight.data.mul_(7)
    torch.testing.assert_close(head(x), before)


def test_logits_are_float32_and_exact_under_bf16_autocast() -> None:
    head, x = small_head(), torch.randn(20, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, bottleneck = head(x), head.mlp(x)
    assert bottleneck.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    oracle = prototype_logits(bottleneck, head.last_layer.weight_v, head.last_layer.weight_g)
    torch.testing.assert_close(logits.detach().double(), oracle, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_layers": 1}, ["mlp"]),
        ({"num_layers": 2}, ["mlp.0", "mlp.2"]),
        ({"num_layers": 3}, ["mlp.0", "mlp.2", "mlp.4"]),
        ({"num_layers": 3, "use_bn": True}, ["mlp.0", "mlp.1", "mlp.3", "mlp.4", "mlp.6"]),
    ],
)
def test_parameters_carry_the_published_names(settings: dict[str, object], names: list[str]) -> None:
    expected = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    expected |= {"last_layer.weight_g", "last_layer.weight_v"}
    assert {name for name, _ in small_head(**settings).named_parameters()} == expected


def test_batch_norm_stands_between_the_layers_only_when_asked_for() -> None:
    kinds = [type(layer) for layer in small_head(use_bn=True).mlp]
    linear, norm = nn.Linear, nn.BatchNorm1d
    assert kinds == [linear, norm, nn.GELU, linear, norm, nn.GELU, linear]
    assert [type(layer) for layer in small_head().mlp] == [linear, nn.GELU, linear, nn.GELU, linear]


def test_with_batch_norm_logits_depend_on_the_batch() -> None:
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    plain, normed = small_head(), small_head(use_bn=True)
    torch.testing.assert_close(plain(torch.cat([x, y]))[:4], plain(x))
    assert not torch.allclose(normed(torch.cat([x, y]))[:4], normed(x), atol=1e-2)


def test_linear_layers_start_small_and_without_bias() -> None:
    torch.manual_seed(0)
    head: Any = DINOHead(HeadConfig(out_dim=16, hidden_dim=256, bottleneck_dim=64), in_dim=128)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()
    assert (head.last_layer.weight_g == 1).all()


def test_a_head_can_be_copied_after_a_forward() -> None:
    head, x = small_head(), torch.randn(3, 8)
    head(x).sum().backward()
    twin = copy.deepcopy(head)
    assert torch.equal(twin(x), head(x))
    twin.last_layer.weight_v.data.normal_()
    assert not torch.equal(twin(x), head(x))


def test_gradients_reach_every_layer() -> None:
    head = small_head(norm_last_layer=False)
    F.cross_entropy(head(torch.randn(4, 8)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())
