"""Pixel operations of a crop: colour jitter, grayscale, blur, solarization.

This module stands between the sampled parameters and the finished crop; augment/multicrop.py selects the
operations and their order. Every function takes and returns uint8 [H,W,C] and leaves its input unchanged; saturation,
hue and grayscale need RGB.
Each operation matches torchvision on a PIL image with the same factor, so published settings keep their
meaning.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from dinoray.pipeline.augment import stains

Image = npt.NDArray[np.uint8]

_LEVELS = np.arange(256, dtype=np.float32)


def adjust_brightness(image: Image, factor: float) -> Image:
    """Scale every channel by `factor` >= 0: 0 is black, 1 changes nothing."""
    return _blend_with_level(image, 0, factor)


def adjust_contrast(image: Image, factor: float) -> Image:
    """Move every channel away from the image's mean gray: `factor` 0 is that gray, 1 changes nothing.

    Channels that are not RGB have no common gray: each moves away from its own mean.
    """
    channels = np.moveaxis(np.atleast_3d(image), 2, 0)
    if len(channels) != 3:
        each = [_blend_with_level(one, int(one.mean() + 0.5), factor) for one in channels]
        return np.stack(each, axis=-1)
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    return _blend_with_level(image, int(mean + 0.5), factor)


def adjust_saturation(image: Image, factor: float) -> Image:
    """Move every pixel away from its own gray: `factor` 0 is grayscale, 1 changes nothing."""
    # PIL truncates where OpenCV rounds: subtracting slightly less than a half makes them agree.
    return cv2.addWeighted(image, factor, to_grayscale(image), 1.0 - factor, -0.499)


def adjust_hue(image: Image, shift: float) -> Image:
    """Turn the hue by `shift` turns, in [-0.5, 0.5].

    The hue is turned in HSV. A rotation in RGB or YIQ by one matrix would be cheaper, but it is a different
    augmentation. Its result is farther from the HSV result than an unchanged hue is.
    """
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)  # wraps around, as hue does
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def jitter_stains(image: Image, changes: Sequence[float]) -> Image:
    """Multiply the amounts of the three stains of H&E by `changes[:3]`, and add `changes[3:]`."""
    mixed = (stains.AMOUNTS * changes[:3] @ stains.STAINS).astype(np.float32)
    densities = stains.DENSITIES[image] @ mixed + (changes[3:] @ stains.STAINS).astype(np.float32)
    steps = np.clip(densities * stains.STEPS + np.float32(0.5), 0, len(stains.LEVELS) - 1)
    return stains.LEVELS[steps.astype(np.int32)]


def to_grayscale(image: Image) -> Image:
    """Replace each pixel by its ITU-R 601 luma, in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image: Image, sigma: float) -> Image:
    """Blur by `sigma` pixels as PIL's GaussianBlur does: three boxes along each axis, edges repeated."""
    box, nothing = _box_taps(sigma), np.ones(1, np.float32)
    # Rounded after every pass, as in PIL. One pass with the boxes' convolution takes a quarter of the time,
    # but below 1.5 pixels it removes several per cent less of the finest detail.
    for _ in range(3):
        image = cv2.filter2D(image, -1, box[None], borderType=cv2.BORDER_REPLICATE)
    for _ in range(3):  # this filter is faster along columns, the other along rows
        image = cv2.sepFilter2D(image, -1, nothing, box, borderType=cv2.BORDER_REPLICATE)
    return image


def solarize(image: Image, threshold: int) -> Image:
    """Invert every channel value of `threshold` or more."""
    levels = np.arange(256)
    return cv2.LUT(image, np.where(levels >= threshold, 255 - levels, levels).astype(np.uint8))


def _box_taps(sigma: float) -> npt.NDArray[np.float32]:
    """Return a box filter of variance sigma^2 / 3 with fractional ends, float32 [2*l + 3].

    `l` is the number of whole pixels on either side. Gwosdek et al., Theoretical foundations of Gaussian
    convolution by extended box filtering (SSVM 2011), eq. 7, 11 and 14.
    """
    variance = sigma * sigma / 3.0
    whole = math.floor((math.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance)
    end /= 6.0 * (variance - (whole + 1) ** 2)
    taps = np.ones(2 * whole + 3)
    taps[0] = taps[-1] = end
    return (taps / taps.sum()).astype(np.float32)


def _blend_with_level(image: Image, level: int, factor: float) -> Image:
    """Return level + factor * (image - level), truncated and clamped to 0..255, by table."""
    # float32 and truncation, as in PIL: any other arithmetic is off by one at some levels.
    table = level + np.float32(factor) * (_LEVELS - level)
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))
