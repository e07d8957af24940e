"""Any timm model as a feature extractor at any crop size.

The first part of the network: pixels [B, C, H, W] -> features [B, D]. Uses timm; no heads, losses or data
here.
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

from dinoray.models.backbone_names import name_hint
from dinoray.models.backbone_remedies import explain_failure, explain_refusal, refusal
from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError, one_line
from dinoray.models.input_channels import inflate_layers


def build_backbone(
    config: BackboneConfig,
    *,
    crop_sizes: tuple[int, ...],
    drop_path_rate: float,
    pretrained: bool = False,
    in_chans: int = 3,
) -> nn.Module:
    """Create the timm model without a classifier, able to take square crops of every size in `crop_sizes`.

    `crop_sizes`: `crops.global_crop_size`, `crops.local_crop_size` and `eval.image_size`, or the first of
    these. The first size sets the native grid of learned position embeddings; if the model has them, they are
    interpolated for other sizes (`dynamic_img_size`). The result maps float [B, in_chans, H, W] to [B, D], D =
    `embed_dim(model)`. With `pretrained`, timm downloads its weights; other than three channels get inflated filters.

    Raises ConfigError for an unknown name, unknown kwargs, or a model that cannot take one of the sizes.
    Raises DataError if weights cannot be downloaded. Each message has a remedy that was tried.
    """
    if not timm.is_model(config.name.split(".")[0]):
        raise ConfigError(f"backbone.name={config.name!r} is not a timm model{name_hint(config.name)}")

    more: dict[str, Any] = {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
    create = partial(_create, config.name, more | ({"in_chans": in_chans} if in_chans != 3 else {}))
    rgb = None
    try:
        if pretrained and in_chans != 3:
            rgb = _create(config.name, more, crop_sizes[0], config.kwargs, pretrained=True)
        model = create(crop_sizes[0], config.kwargs, pretrained=pretrained and rgb is None)
    except Exception as failure:  # a model's constructor or a download may raise anything
        raise explain_failure(create, config.name, config.kwargs, crop_sizes[0], failure) from failure
    if rgb is not None:
        _load_inflated(rgb.state_dict(), model, config.name, in_chans)
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
    """Create the timm model with a native image size, if it has one. Raises what its constructor raises."""
    base = {"pretrained": pretrained, "num_classes": 0, **more}
    # Only a model's constructor shows whether it has position embeddings to interpolate: ViTs take
    # both arguments, some families only img_size, convolutional networks neither.
    for extra in ({"img_size": native, "dynamic_img_size": True}, {"img_size": native}):
        with contextlib.suppress(TypeError):
            return timm.create_model(name, **{**base, **extra, **kwargs})
    return timm.create_model(name, **{**base, **kwargs})


def _load_inflated(state: dict[str, Tensor], model: nn.Module, name: str, in_chans: int) -> None:
    """Load the weights of the same model for RGB. Raises ConfigError where more than `image_layers` depends on that."""
    inflated, _ = inflate_layers(state, model.state_dict(), image_layers(model))
    try:
        model.load_state_dict(inflated)
    except RuntimeError as error:
        raise ConfigError(
            f"backbone.pretrained=true: the weights of {name}, which are for three channels, do not fit data.channels="
            f"{in_chans}: {one_line(error)}; set backbone.pretrained=false, or another backbone.name"
        ) from error


def official_pos_embed(pos_embed: Tensor, height: int, width: int, *, num_prefix: int) -> Tensor:
    """Resize position embeddings [1, num_prefix + n * n, D] to `height` x `width` patches, as published.

    Bicubic without antialias, by a scale factor (size + 0.1) / n rather than by size. The 0.1 prevents
    rounding down and shifts the sampling points slightly, so weights that were trained with it need it.
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
    """Return True if timm builds this model from its plain ViT, as `pos_embed=official` requires."""
    name = name.split(".")[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__ == VisionTransformer.__module__


def layer_depths(backbone: nn.Module) -> dict[str, int]:
    """Return parameter name -> depth by timm's groups: 0 for the stem, then one more per block.

    Raises ConfigError if timm has no groups for the backbone.
    """
    if not hasattr(backbone, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay needs a backbone whose blocks timm tells apart, {type(backbone).__name__} is none; "
            "set optim.layer_decay=1"
        )
    matcher = backbone.group_matcher(coarse=False)  # type: ignore[operator]
    return group_parameters(backbone, matcher, reverse=True)


def image_layers(backbone: nn.Module) -> list[str]:
    """Return the names of the parameters that take the image: a ViT's patch embedding, or the first convolution.

    [] if timm does not name that layer.
    """
    first = (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv") or ()
    layers = ("patch_embed", *([first] if isinstance(first, str) else first))
    return [
        name for name, _ in backbone.named_parameters() if name.startswith(tuple(f"{x}." for x in layers))
    ]


def embed_dim(backbone: nn.Module) -> int:
    """Return the width D of the backbone's features."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def has_batch_norm(module: nn.Module) -> bool:
    """Return True if any layer is a batch norm."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
