"""The kernel that needs no compiler: torch resizes, OpenCV does the rest, crop by crop.

augment/multicrop.py uses this kernel where numba is unavailable. Torch's antialiased bicubic filter equals
PIL's; OpenCV's filter is not antialiased and would alias local crops. There are no files, no decoding and no
random numbers here.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dinoray.pipeline.augment.kernels import opencv_colour
from dinoray.pipeline.augment.kernels.opencv_colour import Image
from dinoray.pipeline.augment.params import CropParams, OneCrop
from dinoray.pipeline.data.decoding.jpeg import Decoded

_MOST_SKIPPED = 8
"""Limit on pixels that are made and discarded to begin at a whole pixel of a reduced picture.

With 8 the start is off by 0.03 pixels on average.
"""

_JITTER = {
    "brightness": opencv_colour.adjust_brightness,
    "contrast": opencv_colour.adjust_contrast,
    "saturation": opencv_colour.adjust_saturation,
    "hue": opencv_colour.adjust_hue,
}


def cut(picture: Decoded, params: CropParams, out: Sequence[Iterable[Image]]) -> None:
    """Write all crops of a picture to `out`, (globals, locals)."""
    pictures = [picture]
    for target, crop in zip([*out[0], *out[1]], params.crops, strict=True):
        # A picture decoded at a fraction for its smallest region may be reduced further for a larger region,
        # because the filter takes most of the time here.
        side, halvings = min(crop.width, crop.height) / picture.denominator / crop.size, 0
        while picture.denominator > 1 and side / 2 ** (halvings + 1) >= params.config.decode_slack:
            halvings += 1
            if len(pictures) == halvings:
                pictures.append(_half(pictures[-1]))
        pixels = resize_box(pictures[halvings], crop, interpolation=params.config.interpolation)
        target[:] = np.atleast_3d(apply_colour(pixels, crop))  # OpenCV drops an axis of one channel


def apply_colour(pixels: Image, crop: OneCrop) -> Image:
    """Apply all colour operations to a crop, uint8 [size,size,3], after its box was resized."""
    if crop.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if crop.vertical_flip:
        pixels = np.ascontiguousarray(pixels[::-1])
    if crop.quarter_turn:
        pixels = np.ascontiguousarray(np.rot90(pixels))
    if crop.stains is not None:
        pixels = opencv_colour.jitter_stains(pixels, crop.stains)
    for operation, factor in crop.jitter:
        pixels = _JITTER[operation](pixels, factor)
    if crop.gray:
        pixels = opencv_colour.to_grayscale(pixels)
    if crop.blur_sigma is not None:
        pixels = opencv_colour.blur(pixels, crop.blur_sigma)
    if crop.solarize is not None:
        pixels = opencv_colour.solarize(pixels, crop.solarize)
    return pixels


def resize_box(picture: Decoded, crop: OneCrop, *, interpolation: str) -> Image:
    """Cut the box out and resize it to the crop's size, as PIL does."""
    if picture.denominator == 1:
        region = picture.pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        return _interpolate(region, interpolation, size=(crop.size, crop.size))
    height, width = picture.pixels.shape[:2]
    left = crop.left / picture.denominator + picture.left_shift
    top = crop.top / picture.denominator + picture.top_shift
    x = _whole_pixels(left, crop.width / picture.denominator, crop.size, width)
    y = _whole_pixels(top, crop.height / picture.denominator, crop.size, height)
    region = picture.pixels[y.first : y.last, x.first : x.last]
    resized = _interpolate(region, interpolation, scale_factor=(y.factor, x.factor))
    return np.ascontiguousarray(resized[y.skip : y.skip + crop.size, x.skip : x.skip + crop.size])


def _half(picture: Decoded) -> Decoded:
    """Return the picture at half its size; repeat an odd last row or column."""
    height, width = picture.pixels.shape[:2]
    even = cv2.copyMakeBorder(picture.pixels, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    small = cv2.resize(even, ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA)
    return Decoded(small, 2 * picture.denominator, picture.left_shift / 2, picture.top_shift / 2)


def _interpolate(region: Image, mode: str, **how: Any) -> Image:
    # Contiguous channels-last memory: torch then takes its fast uint8 path.
    pixels = torch.from_numpy(np.ascontiguousarray(region)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, mode=mode, antialias=True, **how)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


class _Span(NamedTuple):
    """Whole source pixels [first, last); resized by `factor`, the wanted pixels follow `skip` others."""

    first: int
    last: int
    factor: float
    skip: int


def _whole_pixels(start: float, length: float, size: int, limit: int) -> _Span:
    """Return the span that yields `size` pixels of [start, start + length), whose ends are fractions.

    Torch begins at a whole pixel, but its step need not be whole. Some steps before the start there may be a
    position close to a whole pixel; the pixels made on the way are discarded.
    """
    step = length / size
    begins = [start - skip * step for skip in range(_MOST_SKIPPED + 1) if round(start - skip * step) >= 0]
    skip = min(range(len(begins)), key=lambda k: abs(begins[k] - round(begins[k])))
    first = round(begins[skip])
    last = min(limit, math.ceil(start + length))
    # Torch makes floor(pixels * factor) pixels: where the picture ends too early for that, the step changes.
    factor = max(1 / step, (size + skip) / (last - first)) * (1 + 1e-9)
    return _Span(first, last, factor, skip)
