"""Any timm model as a feature extractor at any crop size.

First stop of a crop inside the network: pixels [B, 3, H, W] -> features [B, D]. Knows timm; nothing of heads,
losses or data.
"""

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.settings import ConfigError, Settings, one_line

_DECIDED_ELSEWHERE = {
    "drop_path_rate": "it is backbone.drop_path_rate",
    "pretrained": "it is backbone.pretrained",
    "num_classes": "the backbone has no classifier",
}


class BackboneConfig(Settings):
    """Which timm network is pretrained."""

    name: str = "vit_small_patch16_224"
    """Any name that `timm.list_models()` knows, with or without a tag of its weights (`.lvd142m`)."""
    pretrained: bool = False
    """Start from the weights that timm publishes under this name, downloaded once."""
    pos_embed: Literal["timm", "official"] = "timm"
    """How ViTs resize position embeddings: timm's way (antialiased), or that of the published DINO."""
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the student, linear from 0 to this rate over the blocks; the teacher has none."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for `timm.create_model`, e.g. `{patch_size: 8}`."""

    @field_validator("kwargs")
    @classmethod
    def _are_not_decided_elsewhere(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name, where in _DECIDED_ELSEWHERE.items():
            if name in kwargs:
                raise ValueError(f"backbone.kwargs must not hold {name}: {where}; remove it")
        return kwargs


def build_backbone(
    config: BackboneConfig, *, crop_sizes: tuple[int, ...], drop_path_rate: float, pretrained: bool = False
) -> nn.Module:
    """Create the timm model without a classifier, able to take square crops of every size in `crop_sizes`.

    `crop_sizes[0]` (the global crops') sets the native grid of learned position embeddings; other sizes
    are reached by interpolation (`dynamic_img_size`) where the model has such embeddings. The result maps
    float [B, 3, H, W] to [B, D], D = `embed_dim(model)`. With `pretrained`, timm downloads its weights. Raises
    ConfigError for an unknown name, unknown kwargs, or a model that cannot take one of the sizes.
    """
    if not timm.is_model(config.name.split(".")[0]):
        raise ConfigError(f"backbone.name={config.name!r} is not a timm model{_nearest(config.name)}")
    base: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    if drop_path_rate:
        base["drop_path_rate"] = drop_path_rate
    resizable = {"img_size": crop_sizes[0], "dynamic_img_size": True}
    error: Exception | None = None
    # Only the model's own constructor knows whether it has position embeddings to interpolate: ViTs take
    # both arguments, some families only img_size, convolutional networks neither.
    for extra in (resizable, {"img_size": crop_sizes[0]}, {}):
        try:
            model = timm.create_model(config.name, **{**base, **extra, **config.kwargs})
            break
        except TypeError as failure:
            error = failure
        except Exception as failure:  # whatever a model's constructor, or a download, makes of its arguments
            what = (
                "cannot be built"
                if not pretrained
                else "cannot be built with the weights that timm publishes"
            )
            raise ConfigError(f"backbone.name={config.name} {what}: {one_line(failure)}") from failure
    else:
        if "drop_path_rate" in str(error):
            raise ConfigError(
                f"backbone.drop_path_rate={drop_path_rate} does not fit {config.name}, which has none; set it to 0"
            ) from error
        raise ConfigError(
            f"backbone.kwargs={config.kwargs} do not fit {config.name}: {one_line(error)}"
        ) from error
    if config.pos_embed == "official":
        if type(model) is not VisionTransformer:
            raise ConfigError(
                f"backbone.pos_embed=official is for plain ViTs, {config.name} is none; set backbone.pos_embed=timm"
            )
        model.__class__ = _OfficialViT  # timm builds its own class and has no hook for this
    _check_sizes(model, config.name, crop_sizes)
    return model


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


def _check_sizes(model: nn.Module, name: str, crop_sizes: tuple[int, ...]) -> None:
    was_training = model.training
    model.eval()
    try:
        for size in dict.fromkeys(crop_sizes):
            try:
                with torch.no_grad():
                    shape = model(torch.zeros(1, 3, size, size)).shape
            except Exception as failure:
                raise ConfigError(
                    f"backbone.name={name} cannot take crops of {size} px: {one_line(failure)}; "
                    "choose a crop size that the patch size divides, or a model with dynamic image size"
                ) from failure
            if len(shape) != 2:
                raise ConfigError(
                    f"backbone.name={name} returns features of shape {tuple(shape)}, not [B, D]"
                )
    finally:
        model.train(was_training)


def _nearest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""
