"""Check a batch, and make pixels of its crops on the device: normalised floats, one row per crop. No Ray here.

Axes: B images, C crops of a kind, H and W their sides, P channels.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoray.models.dino import crop_major
from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment.config import NUM_PHOTOMETRIC, CropsConfig
from dinoray.pipeline.augment.kernels.torch_colour import adjust


def check_batch(batch: Mapping[str, Any], crops: CropsConfig) -> None:
    """Raise ConfigError if the crops do not match the config, before anything is computed with them."""
    g, s = crops.global_crop_size, crops.local_crop_size
    later = {
        "global_photometric": ("float32", (crops.num_global_crops, NUM_PHOTOMETRIC)),
        "local_photometric": ("float32", (crops.num_local_crops, NUM_PHOTOMETRIC)),
    }
    columns = {
        "global_crops": ("uint8", (crops.num_global_crops, g, g, crops.channels)),
        "local_crops": ("uint8", (crops.num_local_crops, s, s, crops.channels)),
        **(later if crops.photometric == "device" else {}),
    }
    for name, (dtype, shape) in columns.items():
        found = batch.get(name)
        if found is None or tuple(found.shape[1:]) != shape or str(found.dtype).rpartition(".")[2] != dtype:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise ConfigError(
                f"batch[{name!r}] is {what}, it must be {dtype} [B, {', '.join(map(str, shape))}]"
            )
    for name in sorted(later.keys() & batch.keys() - columns.keys()):
        raise ConfigError(f"batch has {name!r}: its crops are unfinished; set crops.photometric=device")
    rows = [len(batch[name]) for name in ("global_crops", "local_crops")]
    if rows[0] != rows[1]:
        raise ConfigError(
            f"batch has {rows[0]} rows of global crops and {rows[1]} of local ones, not as many"
        )


def pixels(crops: Any, config: CropsConfig, device: torch.device, photometric: Any | None = None) -> Tensor:
    """Convert uint8 [B, C, H, W, P] to normalised [C*B, P, H, W] on the device, crop-major.

    The input is not changed. This is the only place where rows per image become rows per crop. Bytes are
    copied to the device, not floats. float32 and contiguous on a CPU. On a GPU channels_last, which convolutions of
    bfloat16 need, and as autocast would cast it, where that is on; in one pass unless something is still to be done to
    the crops: `photometric`, float32 [B, C, 11].
    """
    x = torch.as_tensor(crops).to(device, non_blocking=True)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
    if device.type == "cuda" and photometric is None:
        return normalised(x, *_per_byte(config, device, torch.float32), dtype)
    if photometric is None:
        levels = crop_major(x).float()
    else:
        later = torch.as_tensor(photometric).to(device, non_blocking=True)
        levels = adjust(crop_major(x), later.transpose(0, 1).flatten(0, 1), config)
    mean, std = _per_byte(config, device, levels.dtype)
    floats = levels.sub_(mean).div_(std)
    return floats if device.type == "cpu" else floats.to(dtype, memory_format=torch.channels_last)


def normalised(crops: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (crops - mean) / std of uint8 [B, C, H, W, P] as channels_last [C*B, P, H, W], in one kernel.

    Computed in float32, rounded to `dtype` at the end; `mean` and `std` [P, 1, 1] float32 are per byte.
    """
    b, c, h, w, p = crops.shape
    out = torch.empty((c, b, h, w, p), dtype=dtype, device=crops.device)
    torch.addcmul((-mean / std).view(p), crops.transpose(0, 1), std.reciprocal().view(p), out=out)
    return out.flatten(0, 1).permute(0, 3, 1, 2)


@functools.lru_cache
def _per_byte(config: CropsConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return mean and std of the channels, each [P, 1, 1] on the device, of values 0 to 255.

    Kept, since each copy to a GPU makes the host wait.
    """
    values = (config.pixel_mean, config.pixel_std)
    mean, std = (torch.tensor(each, device=device, dtype=dtype).view(-1, 1, 1) * 255 for each in values)
    return mean, std
