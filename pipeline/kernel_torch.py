"""The kernel that needs no compiler: torch resizes, OpenCV does the rest, crop by crop.

What crops.py falls back to where numba cannot be had. Torch's antialiased bicubic filter is PIL's; OpenCV's is not
antialiased, and local crops would alias. Knows nothing of files, decoding or random numbers.
"""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from pipeline import colour
from pipeline.colour import Image
from pipeline.crop_params import OneCrop

_MOST_SKIPPED = 8
"""Pixels made and thrown away to begin at a whole pixel of a reduced picture: with 8 it is off by 0.03 on average."""

_JITTER = {
    "brightness": colour.adjust_brightness,
    "contrast": colour.adjust_contrast,
    "saturation": colour.adjust_saturation,
    "hue": colour.adjust_hue,
}


def apply_crop(
    image: Image,
    crop: OneCrop,
    *,
    interpolation: str = "bicubic",
    denominator: int = 1,
    shift: tuple[float, float] = (0.0, 0.0),
) -> Image:
    """Make one crop, uint8 [size,size,3], of an image (uint8 [H,W,3], C-contiguous) that stays as it is.

    The image may be a reduced one: its pixels are then those of the parameters / `denominator` + `shift` (x, y).
    """
    pixels = resize_box(image, crop, interpolation=interpolation, denominator=denominator, shift=shift)
    if crop.flip:
        pixels = cv2.flip(pixels, 1)
    for operation, factor in crop.jitter:
        pixels = _JITTER[operation](pixels, factor)
    if crop.gray:
        pixels = colour.to_grayscale(pixels)
    if crop.blur_sigma is not None:
        pixels = colour.blur(pixels, crop.blur_sigma)
    if crop.solarize is not None:
        pixels = colour.solarize(pixels, crop.solarize)
    return pixels


def resize_box(
    image: Image,
    crop: OneCrop,
    *,
    interpolation: str = "bicubic",
    denominator: int = 1,
    shift: tuple[float, float] = (0.0, 0.0),
) -> Image:
    """Cut the box out and resize it to the crop's size, as PIL does it."""
    if denominator == 1:
        region = image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        return _interpolate(region, interpolation, size=(crop.size, crop.size))
    left = crop.left / denominator + shift[0]
    top = crop.top / denominator + shift[1]
    x = _whole_pixels(left, crop.width / denominator, crop.size, image.shape[1])
    y = _whole_pixels(top, crop.height / denominator, crop.size, image.shape[0])
    resized = _interpolate(
        image[y.first : y.last, x.first : x.last], interpolation, scale_factor=(y.factor, x.factor)
    )
    return np.ascontiguousarray(resized[y.skip : y.skip + crop.size, x.skip : x.skip + crop.size])


def _interpolate(region: Image, mode: str, **how: Any) -> Image:
    # A view whose memory is channels-last: torch then takes its fast uint8 path, and nothing is transposed.
    resized = F.interpolate(torch.from_numpy(region).permute(2, 0, 1)[None], mode=mode, antialias=True, **how)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


class _Span(NamedTuple):
    """Whole source pixels [first, last) that, resized by `factor`, hold the wanted results after `skip` others."""

    first: int
    last: int
    factor: float
    skip: int


def _whole_pixels(start: float, length: float, size: int, limit: int) -> _Span:
    """The span that makes `size` pixels of [start, start + length), of which neither end is a whole pixel.

    Torch begins at a whole pixel, but its step need not be one: some steps before the start there may be a pixel
    that nearly is, and what was made on the way is thrown away.
    """
    step = length / size
    begins = [start - skip * step for skip in range(_MOST_SKIPPED + 1) if round(start - skip * step) >= 0]
    skip = min(range(len(begins)), key=lambda k: abs(begins[k] - round(begins[k])))
    first = round(begins[skip])
    last = min(limit, math.ceil(start + length))
    # Torch makes floor(pixels * factor) of them: where the picture ends too early for that, the step gives way.
    factor = max(1 / step, (size + skip) / (last - first)) * (1 + 1e-9)
    return _Span(first, last, factor, skip)
