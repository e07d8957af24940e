"""The class token's attention: recomputed by hand in float64 from the weights, and the backbone left as it was."""

from typing import Any

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from dinoray.models.attention import cls_attention, pad_to_patch, patch_size
from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError

SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL),
    "positions without class": ("vit_tiny_patch16_224", {**SMALL, "no_embed_class": True, "reg_tokens": 2}),
    "qk norm": ("vit_tiny_patch16_224", {**SMALL, "qk_norm": True}),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
}
EVAS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov3": ("vit_small_patch16_dinov3", SMALL),
    "eva02": ("eva02_tiny_patch14_224", SMALL),
    "rope attention": ("vit_small_patch16_rope_224", SMALL),
}


def build(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A network whose attention is far from uniform: fresh weights alone would let a wrong row pass."""
    torch.manual_seed(0)
    model = build_backbone(
        BackboneConfig(name=name, kwargs=kwargs, drop_path_rate=0), crop_sizes=(16,), drop_path_rate=0.0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.ndim > 1 else 0.2))
    return model.eval()


def images(height: int = 16, width: int = 16, number: int = 2) -> Tensor:
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1))


def spread(maps: Tensor) -> float:
    """Largest over mean of the maps: 1 when they are uniform and say nothing."""
    return float((maps.amax((2, 3)) / maps.mean((2, 3))).max())


def all_probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """The last block's attention [B, heads, N, N] by the formula, float64, from what enters the layer."""
    entered: list[tuple[Tensor, Tensor | None]] = []
    layer = model.blocks[-1].attn
    hook = layer.register_forward_pre_hook(
        lambda _, inputs, named: entered.append((inputs[0], named.get("rope"))), with_kwargs=True
    )
    with torch.no_grad():
        model(x)
    hook.remove()
    tokens, rope = entered[0]
    tokens = tokens.double()
    if layer.qkv is not None:
        bias = layer.qkv.bias
        if getattr(layer, "q_bias", None) is not None:
            bias = torch.cat([layer.q_bias, torch.zeros_like(layer.q_bias), layer.v_bias])
        qkv = tokens @ layer.qkv.weight.double().T + (0 if bias is None else bias.double())
        q, k, _ = qkv.chunk(3, dim=-1)
    else:
        q, k = (
            tokens @ part.weight.double().T + (0 if part.bias is None else part.bias.double())
            for part in (layer.q_proj, layer.k_proj)
        )
    heads = layer.num_heads
    q, k = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k))
    q, k = (norm.double()(y) for norm, y in ((layer.q_norm, q), (layer.k_norm, k)))
    for norm in (layer.q_norm, layer.k_norm):
        norm.float()
    if rope is not None:
        prefix, half = model.num_prefix_tokens, getattr(layer, "rotate_half", False)
        q, k = (
            torch.cat([y[:, :, :prefix], apply_rot_embed_cat(y[:, :, prefix:], rope.double(), half)], 2)
            for y in (q, k)
        )
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.exp(scores - scores.logsumexp(-1, keepdim=True))


@pytest.mark.parametrize("name", [*VITS, *EVAS])
@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=["square", "wide"])
def test_maps_are_the_softmax_row_of_the_class_token(name: str, size: tuple[int, int]) -> None:
    model, x = build(*{**VITS, **EVAS}[name]), images(*size)
    every = all_probabilities(model, x)
    prefix, grid = model.num_prefix_tokens, (size[0] // 4, size[1] // 4)
    maps = cls_attention(model, x)
    assert maps.shape == (2, 3, *grid)
    assert maps.dtype == torch.float32
    # Token prefix + row * width + column is the patch at (row, column).
    expected = every[:, :, 0, prefix:].unflatten(-1, grid)
    torch.testing.assert_close(maps.double(), expected, rtol=2e-4, atol=1e-6)
    assert spread(maps) > 1.5


@pytest.mark.parametrize(
    ("name", "prefix"), [("plain", 1), ("registers", 5), ("distilled", 2), ("dinov3", 5)]
)
def test_what_is_left_out_is_the_class_token_and_the_registers(name: str, prefix: int) -> None:
    model = build(*{**VITS, **EVAS}[name])
    assert model.num_prefix_tokens == prefix
    every = all_probabilities(model, images())[:, :, 0]
    torch.testing.assert_close(every.sum(-1), torch.ones(2, 3).double())
    left_out = every[..., :prefix].sum(-1)
    assert left_out.min() > 0
    total = cls_attention(model, images()).sum((2, 3))
    torch.testing.assert_close(total.double(), 1 - left_out, rtol=1e-4, atol=1e-6)


def test_a_patch_that_is_looked_at_stands_where_it_is_in_the_image() -> None:
    model = build(*VITS["plain"])
    with torch.no_grad():
        model.pos_embed.zero_()  # now equal patches are equal tokens
    x = torch.zeros(1, 3, 16, 24)
    x[:, :, 4:8, 12:16] = 3.0  # row 1, column 3 of 4 x 6
    maps = cls_attention(model, x)[0, 0]
    other = float(maps[0, 0])
    assert [[abs(float(v) - other) > 1e-3 for v in row] for row in maps] == [
        [(row, column) == (1, 3) for column in range(6)] for row in range(4)
    ]


# Nothing changes


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [part.training for part in model.modules()],
        "fused": [getattr(part, "fused_attn", None) for part in model.modules()],
        "hooks": [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()],
        "weights": [float(value.double().sum()) for value in model.state_dict().values()],
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("name", ["registers", "dinov3"])
def test_the_backbone_is_as_it_was(name: str) -> None:
    model = build(*{**VITS, **EVAS}[name]).train()
    model.blocks[0].eval()  # parts may differ in mode
    before = state_of(model)
    assert not cls_attention(model, images()).requires_grad
    assert state_of(model) == before


def test_the_backbone_is_as_it_was_when_the_call_fails() -> None:
    model = build(*VITS["plain"]).train()
    before = state_of(model)
    with pytest.raises(RuntimeError):
        cls_attention(model, torch.zeros(1, 5, 16, 16))  # five channels
    assert state_of(model) == before


def test_maps_are_those_of_eval_mode() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, attn_drop_rate=0.5, drop_path_rate=0.5, **SMALL
    )
    expected = cls_attention(model.eval(), images())
    assert torch.equal(cls_attention(model.train(), images()), expected)


def test_features_are_the_same_with_and_without_a_look() -> None:
    model = build(*EVAS["dinov3"])
    with torch.no_grad():
        before = model(images())
        cls_attention(model, images())
        assert torch.equal(model(images()), before)


# What has no such maps


@pytest.mark.parametrize(
    "name",
    ["resnet10t", "vit_base_patch16_siglip_224", "cait_xxs24_224", "convnext_atto", "swin_s3_tiny_224"],
)
def test_a_network_without_a_class_token_that_attends_says_what_is_supported(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    for refused in (lambda: patch_size(model), lambda: cls_attention(model, torch.zeros(1, 3, 224, 224))):
        with pytest.raises(
            ConfigError, match=r"^a backbone of type \w+ has no .*e\.g\. vit_small_patch16"
        ) as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_network_of_one_image_size_says_so() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **SMALL)
    assert cls_attention(model, images()).shape == (2, 3, 4, 4)
    with pytest.raises(ConfigError, match="cannot take images of 20x16 px"):
        cls_attention(model, images(16, 20))


def test_an_image_that_is_not_whole_patches_is_an_error() -> None:
    with pytest.raises(ValueError, match="images of 18x16 px: sides must be multiples of the patch, 4 px"):
        cls_attention(build(*VITS["plain"]), images(16, 18))


def test_patch_size_is_read_from_the_network() -> None:
    assert patch_size(build(*VITS["registers"])) == 4
    with torch.device("meta"):
        assert patch_size(timm.create_model("vit_small_patch14_reg4_dinov2")) == 14


# Padding


@given(height=st.integers(1, 20), width=st.integers(1, 20), patch=st.integers(1, 9))
def test_padding_adds_less_than_a_patch_and_repeats_the_border(height: int, width: int, patch: int) -> None:
    x = images(height, width, 1)
    padded, size = pad_to_patch(x, patch)
    assert size == (height, width)
    assert padded.shape[2] % patch == padded.shape[3] % patch == 0
    assert 0 <= padded.shape[2] - height < patch
    assert 0 <= padded.shape[3] - width < patch
    rows, columns = (torch.arange(n).clamp(max=m - 1) for n, m in zip(padded.shape[2:], size, strict=True))
    assert torch.equal(padded, x[:, :, rows][:, :, :, columns])
