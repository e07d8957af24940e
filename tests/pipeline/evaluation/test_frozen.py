"""What a frozen backbone tells beside its output: the output stays what it is, the rest is what the blocks hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import labelled_source, seeded_backbone
from tiny import TINY_RESNET, tiny_config
from torch import nn

from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.evaluation.backbone_outputs import (
    check_size,
    embed_views,
    has_tokens,
    view_crops,
    with_blocks,
    with_patches,
)
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.training.checkpoint import FrozenBackbone

CROPS = tiny_config().crops


def vit() -> nn.Module:
    """Three blocks of width 16 on patches of 8 px."""
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", kwargs=kwargs)
    return build_backbone(config, crop_sizes=(32,), drop_path_rate=0.0).eval()


def resnet() -> nn.Module:
    return build_backbone(BackboneConfig(**TINY_RESNET), crop_sizes=(32,), drop_path_rate=0.0).eval()


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tokens_after_blocks(backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """All tokens [B, 1 + N, D] that each block hands on, normed, seen by hooks during a plain forward."""
    seen: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda *call: seen.append(call[2])) for b in backbone.blocks]  # type: ignore[union-attr]
    backbone(x)
    for hook in hooks:
        hook.remove()
    return [backbone.norm(tokens) for tokens in seen]  # type: ignore[operator]


@torch.no_grad()
def test_the_class_tokens_of_the_last_blocks_follow_the_output() -> None:
    backbone, x = vit(), images()
    blocks = tokens_after_blocks(backbone, x)
    rows = with_blocks(backbone, x, num_blocks=2, mean_patches=True)
    expected = [backbone(x), blocks[1][:, 0], blocks[2][:, 0], blocks[2][:, 1:].mean(1)]
    assert torch.equal(rows, torch.cat(expected, dim=1))


@torch.no_grad()
def test_no_more_blocks_than_there_are() -> None:
    backbone, x = vit(), images()
    assert with_blocks(backbone, x, num_blocks=4, mean_patches=False).shape == (3, 16 + 3 * 16)


@torch.no_grad()
def test_a_network_without_tokens_gives_its_output_again() -> None:
    backbone, x = resnet(), images()
    assert not has_tokens(backbone)
    rows = with_blocks(backbone, x, num_blocks=4, mean_patches=True)
    assert torch.equal(rows, torch.cat([backbone(x)] * 2, dim=1))


@torch.no_grad()
def test_patch_tokens_follow_the_output_row_by_row() -> None:
    backbone, x = vit(), images()
    rows = with_patches(backbone, x)
    last = tokens_after_blocks(backbone, x)[-1]
    assert torch.equal(rows, torch.cat([backbone(x), last[:, 1:].reshape(3, 16 * 16)], dim=1))


def test_views_are_the_global_crops_of_training() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    views = view_crops(image, "some/key.jpg", crops=CROPS, num_views=4, seed=3)
    for v, view in enumerate(views):
        crops = multi_crop(image, crop_rng(3, v, "some/key.jpg"), CROPS).global_crops
        np.testing.assert_array_equal(view, crops[v % 2])
    assert len({view.tobytes() for view in views}) == 4


def test_views_of_each_image_stay_together_and_unreadable_images_are_left_out(tmp_path: Path) -> None:
    source = labelled_source(tmp_path / "images")
    (tmp_path / "images" / "dots" / "1.jpg").write_bytes(b"no picture")
    crops = CROPS.model_copy(update={"global_crop_size": 32})
    found = embed_views(
        seeded_backbone(),
        source,
        range(5),
        crops,
        num_views=3,
        seed=0,
        batch_size=7,
        precision="fp32",
    )
    assert (found.shape, found.dtype) == ((4, 3, 16), np.float32)
    readable = [f for f in source.fetch(range(5)) if f.key != "dots/1.jpg"]
    for fetched, rows in zip(readable, found, strict=True):
        assert fetched.data is not None
        image = decode(fetched.data, max_pixels=10**6)
        views = view_crops(image, fetched.key, crops=crops, num_views=3, seed=0)
        alone = embed(seeded_backbone(), views, crops, precision="fp32")
        np.testing.assert_allclose(rows, alone, rtol=1e-4, atol=1e-5)


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    config = tiny_config()
    weights = build_backbone(config.backbone, crop_sizes=config.crops.crop_sizes, drop_path_rate=0.0)
    network = FrozenBackbone(config, weights.state_dict())
    check_size(network, 24)
    with pytest.raises(ConfigError, match=r"cannot take images of 23 px .*global crops, 16"):
        check_size(network, 23)
