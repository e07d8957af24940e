"""Jitter, grayscale, blur and solarization of whole batches of crops, on the device that trains.

`crops.photometric=device`: the CPU actors leave these operations out and send their parameters along. Each operation
does what numba_colour.py does, in the same order and with the same rounding: colours are whole numbers in float32, and
the blur is six box passes in integers. A difference of one level would not stay one: solarization from 200 on makes 55
of 200 and leaves 199.

Shapes depend on no value, so the host neither waits nor loops over crops: an operation that a crop does not have gets
the parameters that change nothing. Axes: N crops, S their side.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dinoray.pipeline.augment.config import CropsConfig, crop_kinds
from dinoray.pipeline.augment.params import (
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    GRAY,
    HUE,
    NUM_OPERATIONS,
    OPERATIONS,
    SATURATION,
    SIGMA,
    SOLARIZE,
)

_MOST_PIXELS = 1 << 21
"""Pixels that are adjusted at once. Up to 16 numbers of 4 bytes exist for each at a time: some 130 MB."""

_UNIT = 1 << 24
"""The weight 1 of the blur, as in numba_colour.py."""


def adjust(crops: Tensor, photometric: Tensor, config: CropsConfig) -> Tensor:
    """Apply the sampled operations to `crops`, uint8 [N,C,S,S]; return whole levels as float32 [N,C,S,S].

    `photometric` is float32 [N,11], of the same crops in the same order (see `params.split_photometric`), on the same
    device. The crops are not changed.
    """
    out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    parts = max(1, math.ceil(crops[:, 0].numel() / _MOST_PIXELS))
    reach = _reach(config)
    for target, levels, values in zip(
        out.chunk(parts), crops.chunk(parts), photometric.chunk(parts), strict=True
    ):
        x = target.copy_(levels)
        columns = values[:, :, None, None, None].unbind(1)
        _jitter(x, columns)
        gray = columns[GRAY - OPERATIONS] != 0
        x.copy_(torch.where(gray, _luma(x), x))
        if reach:
            x.copy_(_blur(x, values[:, SIGMA - OPERATIONS], reach))
        x.copy_(torch.where(x >= columns[SOLARIZE - OPERATIONS], 255 - x, x))
    return out


def finished(batch: Mapping[str, Any], config: CropsConfig) -> dict[str, Any]:
    """Return a batch, whose columns are arrays, as `crops.photometric=cpu` makes it; another batch as it is."""
    columns = dict(batch)
    for group in ("global", "local"):
        photometric = columns.pop(f"{group}_photometric", None)
        if photometric is not None:
            crops = torch.tensor(columns[f"{group}_crops"])
            levels = crops.flatten(0, 1).permute(0, 3, 1, 2)
            levels = adjust(levels, torch.tensor(photometric).flatten(0, 1), config)
            columns[f"{group}_crops"] = levels.byte().permute(0, 2, 3, 1).reshape(crops.shape).numpy()
    return columns


def _jitter(x: Tensor, columns: tuple[Tensor, ...]) -> None:
    """Apply the four operations in each crop's own order, in place.

    Turning the hue takes as long as all the rest, and each crop does it once at most: so everything that a crop does
    before is applied to all crops, then the hue, then everything after it.
    """
    operations, factors = (
        columns[first - OPERATIONS : first - OPERATIONS + NUM_OPERATIONS] for first in (OPERATIONS, FACTORS)
    )
    is_before = [torch.ones_like(operations[0], dtype=torch.bool)]
    for operation in operations:
        is_before.append(is_before[-1] & (operation != HUE))
    for i in range(NUM_OPERATIONS - 1):
        _blend(x, operations[i], factors[i], is_before[i])
    if x.shape[1] == 3:
        turns = [factor * (operation == HUE) for operation, factor in zip(operations, factors, strict=True)]
        x.copy_(torch.where(is_before[-1], x, _turned(x, torch.stack(turns).sum(0))))
    for i in range(1, NUM_OPERATIONS):
        _blend(x, operations[i], factors[i], ~is_before[i])


def _blend(x: Tensor, operation: Tensor, factor: Tensor, applies: Tensor) -> None:
    """Set x to level + factor * (x - level), cut off to whole numbers in 0..255, in place.

    The level is 0, the crop's mean luma or the pixel's luma: brightness, contrast or saturation. Where it does not
    apply, level 0 and factor 1 change nothing.
    """
    luma = _luma(x)
    level = torch.where(operation == CONTRAST, _rounded_mean(luma), 0.0)
    level = torch.where(operation == SATURATION, luma, level)
    is_blend = applies & (operation >= BRIGHTNESS) & (operation <= SATURATION)
    level = torch.where(is_blend, level, 0.0)
    x.sub_(level).mul_(torch.where(is_blend, factor, 1.0)).add_(level).clamp_(0, 255).trunc_()


def _luma(x: Tensor) -> Tensor:
    """Return the ITU-R 601 luma [N,1,S,S] in PIL's fixed point, whose numbers float32 holds exactly.

    Of other channels than red, green and blue each is its own.
    """
    if x.shape[1] != 3:
        return x  # each channel is a gray picture of its own
    red, green, blue = (x[:, i : i + 1] for i in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 32768).mul_(1 / 65536).trunc_()


def _rounded_mean(luma: Tensor) -> Tensor:
    """Return the mean over each crop, rounded half up [N,1 or C,1,1]: in integers, since a sum may exceed 2^24."""
    total = luma.sum(3, keepdim=True).to(torch.int64).sum(2, keepdim=True)
    number = luma.shape[2] * luma.shape[3]
    return torch.div(2 * total + number, 2 * number, rounding_mode="floor").to(luma.dtype)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """Return x with its hue turned by `turn` 256ths, in HSV with 8 bits per channel."""
    red, green, blue = x.unbind(1)
    turn = turn[:, 0]
    value = x.amax(1)
    chroma = value - x.amin(1)
    unit = 1 / chroma.clamp(min=1)
    hue = torch.where(value == green, (blue - red) * unit + 2, (red - green) * unit + 4)
    hue = torch.where(value == red, (green - blue) * unit, hue).mul_(1 / 6).add_(1)
    hue = hue.frac_().mul_(255).trunc_().add_(turn)
    hue = torch.where(hue >= 256, hue - 256, hue).mul_(6 / 255)
    lack = (chroma / value.clamp(min=1)).mul_(255).trunc_().mul_(1 / 255).mul_(value)
    return torch.stack([value - lack * _share(hue + around) + 0.5 for around in (5, 3, 1)], 1).trunc_()


def _share(hue: Tensor) -> Tensor:
    """Return the share of the lack for a channel whose own hue is 5 on a circle of 6."""
    hue = torch.where(hue >= 6, hue - 6, hue)
    return torch.minimum(hue, 4 - hue).clamp_(0, 1)


def _blur(x: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Blur by `sigma` [N] pixels, negative for none, as numba_colour.py does; return int32 [N,3,S,S].

    Levels count from -128 to 127, so that no sum of products leaves 32 bits.
    """
    weights, start = _boxes(sigma, reach)
    levels = x.to(torch.int32).sub_(128)
    for axis in (3, 2):
        shape = list(levels.shape)
        shape[axis] += 2 * reach
        padded = torch.empty(shape, dtype=torch.int32, device=x.device)
        size = levels.shape[axis]
        inside = padded.narrow(axis, reach, size)
        inside.copy_(levels)
        for _ in range(3):
            padded.narrow(axis, 0, reach).copy_(inside.narrow(axis, 0, 1))
            padded.narrow(axis, reach + size, reach).copy_(inside.narrow(axis, size - 1, 1))
            total = inside * weights[0] + start
            for k in range(1, reach + 1):
                ends = padded.narrow(axis, reach - k, size) + padded.narrow(axis, reach + k, size)
                total += ends.mul_(weights[k])
            torch.bitwise_right_shift(total, 24, out=inside)
        levels = inside
    return levels + 128


def _boxes(sigma: Tensor, reach: int) -> tuple[list[Tensor], Tensor]:
    """Return the weights of a box's pixels by distance, each int32 [N,1,1,1], and where its sum starts.

    As `numba_colour.box_weights`, with its rounding; see there for the source. The start rounds the sum and makes up
    for weights that sum to one less than 2^24.
    """
    variance = sigma.clamp(min=0) * sigma.clamp(min=0) / 3
    length = (12 * variance.double() + 1).sqrt().float()
    full = ((length.double() - 1) / 2).floor().float()
    end = (2 * full + 1) * (full * (full + 1) - 3 * variance)
    radius = full + end / (6 * (variance - (full + 1) * (full + 1)))
    whole = radius.int()[:, None, None, None]
    inner = (_UNIT / (radius * 2 + 1)).int()[:, None, None, None]
    rest = _UNIT - (2 * whole + 1) * inner
    outer = rest >> 1
    weights = [inner * (k <= whole) + outer * (k == whole + 1) for k in range(reach + 1)]
    return weights, (1 << 23) - 128 * (rest & 1)


@lru_cache(maxsize=16)
def _reach(config: CropsConfig) -> int:
    """Return how many pixels to either side the widest box that may be drawn reaches; 0 if no crop is blurred."""
    sigmas = [kind.blur_sigma[1] for kind in crop_kinds(config) if kind.blur_prob > 0]
    if not sigmas:
        return 0
    # A little more than the sigma: float32 may round a box up to the next whole pixel.
    return math.floor((math.sqrt(4 * (1.0001 * max(sigmas)) ** 2 + 1) - 1) / 2) + 1
