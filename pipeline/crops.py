"""Multi-crop: one image -> a few large global crops and many small local ones (DINO, arXiv 2104.14294).

Stands between decode.py and the batch. crop_params.py draws what happens to each crop, this file does it, and
no random number is drawn while it does. Everything is uint8 RGB, height x width x channel; normalisation is
the device's. Knows nothing of files, storage or Ray.

Axis letters: G global crops, L local crops, H W the image, S the side of a crop.
"""

import hashlib
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from pipeline import colour
from pipeline.colour import Image
from pipeline.crop_params import CropParams, CropsConfig, crop_kinds, sample_crops


class Crops(NamedTuple):
    """The crops of one image: uint8 RGB, globals [G,S,S,3] and locals [L,S,S,3]."""

    global_crops: Image
    local_crops: Image


def crop_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Random numbers for one image in one epoch: a function of the arguments alone, on any machine."""
    # surrogatepass: the name of a local file need not be valid text.
    text = f"{seed}/{epoch}/{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def multi_crop(image: Image, rng: np.random.Generator, config: CropsConfig) -> Crops:
    """Cut all crops of one image (uint8 [H,W,3], C-contiguous, at least 1x1), globals first."""
    crops = Crops(
        np.empty((config.num_global_crops, config.global_crop_size, config.global_crop_size, 3), np.uint8),
        np.empty((config.num_local_crops, config.local_crop_size, config.local_crop_size, 3), np.uint8),
    )
    height, width = image.shape[:2]
    for out, params in zip(
        [*crops.global_crops, *crops.local_crops], sample_crops(rng, width, height, config), strict=True
    ):
        out[:] = apply_crop(image, params, size=len(out), solarize_threshold=config.solarize_threshold)
    return crops


_JITTER = {
    "brightness": colour.adjust_brightness,
    "contrast": colour.adjust_contrast,
    "saturation": colour.adjust_saturation,
    "hue": colour.adjust_hue,
}


def apply_crop(image: Image, params: CropParams, *, size: int, solarize_threshold: int = 128) -> Image:
    """Make one crop, uint8 [size,size,3], of an image (uint8 [H,W,3], C-contiguous) that stays as it is."""
    crop = resize_box(image, params, size=size)
    if params.flip:
        crop = cv2.flip(crop, 1)
    for operation, factor in params.jitter:
        crop = _JITTER[operation](crop, factor)
    if params.gray:
        crop = colour.to_grayscale(crop)
    if params.blur_sigma is not None:
        crop = colour.blur(crop, params.blur_sigma)
    if params.solarize:
        crop = colour.solarize(crop, solarize_threshold)
    return crop


def resize_box(image: Image, params: CropParams, *, size: int) -> Image:
    """Cut the box out and resize it to `size` x `size`, bicubic with antialiasing as PIL does it.

    Not by OpenCV: its bicubic filter does not widen when it shrinks, and local crops would alias.
    """
    rows = slice(params.top, params.top + params.height)
    columns = slice(params.left, params.left + params.width)
    # A view whose memory is channels-last: torch then takes its fast uint8 path, and nothing is transposed.
    region = torch.from_numpy(image)[rows, columns].permute(2, 0, 1)[None]
    resized = F.interpolate(region, size=(size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def crop_bytes(config: CropsConfig) -> int:
    """Bytes that the crops of one image take."""
    return sum(3 * kind.size**2 for kind in crop_kinds(config))


def describe_crops(config: CropsConfig) -> str:
    """Lay out the settings in effect: a row per global crop, one for the local crops, then the strengths."""
    kinds = crop_kinds(config)
    global_kinds, local_kinds = kinds[: config.num_global_crops], kinds[config.num_global_crops :]
    rows: list[tuple[str, ...]] = [("crop", "size", "scale", "flip", "jitter", "gray", "blur", "solarize")]
    for kind in global_kinds + local_kinds[:1]:
        name = kind.name if kind in global_kinds or len(local_kinds) == 1 else f"local 1-{len(local_kinds)}"
        probabilities = (
            config.flip_prob,
            config.jitter_prob,
            config.gray_prob,
            kind.blur_prob,
            kind.solarize_prob,
        )
        scale = "{:g} to {:g}".format(*kind.scale)
        rows.append((name, f"{kind.size} px", scale, *(f"{p:g}" for p in probabilities)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines += [
        f"jitter, in random order: brightness {config.brightness:g}, contrast {config.contrast:g}, "
        f"saturation {config.saturation:g}, hue {config.hue:g}",
        "aspect ratio {:.3g} to {:.3g}, ".format(*config.aspect_ratio)
        + "blur sigma {:g} to {:g} px, ".format(*config.blur_sigma)
        + f"solarize from {config.solarize_threshold}, {crop_bytes(config):,} bytes an image",
    ]
    return "\n".join(lines)


def limit_threads() -> None:
    """Give this process one thread for OpenCV and one for torch: augment actors are the parallelism."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
