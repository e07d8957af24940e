"""Attention maps as numbers and as pixels: masks of the most attended patches, heat, regions of heads.

This module stands between models/attention.py, which computes one map per head, and attention_sheet.py, which
arranges pictures. Pure functions on NumPy arrays: images are uint8 RGB [H,W,3]; maps are float [heads,h,w]
with one value per patch. w patches cover W pixels and extend at most one patch beyond them. There are no
networks, files or Ray here.
"""

import colorsys
import math

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

Image = npt.NDArray[np.uint8]
Map = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]

_MAX_ASPECT = 4
_PUBLISHED_PATCHES = 30
_GOLDEN = (math.sqrt(5) - 1) / 2
_BRIGHTEST, _LEAST_CONTRAST = 0.99, 3
_LIGHTNESS = (0.56, 0.38, 0.76)


def mass_mask(attention: Map, mass: float = 0.6) -> Mask:
    """Return the fewest patches that hold `mass` (0 to 1) of each head's attention: bool [heads,h,w].

    Among patches of equal attention the first in row order is taken first. The mask is empty for a head whose
    attention is zero everywhere or not finite.
    """
    flat = np.asarray(attention, np.float64).reshape(len(attention), -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    held = np.cumsum(np.take_along_axis(flat, order, axis=1), axis=1)
    total = held[:, -1:]
    # Patch k is needed if the patches before it hold too little.
    before = np.concatenate([np.zeros_like(total), held[:, :-1]], axis=1)
    needed = before < mass * total
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, needed & np.isfinite(total), axis=1)
    return mask.reshape(attention.shape)


def default_image_size(global_crop_size: int, patch: int) -> int:
    """Return the shorter side in pixels for attention maps: 480 for patches of 16 on crops of 224.

    480 pixels, as published, are 30 patches. The result is kept within two to four global crops. A coarser
    map cannot be read, and a network works worse the farther the size is from its training size.
    """
    return min(max(_PUBLISHED_PATCHES * patch, 2 * global_crop_size), 4 * global_crop_size)


def fit_image(image: Image, short_side: int) -> Image:
    """Resize the shorter side to `short_side` pixels, aspect kept; limit the longer side to 4 times that."""
    height, width = image.shape[:2]
    scale = min(short_side / min(height, width), _MAX_ASPECT * short_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if image.shape[2] == 3:
        return np.array(Pillow.fromarray(image).resize(size, Pillow.Resampling.BICUBIC))
    channels = (Pillow.fromarray(one) for one in np.moveaxis(image, 2, 0))
    return np.stack([np.array(one.resize(size, Pillow.Resampling.BICUBIC)) for one in channels], axis=-1)


def upsample(maps: npt.NDArray, patch: int, size: tuple[int, int], *, smooth: bool) -> npt.NDArray:
    """Scale maps or masks of patches [heads,h,w] to pixels [heads,H,W] = [heads, *size], cut right and below.

    Sharp: every pixel has its patch's value. Smooth: bicubic and never below zero, for heat.
    """
    if not smooth:
        return maps.repeat(patch, axis=1).repeat(patch, axis=2)[:, : size[0], : size[1]]
    full = maps.shape[2] * patch, maps.shape[1] * patch
    pixels = [cv2.resize(m, full, interpolation=cv2.INTER_CUBIC) for m in maps.astype(np.float32)]
    return np.stack(pixels).clip(min=0)[:, : size[0], : size[1]]


def heat_colours(heat: Map) -> Image:
    """Return the colours of values, dark at 0 to bright at the 99th percentile and above: [H,W] -> [H,W,3].

    The scale does not run from minimum to maximum: uniform attention would look like noise, and a single
    bright patch could leave the rest dark. To keep uniform attention dark, bright is at least three times the
    mean.
    """
    return cv2.cvtColor(cv2.applyColorMap(_levels(heat), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def overlay(image: Image, heat: Map) -> Image:
    """Colour the image by heat [H,W]; areas without heat are dim and gray."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] * 0.6
    # Colours are nearly opaque from half the maximum on: more transparent colours look muddy on a photo.
    share = (_levels(heat)[..., None] / 255 * 1.6).clip(max=0.85)
    return (gray * (1 - share) + heat_colours(heat) * share).round().astype(np.uint8)


def masked_image(image: Image, mask: Mask) -> Image:
    """Return the image where `mask` [H,W] is true, dim and gray elsewhere."""
    gray = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] // 4, 3, axis=2)
    return np.where(mask[..., None], image, gray)


def head_colours(num_heads: int) -> list[tuple[int, int, int]]:
    """Return one colour per head: neighbours differ in hue, and every six heads the lightness changes."""
    return [
        tuple(  # type: ignore[misc]
            round(255 * part)
            for part in colorsys.hls_to_rgb((0.02 + head * _GOLDEN) % 1, _LIGHTNESS[head // 6 % 3], 0.85)
        )
        for head in range(num_heads)
    ]


def head_regions(attention: Map, masks: Mask) -> npt.NDArray[np.int64]:
    """Return for each patch the head whose mask contains it, -1 for none: [heads,h,w] -> [h,w].

    Among several heads, the head that gives the patch the largest share of its own attention wins.
    """
    values = np.asarray(attention, np.float64)
    total = values.sum(axis=(1, 2), keepdims=True)
    share = np.where(masks, values / np.where(total > 0, total, 1), -1)
    return np.where(masks.any(axis=0), share.argmax(axis=0), -1)


def coloured_heads(image: Image, regions: npt.NDArray[np.int64], num_heads: int) -> Image:
    """Return the image in gray, tinted in each head's colour where `regions` [H,W] names that head."""
    gray = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2).astype(np.float64)
    colours = np.array([*head_colours(num_heads), (0, 0, 0)], np.float64)[regions]
    tinted = np.where((regions >= 0)[..., None], 0.45 * gray + 0.55 * colours, 0.45 * gray)
    return tinted.round().astype(np.uint8)


def _levels(heat: Map) -> npt.NDArray[np.uint8]:
    if not np.isfinite(heat).all() or heat.max(initial=0) <= 0:
        return np.zeros(heat.shape, np.uint8)
    top = max(float(np.quantile(heat, _BRIGHTEST)), _LEAST_CONTRAST * float(heat.mean()))
    return (heat / top * 255).clip(0, 255).round().astype(np.uint8)
