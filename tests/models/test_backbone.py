"""Any timm model at any crop size, or one line that says why not."""

import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from dinoray.models.backbone import build_backbone, embed_dim, has_batch_norm
from dinoray.models.backbone_names import name_hint
from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError

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
    with pytest.raises(ConfigError, match=r"is not a timm model; set backbone\.name=vit_small_patch16_224"):
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
    with pytest.raises(ConfigError, match=r"has no stochastic depth; set backbone\.drop_path_rate=0$"):
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
    assert f"backbone.name=vit_tiny_patch16_224 cannot take crops of {wrong} px" in message
    assert "should be divisible by patch size (4)" in message
    setting = "crops.global_crop_size=32" if wrong == 33 else "crops.local_crop_size=16"
    assert message.endswith(f"; set {setting}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "kwargs", "sizes", "remedy"),
    [
        ("mixer_s32_224", {}, (64, 32), "set crops.local_crop_size=64, or choose a backbone that takes two"),
        ("levit_128s", {}, (64, 32), "set crops.local_crop_size=56"),
        ("cait_xxs24_224", {"depth": 1}, (64, 32), "set crops.local_crop_size=64, or choose"),
        (
            "beit_base_patch16_224",
            {"depth": 1, "embed_dim": 24, "num_heads": 2},
            (64, 32),
            "local_crop_size=64",
        ),
        ("convit_tiny", {}, (64, 32), "set crops.local_crop_size=64, or choose"),
        (
            "eva02_tiny_patch14_224",
            {"depth": 1},
            (64, 32),
            "set crops.global_crop_size=70 crops.local_crop_size=28",
        ),
        ("efficientformer_l1", {}, (64, 32), "set crops.global_crop_size=224 crops.local_crop_size=224, or"),
        ("test_maxvit", {}, (64, 32), "set crops.local_crop_size=64, or choose"),
        ("vit_tiny_patch16_224", TINY_VIT, (32, 16, 30), "set eval.image_size=28"),
        (
            "vit_tiny_patch16_224",
            TINY_VIT | {"dynamic_img_size": False},
            (32, 16),
            "set crops.local_crop_size=32, or",
        ),
    ],
)
def test_the_remedy_for_a_size_ends_the_error(
    name: str, kwargs: dict[str, Any], sizes: tuple[int, ...], remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(name, *sizes, kwargs=kwargs)
    message = str(caught.value)
    assert message.startswith(f"backbone.name={name} cannot take crops of ")
    assert f"; {remedy}" in message or remedy in message.rpartition("; ")[2]
    wanted = dict(
        zip(("crops.global_crop_size", "crops.local_crop_size", "eval.image_size"), sizes, strict=False)
    )
    wanted |= {key: int(size) for key, size in re.findall(r"([\w.]+_size)=(\d+)", message)}
    assert build(name, *wanted.values(), kwargs=kwargs) is not None


@pytest.mark.parametrize(
    ("kwargs", "left_out"),
    [
        ({"bogus": 1}, "bogus"),
        ({"patch_size": "8"}, "patch_size"),
        ({"depth": 2, "num_heads": 7}, "num_heads"),
        ({"global_pool": ""}, "global_pool"),
        ({"bogus": 1, "worse": 2}, "bogus, worse"),
    ],
)
def test_an_argument_that_does_not_fit_is_named_and_leaving_it_out_helps(
    kwargs: dict[str, Any], left_out: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build("vit_tiny_patch16_224", 32, kwargs=kwargs)
    assert f"; leave out {left_out}" in str(caught.value)
    rest = {key: value for key, value in kwargs.items() if key not in left_out.split(", ")}
    assert build("vit_tiny_patch16_224", 32, kwargs=rest) is not None


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vitb14_reg", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("dinov2_vitg14_lc", "vit_giant_patch14_dinov2.lvd142m"),
        ("dino_vits16", "vit_small_patch16_224.dino"),
        ("dino_vitb8", "vit_base_patch8_224.dino"),
        ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3.lvd1689m"),
        ("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3.lvd1689m"),
        ("dinov3_vit7b16", "vit_7b_patch16_dinov3.lvd1689m"),
        ("dinov3_convnext_tiny", "convnext_tiny.dinov3_lvd1689m"),
        ("facebook/dinov2-with-registers-small", "vit_small_patch14_reg4_dinov2.lvd142m"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "vit_small_patch16_dinov3.lvd1689m"),
    ],
)
def test_a_published_network_is_named_as_timm_names_it(name: str, model: str) -> None:
    assert f"set backbone.name={model} backbone.pretrained=true" in name_hint(name)
    assert timm.is_model(model.split(".")[0])
    assert model in timm.list_pretrained(f"{model.split('.')[0]}.*")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("dino_resnet50", "resnet50"),
        ("dino_xcit_small_12_p16", "xcit_small_12_p16_224"),
        ("vit_small", "vit_small_patch16_224"),
        ("deit_tiny", "vit_tiny_patch16_224"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("timm/vit_small_patch16_224.dino", "vit_small_patch16_224.dino"),
        ("hf-hub:timm/resnet50.a1_in1k", "resnet50.a1_in1k"),
    ],
)
def test_a_network_that_others_name_differently_is_found(name: str, model: str) -> None:
    hint = name_hint(name)
    assert re.search(rf"set backbone\.name={re.escape(model)}(,|$)", hint)
    assert ("--init-from" in hint) is name.startswith("dino_")
    assert timm.is_model(model.split(".")[0])


def test_a_model_that_gives_feature_maps_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"returns features of shape \(1, .*\), not \[B, D\]; leave out global_pool"
    ):
        build("vit_tiny_patch16_224", 16, kwargs=TINY_VIT | {"global_pool": ""})


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.nope", "resnet10t.dino"])
def test_weights_that_timm_does_not_publish_are_refused_with_those_that_it_does(
    name: str, pretrained: bool
) -> None:
    arch = name.partition(".")[0]
    with pytest.raises(ConfigError) as caught:
        build_backbone(
            BackboneConfig(name=name), crop_sizes=(64, 32), drop_path_rate=0.0, pretrained=pretrained
        )
    beginning = f"backbone.name={name}: timm publishes no such weights; those it does are named {arch}."
    assert str(caught.value).startswith(beginning)
    assert str(caught.value).endswith(f"; set backbone.name={arch}")
    assert build(arch, 64, 32) is not None


def test_a_network_without_published_weights_starts_from_noise() -> None:
    config = BackboneConfig(name="convnext_atto_rms")
    with pytest.raises(ConfigError, match=r"publishes no such weights; set backbone\.pretrained=false$"):
        build_backbone(config, crop_sizes=(64, 32), drop_path_rate=0.0, pretrained=True)
