"""Outputs of a frozen backbone: last blocks, patch tokens, and features of augmented views.

This is work for the embed actors of evaluation/actors.py and the jobs that use them. Every forward function
keeps the output itself in the first D columns, bit-identical to `backbone(x)`. No Ray here. Axes: B images, N
patches, D embed.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, one_line
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import crop_rng, multi_crop
from dinoray.pipeline.data.reading.loader import load_batches
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.features import embed
from dinoray.pipeline.training.checkpoint import FrozenBackbone


def check_size(network: FrozenBackbone, image_size: int) -> None:
    """Try one square image of `image_size` pixels; raise ConfigError if the network rejects the size."""
    try:
        with torch.no_grad():
            network.backbone()(torch.zeros(1, network.config.crops.channels, image_size, image_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"backbone.name={network.config.backbone.name} cannot take images of {image_size} px ({reason}); "
            f"take the size of its global crops, {network.config.crops.global_crop_size}"
        ) from error


def has_tokens(backbone: nn.Module) -> bool:
    """Return true for a vision transformer: a class token, and patch tokens readable from every block."""
    inner = getattr(backbone, "forward_intermediates", None)
    return (
        inner is not None
        and "return_prefix_tokens" in inspect.signature(inner).parameters
        and getattr(backbone, "cls_token", None) is not None
        and hasattr(backbone, "blocks")
    )


def with_blocks(backbone: Any, x: Tensor, *, num_blocks: int, mean_patches: bool) -> Tensor:
    """Map [B, 3, H, W] to [B, D + E]: the output, then the class tokens of the last blocks, oldest first.

    Each block's tokens pass through the network's last norm. `mean_patches` adds the mean patch token of the
    last block. For a network without tokens (see `has_tokens`), the output is repeated: E = D.
    """
    if not has_tokens(backbone):
        output = backbone(x)
        return torch.cat([output, output], dim=1)
    tokens, blocks = backbone.forward_intermediates(
        x,
        indices=min(num_blocks, len(backbone.blocks)),
        norm=True,
        output_fmt="NLC",
        return_prefix_tokens=True,
    )
    parts = [prefix[:, 0] for _, prefix in blocks]
    if mean_patches:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat([backbone.forward_head(tokens), *parts], dim=1)


def with_patches(backbone: Any, x: Tensor) -> Tensor:
    """Map [B, 3, H, W] to [B, D + N * D]: the output, then all patch tokens, row by row of the picture.

    Only for a network for which `has_tokens` is true.
    """
    tokens = backbone.forward_features(x)
    return torch.cat(
        [backbone.forward_head(tokens), tokens[:, backbone.num_prefix_tokens :].flatten(1)], dim=1
    )


def view_crops(
    image: NDArray[np.uint8], key: str, *, crops: CropsConfig, num_views: int, seed: int
) -> NDArray[np.uint8]:
    """Return augmented views of an image, uint8 [num_views, S, S, 3].

    View v is a global crop of epoch v in training. The kinds of global crop alternate, because they are
    augmented differently.
    """
    alone = crops.model_copy(update={"num_local_crops": 0})  # global crops are drawn first: unchanged
    return np.stack(
        [
            multi_crop(image, crop_rng(seed, view, key), alone).global_crops[view % crops.num_global_crops]
            for view in range(num_views)
        ]
    )


def embed_views(
    backbone: nn.Module,
    source: Source,
    indices: Sequence[int],
    crops: CropsConfig,
    *,
    num_views: int,
    seed: int,
    batch_size: int,
    precision: str,
) -> NDArray[np.float32]:
    """Return features of the views of the readable images at `indices`: float32 [n, num_views, D]."""
    prepare = partial(view_crops, crops=crops, num_views=num_views, seed=seed)
    rows: list[NDArray[np.float32]] = []
    for batch in load_batches(source, indices, prepare, batch_size=max(1, batch_size // num_views)):
        views = [image.pixels for image in batch if image.pixels is not None]
        if views:
            features = embed(backbone, np.concatenate(views), crops, precision=precision)
            rows.append(features.reshape(len(views), num_views, -1))
    return np.concatenate(rows) if rows else np.empty((0, num_views, 0), np.float32)
