"""Any timm model as a feature extractor at any crop size.

First stop of a crop inside the network: pixels [B, 3, H, W] -> features [B, D]. Knows timm; nothing of heads,
losses or data.
"""

from typing import Any

import timm
import torch
from pydantic import Field, field_validator
from torch import nn

from models.settings import ConfigError, Settings


class BackboneConfig(Settings):
    """Which timm network is pretrained."""

    name: str = "vit_small_patch16_224"
    """Any name that `timm.list_models()` knows."""
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the student, linear from 0 to this rate over the blocks; the teacher has none."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for `timm.create_model`, e.g. `{patch_size: 8}`."""

    @field_validator("kwargs")
    @classmethod
    def _are_not_decided_elsewhere(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name in ("drop_path_rate", "num_classes", "pretrained"):
            if name in kwargs:
                raise ValueError(f"backbone.kwargs must not hold {name}: it is decided elsewhere; remove it")
        return kwargs


def build_backbone(
    config: BackboneConfig, *, crop_sizes: tuple[int, ...], drop_path_rate: float
) -> nn.Module:
    """Create the timm model without a classifier, able to take square crops of every size in `crop_sizes`.

    `crop_sizes[0]` (the global crops') sets the native grid of learned position embeddings; other sizes
    are reached by interpolation (`dynamic_img_size`) where the model has such embeddings. The result maps
    float [B, 3, H, W] to [B, D], D = `embed_dim(model)`. Raises ConfigError for an unknown name, unknown
    kwargs, or a model that cannot take one of the sizes.
    """
    if not timm.is_model(config.name.split(".")[0]):
        raise ConfigError(f"backbone.name={config.name!r} is not a timm model{_nearest(config.name)}")
    base: dict[str, Any] = {"pretrained": False, "num_classes": 0}
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
        except Exception as failure:  # whatever a model's constructor makes of its arguments
            raise ConfigError(
                f"backbone.name={config.name} cannot be built: {_one_line(failure)}"
            ) from failure
    else:
        if "drop_path_rate" in str(error):
            raise ConfigError(
                f"backbone.drop_path_rate={drop_path_rate} does not fit {config.name}, which has none; set it to 0"
            ) from error
        raise ConfigError(
            f"backbone.kwargs={config.kwargs} do not fit {config.name}: {_one_line(error)}"
        ) from error
    _check_sizes(model, config.name, crop_sizes)
    return model


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
                    f"backbone.name={name} cannot take crops of {size} px: {_one_line(failure)}; "
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


def _one_line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:200]
