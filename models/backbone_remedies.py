"""Explain why timm cannot build a backbone, or why it takes no crops of a size, with a remedy that was tried.

backbone.py calls it after a failure. Each remedy is tested by building the model with it.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dinoray.models.errors import ConfigError, DataError, DinorayError, one_line
from dinoray.models.input_channels import in_chans

Create = Callable[[int, dict[str, Any]], nn.Module]
"""(native image size, kwargs) -> the model; raises what its constructor raises."""

_SETTINGS = ("crops.global_crop_size", "crops.local_crop_size", "eval.image_size")
_STEPS = (4, 7, 8, 14, 16, 32, 64)
"""Sizes of patches, windows and strides; the crop sizes that are tried are multiples of them."""
_MOST_BUILDS = 6
"""Largest number of native sizes that a model is built for in search of a remedy, besides its own."""
_ANOTHER = "choose another backbone.name, e.g. vit_small_patch16_224 or resnet50"
_SEVERAL = "or choose a backbone that takes two crop sizes, e.g. backbone.name=vit_small_patch16_224"


def refusal(model: nn.Module, size: int) -> str | None:
    """Return why the model does not map crops of `size` px to [B, D]; None if it does."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = model(
                torch.zeros(1, in_chans(model), size, size, device=next(model.parameters()).device)
            )
    except Exception as failure:  # a model may raise anything for a size that it was not built for
        return one_line(failure) if str(failure) else "its layers do not accept this size"
    finally:
        model.train(was_training)
    if isinstance(features, Tensor) and features.ndim == 2:
        return None
    shape = (
        f"shape {tuple(features.shape)}"
        if isinstance(features, Tensor)
        else f"type {type(features).__name__}"
    )
    return f"it returns features of {shape}, not [B, D]"


def explain_failure(
    create: Create, name: str, kwargs: Mapping[str, Any], native: int, failure: Exception
) -> DinorayError:
    """Return the error for a constructor that raised `failure`."""
    cause = one_line(failure)
    if "drop_path_rate" in cause:
        return ConfigError(
            f"backbone.drop_path_rate: {name} has no stochastic depth; set backbone.drop_path_rate=0"
        )
    if "Invalid pretrained tag" in cause or _builds(create, native, kwargs):
        return _explain_weights(name, kwargs, failure)
    if to_leave_out := _kwargs_to_leave_out(kwargs, lambda rest: _builds(create, native, rest)):
        return ConfigError(
            f"backbone.kwargs={dict(kwargs)} do not fit {name}: {cause}; leave out {to_leave_out} or correct it"
        )
    if sizes := _find_sizes(create, kwargs, [native], None):
        return ConfigError(
            f"backbone.name={name} cannot be built for crops of {native} px: {cause}; {_set(sizes, [native])}"
        )
    return ConfigError(f"backbone.name={name} cannot be built: {cause}; {_ANOTHER}")


def explain_refusal(
    create: Create,
    model: nn.Module,
    name: str,
    kwargs: Mapping[str, Any],
    crop_sizes: Sequence[int],
    size: int,
    cause: str,
) -> ConfigError:
    """Return the error for a model that refuses crops of `size` px because of `cause`."""
    what = f"backbone.name={name} cannot take crops of {size} px"
    if size != crop_sizes[0]:
        what += f" beside those of {crop_sizes[0]} px"
    if sizes := _find_sizes(create, kwargs, crop_sizes, model):
        is_one_size = len(crop_sizes) > 1 and sizes[0] == sizes[1] and crop_sizes[0] != crop_sizes[1]
        remedy = _set(sizes, crop_sizes) + (f", {_SEVERAL}" if is_one_size else "")
    elif to_leave_out := _kwargs_to_leave_out(kwargs, lambda rest: _fits(create, rest, crop_sizes)):
        what, remedy = f"backbone.kwargs={dict(kwargs)} do not fit {name}", f"leave out {to_leave_out}"
    else:
        remedy = _ANOTHER
    return ConfigError(f"{what}: {cause}; {remedy}")


def _explain_weights(name: str, kwargs: Mapping[str, Any], failure: Exception) -> DinorayError:
    """Return the error for a model that can be built without timm's published weights, but not with them."""
    cause = one_line(failure)
    what = f"backbone.pretrained=true: the weights that timm publishes for {name}"
    noise = "set backbone.pretrained=false"
    arch, _, _ = name.partition(".")
    published = timm.list_pretrained(f"{arch}.*") + timm.list_pretrained(arch)
    if name not in published and (name != arch or not published):
        others = f"; those it does are named {', '.join(published)}" if published else ""
        remedy = noise if name == arch else f"set backbone.name={arch}"
        return ConfigError(f"backbone.name={name}: timm publishes no such weights{others}; {remedy}")
    if isinstance(failure, RuntimeError | ValueError) and kwargs and not isinstance(failure, OSError):
        return ConfigError(
            f"{what} do not fit backbone.kwargs={dict(kwargs)}: {cause}; leave out kwargs, or {noise}"
        )
    return DataError(
        f"{what} cannot be had: {cause}; connect this machine to the network, or {noise} and name a local file of "
        "weights in timm's names: init.from=FILE"
    )


def _kwargs_to_leave_out(kwargs: Mapping[str, Any], works: Callable[[dict[str, Any]], bool]) -> str:
    """Return the one argument without which it works, or all arguments; empty if neither helps."""
    for name in kwargs:
        if works({key: value for key, value in kwargs.items() if key != name}):
            return name
    return ", ".join(kwargs) if len(kwargs) > 1 and works({}) else ""


def _builds(create: Create, native: int, kwargs: Mapping[str, Any]) -> bool:
    return _try(create, native, kwargs) is not None


def _fits(create: Create, kwargs: Mapping[str, Any], crop_sizes: Iterable[int]) -> bool:
    sizes = list(crop_sizes)
    model = _try(create, sizes[0], kwargs)
    return model is not None and not any(refusal(model, size) for size in sizes)


def _try(create: Create, native: int, kwargs: Mapping[str, Any]) -> nn.Module | None:
    """Build the model, without memory for weights if its constructor allows that; None if it fails."""
    for device in ("meta", "cpu"):
        with contextlib.suppress(Exception), torch.device(device):
            return create(native, dict(kwargs))
    return None


def _find_sizes(
    create: Create, kwargs: Mapping[str, Any], wanted: Sequence[int], model: nn.Module | None
) -> list[int] | None:
    """Return sizes that one model takes, as near to `wanted` as a short search finds; None if there are none.

    `model`: the model for `wanted[0]`, if it could be built.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    native = int(cfg.get("input_size", (3, 224, 224))[-1])
    for size in [wanted[0], *_nearby(wanted[0])[:_MOST_BUILDS], native]:
        if size != wanted[0]:
            model = _try(create, size, kwargs)
        if model is None or refusal(model, size):
            continue
        found = [size]
        for other in wanted[1:]:
            tried = [other, *(near for near in _nearby(other) if near <= size), size]
            found += [next(near for near in tried if not refusal(model, near))]
        return found
    return None


def _nearby(size: int) -> list[int]:
    """Return other sizes from three quarters of `size` to twice `size`, nearest first.

    Far smaller sizes may pass by accident: a grid of one patch broadcasts against any position embeddings.
    """
    multiples = {(size // step + more) * step for step in _STEPS for more in range(-2, 3)}
    return sorted(
        (s for s in multiples if 0.75 * size <= s <= 2 * size and s != size), key=lambda s: abs(s - size)
    )


def _set(sizes: Sequence[int], wanted: Sequence[int]) -> str:
    changed = [
        f"{setting}={size}"
        for setting, size, old in zip(_SETTINGS, sizes, wanted, strict=False)
        if size != old
    ]
    return f"set {' '.join(changed)}"
