"""Any timm model as a feature extractor at any crop size.

First stop of a crop inside the network: pixels [B, 3, H, W] -> features [B, D]. Knows timm; nothing of heads,
losses or data.
"""

import contextlib
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbone_names import name_hint
from models.backbone_remedies import explain_failure, explain_refusal, refusal
from models.config import BackboneConfig
from models.errors import ConfigError


def build_backbone(
    config: BackboneConfig, *, crop_sizes: tuple[int, ...], drop_path_rate: float, pretrained: bool = False
) -> nn.Module:
    """Create the timm model without a classifier, able to take square crops of every size in `crop_sizes`.

    `crop_sizes`: `crops.global_crop_size`, `crops.local_crop_size` and `eval.image_size`, as many as there are. The
    first sets the native grid of learned position embeddings; other sizes are reached by interpolation
    (`dynamic_img_size`) where the model has such embeddings. The result maps float [B, 3, H, W] to [B, D],
    D = `embed_dim(model)`. With `pretrained`, timm downloads its weights.

    Raises ConfigError for an unknown name, unknown kwargs, or a model that cannot take one of the sizes, DataError for
    weights that cannot be had. Each names a remedy that was tried.
    """
    if not timm.is_model(config.name.split(".")[0]):
        raise ConfigError(f"backbone.name={config.name!r} is not a timm model{name_hint(config.name)}")

    more = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    create = partial(_create, config.name, more)
    try:
        model = create(crop_sizes[0], config.kwargs, pretrained=pretrained)
    except Exception as failure:  # whatever a model's constructor, or a download, makes of its arguments
        raise explain_failure(create, config.name, config.kwargs, crop_sizes[0], failure) from failure
    for size in dict.fromkeys(crop_sizes):
        if cause := refusal(model, size):
            raise explain_refusal(create, model, config.name, config.kwargs, crop_sizes, size, cause)
    if config.pos_embed == "official":
        if type(model) is not VisionTransformer:
            raise ConfigError(
                f"backbone.pos_embed=official is for plain ViTs, {config.name} is none; set backbone.pos_embed=timm"
            )
        model.__class__ = _OfficialViT  # timm builds its own class and has no hook for this
    return model


def _create(
    name: str, more: dict[str, Any], native: int, kwargs: dict[str, Any], *, pretrained: bool = False
) -> nn.Module:
    """The timm model with a native image size, if it has one. Raises whatever its constructor does."""
    base = {"pretrained": pretrained, "num_classes": 0, **more}
    # Only the model's own constructor knows whether it has position embeddings to interpolate: ViTs take
    # both arguments, some families only img_size, convolutional networks neither.
    for extra in ({"img_size": native, "dynamic_img_size": True}, {"img_size": native}):
        with contextlib.suppress(TypeError):
            return timm.create_model(name, **{**base, **extra, **kwargs})
    return timm.create_model(name, **{**base, **kwargs})


def official_pos_embed(pos_embed: Tensor, height: int, width: int, *, num_prefix: int) -> Tensor:
    """Position embeddings [1, num_prefix + n * n, D] for a grid of `height` x `width` patches, as published.

    Bicubic without antialias, and by a scale factor (size + 0.1) / n rather than by size: the 0.1, there against
    rounding down, moves the sampling points a little, so weights trained with it want it again.
    """
    side = round((pos_embed.shape[1] - num_prefix) ** 0.5)
    if (height, width) == (side, side):
        return pos_embed
    prefix, grid = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    grid = F.interpolate(
        grid.unflatten(1, (side, side)).permute(0, 3, 1, 2),
        scale_factor=((height + 0.1) / side, (width + 0.1) / side),
        mode="bicubic",
    )
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


class _OfficialViT(VisionTransformer):
    """timm's ViT with the published interpolation of position embeddings."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        num_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        pos_embed = official_pos_embed(self.pos_embed, x.shape[1], x.shape[2], num_prefix=num_prefix)
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*tokens, x + pos_embed], dim=1))
        return self.pos_drop(torch.cat([*tokens, x], dim=1) + pos_embed)


def is_plain_vit(name: str) -> bool:
    """Whether timm builds the model of this name from its plain ViT, which `pos_embed=official` is for."""
    name = name.split(".")[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == VisionTransformer.__module__


def layer_depths(backbone: nn.Module) -> dict[str, int]:
    """Parameter name -> depth, 0 for the stem and rising by one a block, as timm groups them. ConfigError without."""
    if not hasattr(backbone, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay needs a backbone whose blocks timm tells apart, {type(backbone).__name__} is none; "
            "set optim.layer_decay=1"
        )
    matcher = backbone.group_matcher(coarse=False)  # type: ignore[operator]
    return group_parameters(backbone, matcher, reverse=True)


def embed_dim(backbone: nn.Module) -> int:
    """Width D of the features that the backbone returns."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether any layer keeps batch statistics."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
