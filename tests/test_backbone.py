"""Any timm model at any crop size, or one line that says why not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.backbone import BackboneConfig, build_backbone, embed_dim, has_batch_norm
from models.settings import ConfigError

TINY_VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def build(
    name: str, *crop_sizes: int, kwargs: dict[str, Any] | None = None, drop_path_rate: float = 0.0
) -> Any:
    config = BackboneConfig(name=name, kwargs=kwargs or {})
    return build_backbone(config, crop_sizes=crop_sizes, drop_path_rate=drop_path_rate)


@pytest.mark.parametrize(
    ("name", "kwargs", "width", "batch_norm"),
    [
        ("vit_tiny_patch16_224", {"depth": 1}, 192, False),
        ("resnet10t", {}, 512, True),
        ("convnext_atto", {}, 320, False),
    ],
)
def test_a_model_gives_features_of_one_width_at_every_crop_size(
    name: str, kwargs: dict[str, Any], width: int, batch_norm: bool
) -> None:
    model = build(name, 64, 32, kwargs=kwargs, drop_path_rate=0.1)
    assert embed_dim(model) == width
    assert has_batch_norm(model) is batch_norm
    for size in (64, 32):
        assert model(torch.randn(2, 3, size, size)).shape == (2, width)


def test_a_model_with_a_layer_after_its_pooling_reports_that_layers_width() -> None:
    model = build("mobilenetv3_small_050", 64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, embed_dim(model))
    assert embed_dim(model) != model.num_features


def test_position_embeddings_are_resampled_for_smaller_crops() -> None:
    model, native = (
        build("vit_tiny_patch16_224", 16, 8, kwargs=TINY_VIT),
        build("vit_tiny_patch16_224", 8, kwargs=TINY_VIT),
    )
    state = model.state_dict()
    cls, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    assert grid.shape == (1, 16, 24)
    small = F.interpolate(
        grid.reshape(1, 4, 4, 24).permute(0, 3, 1, 2), size=(2, 2), mode="bicubic", antialias=True
    )
    state["pos_embed"] = torch.cat([cls, small.permute(0, 2, 3, 1).reshape(1, 4, 24)], dim=1)
    native.load_state_dict(state)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), native.eval()(x))


def test_position_embeddings_tell_places_apart_at_both_sizes() -> None:
    model = build("vit_tiny_patch16_224", 16, 8, kwargs=TINY_VIT).eval()
    for size in (16, 8):
        x = torch.randn(1, 3, size, size)
        moved = x.roll(4, dims=3)  # by a whole patch: the same patches elsewhere
        assert not torch.allclose(model(x), model(moved), atol=1e-6)


def test_kwargs_reach_the_model() -> None:
    assert build("vit_tiny_patch16_224", 16, kwargs=TINY_VIT).patch_embed.patch_size == (4, 4)


def test_a_crop_size_is_tried_without_touching_batch_statistics() -> None:
    model = build("resnet10t", 64, 32)
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(not m.running_mean.any() and int(m.num_batches_tracked) == 0 for m in norms)
    assert model.training


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        build("vit_smal_patch16_224", 32)
    message = str(caught.value)
    assert message.startswith("backbone.name='vit_smal_patch16_224' is not a timm model; did you mean ")
    assert "vit_small_patch16_224" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["", "no such thing at all"])
def test_a_name_that_is_like_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a timm model$"):
        build(name, 32)


@pytest.mark.parametrize(
    ("kwargs", "cause"),
    [
        ({"bogus": 1}, "unexpected keyword argument 'bogus'"),
        ({"patch_size": "8"}, "patch_size"),
        ({"embed_dim": 10, "num_heads": 3}, "divisible by num_heads"),
        ({"depth": -1}, "must be non-negative"),
        ({"global_pool": "nope"}, "pooling"),
    ],
)
def test_kwargs_that_the_model_refuses_give_one_line(kwargs: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build("vit_tiny_patch16_224", 32, kwargs=kwargs)
    message = str(caught.value)
    assert "vit_tiny_patch16_224" in message
    assert cause in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "kwargs", [{"patch_size": 0}, {"num_heads": 0}, {"act_layer": "nope"}, {"patch_size": [8]}]
)
def test_kwargs_that_make_the_model_fail_in_any_other_way_give_one_line(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224") as caught:
        build("vit_tiny_patch16_224", 32, kwargs=kwargs)
    assert "\n" not in str(caught.value)


def test_a_model_without_stochastic_depth_says_which_setting_to_change() -> None:
    build("efficientvit_b0", 32)
    with pytest.raises(ConfigError, match=r"backbone\.drop_path_rate=0\.1"):
        build("efficientvit_b0", 32, drop_path_rate=0.1)


@pytest.mark.parametrize("kwargs", [{"drop_path_rate": 0.5}, {"num_classes": 10}])
def test_kwargs_that_the_config_decides_elsewhere_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"backbone\.kwargs.*{next(iter(kwargs))}"):
        build("vit_tiny_patch16_224", 32, kwargs=kwargs)


@pytest.mark.parametrize("sizes", [(33, 16), (32, 18)])
def test_a_crop_size_that_the_patches_do_not_divide_is_refused_by_its_size(sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        build("vit_tiny_patch16_224", *sizes, kwargs=TINY_VIT)
    message = str(caught.value)
    wrong = next(size for size in sizes if size % 4)
    assert f"backbone.name=vit_tiny_patch16_224 cannot take crops of {wrong} px: " in message
    assert "choose a crop size" in message
    assert "\n" not in message


def test_a_model_of_fixed_size_is_refused_for_other_crops() -> None:
    with pytest.raises(ConfigError, match=r"mixer_s32_224 cannot take crops of 32 px"):
        build("mixer_s32_224", 64, 32)


def test_a_model_that_gives_feature_maps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"returns features of shape \(1, .*\), not \[B, D\]"):
        build("vit_tiny_patch16_224", 16, kwargs=TINY_VIT | {"global_pool": ""})
