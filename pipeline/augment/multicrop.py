"""Multi-crop: one image -> a few large global crops and many small local crops (DINO, arXiv 2104.14294).

This module stands between the encoded image and the batch. params.py draws the parameters of each crop; this
file applies them and draws no random number. One of two kernels makes the pixels:
augment/kernels/numba_crops.py where numba is available, else augment/kernels/torch_crops.py. Everything is
uint8, height x width x channel; the device normalises later. There is no storage and no Ray here.

Axis letters: G global crops, L local crops, H W the image, S the side of a crop.
"""

import logging
import os
import sys
import threading
from functools import cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from dinoray.models.errors import ConfigError
from dinoray.pipeline.augment import jit
from dinoray.pipeline.augment.config import CropsConfig, crop_shapes
from dinoray.pipeline.augment.params import (
    LEFT,
    TOP,
    WIDTH,
    CropParams,
    first_outside,
    measure,
    sample,
    sample_image,
)
from dinoray.pipeline.augment.rng import crop_rng
from dinoray.pipeline.data.decoding.jpeg import DENOMINATORS, Decoded, Encoded, open_image

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]


class Crops(NamedTuple):
    """The crops of one image: uint8, globals [G,S,S,C] and locals [L,S,S,C]."""

    global_crops: Image
    local_crops: Image


def apply(image: bytes | Encoded, params: CropParams, *, out: Crops | None = None) -> Crops:
    """Make all crops of an image file, globals first, in `out` if it is given.

    The parameters refer to the upright size of the image, which `open_image(file)` returns as `width` and
    `height`. Raises BadImage if the image cannot be decoded, ValueError if the parameters belong to an image
    of another size.
    """
    encoded = image if isinstance(image, Encoded) else open_image(image)
    return cut(decode_for(params, encoded), params, out)


def decode_for(params: CropParams, image: Encoded) -> Decoded:
    """Decode as much of an image as its crops need; raise the same errors as `apply`.

    A JPEG is decoded at a fraction of its size if every region keeps `decode_slack` pixels per pixel of its
    crop's side. The pixels are valid until this thread decodes its next image.
    """
    if (image.width, image.height) != (params.width, params.height):
        raise ValueError(
            f"params are for an image of {params.width}x{params.height} pixels, not {image.width}x{image.height}"
        )
    return image.decode(decode_denominator(params), _picture_memory)


def cut(picture: Decoded, params: CropParams, out: Crops | None = None) -> Crops:
    """Make all crops of a decoded image, in `out` if it is given.

    Raises ValueError if the picture, the parameters and `out` do not match: the compiled kernel would
    otherwise read and write out of bounds.
    """
    c = params.config
    if out is None:
        out = Crops(*(np.empty(shape, np.uint8) for shape in crop_shapes(c)))
    _check(picture, params, out)
    if kernel_name(c) == "torch":
        # Imported here because it needs torch: some hundred MB that the other kernel does not use.
        from dinoray.pipeline.augment.kernels import torch_crops

        torch_crops.cut(picture, params, out)
    else:
        _cut_numba(picture, params, out)
    return out


def _check(picture: Decoded, params: CropParams, out: Crops) -> None:
    pixels, c = picture.pixels, params.config
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != c.channels:
        raise ValueError(
            f"a picture must be uint8 [H,W,{c.channels}], not {pixels.dtype} {list(pixels.shape)}"
        )
    height, width = pixels.shape[:2]
    if (width, height) != tuple(-(-side // picture.denominator) for side in (params.width, params.height)):
        raise ValueError(
            f"params are for an image of {params.width}x{params.height} pixels, not for 1/{picture.denominator} of it "
            f"in {width}x{height}"
        )
    for array, shape in zip(out, crop_shapes(c), strict=True):
        if array.dtype != np.uint8 or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(
                f"out must be uint8 {list(shape)} in one piece, not {array.dtype} {list(array.shape)}"
            )
    sizes = c.global_crop_size, c.local_crop_size
    if len(params.table) != c.num_global_crops + c.num_local_crops:
        raise ValueError(f"params hold {len(params.table)} crops for a config of {len(out[0]) + len(out[1])}")
    wrong = first_outside(params.table, params.width, params.height, c.num_global_crops, *sizes)
    if wrong >= 0:
        raise ValueError(
            f"params.crops[{wrong}] must lie inside {params.width}x{params.height} pixels, at least one pixel large, "
            f"and have its config's size: {params.crops[wrong]}"
        )


def multi_crop(image: Image, rng: np.random.Generator, config: CropsConfig) -> Crops:
    """Draw the parameters for a picture (uint8 [H,W,C], C-contiguous, at least 1x1), and make its crops."""
    height, width = image.shape[:2]
    return cut(Decoded(image, 1, 0.0, 0.0), sample(rng, width, height, config))


def decode_denominator(params: CropParams) -> int:
    """Return the largest of 1, 2, 4 and 8 that leaves `decode_slack` region pixels per pixel of crop side."""
    least = measure(params.table)[0] / params.config.decode_slack
    return max((d for d in DENOMINATORS if d <= least), default=1)


def kernel_name(config: CropsConfig) -> str:
    """Return the kernel in effect, numba or torch; raise ConfigError if numba is required but unavailable."""
    if config.kernel == "numba" and jit.MISSING:
        raise ConfigError(
            f"crops.kernel=numba, but numba cannot be used ({jit.MISSING}); install it, or set crops.kernel=torch"
        )
    return "torch" if config.kernel == "torch" or jit.MISSING else "numba"


def prepare_kernel(config: CropsConfig) -> None:
    """Compile or load the kernel and log its name. The first image then costs no more than later images."""
    if kernel_name(config) == "torch":
        why = f": no numba ({jit.MISSING})" if config.kernel == "auto" else ""
        logger.info("crops are made by the torch kernel%s", why)
        return
    with jit.one_at_a_time():
        multi_crop(np.zeros((32, 32, config.channels), np.uint8), crop_rng(0, 0, ""), config)
        sample_image(0, 0, "", 32, 32, config)  # the stream draws the same parameters through this function
    logger.info("crops are made by the numba kernel")


def limit_threads() -> None:
    """Give OpenCV and torch one thread each in this process: the augment actors provide the parallelism."""
    cv2.setNumThreads(0)
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads this if it is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _cut_numba(picture: Decoded, params: CropParams, out: Crops) -> None:
    """Make the crops of three channels at a time, as the kernel does; where some are missing, the last is repeated."""
    channels = picture.pixels.shape[2]
    if channels == 3:
        _cut_three(picture, params, out, is_rgb=True)
        return
    for first in range(0, channels, 3):
        places = [min(first + i, channels - 1) for i in range(3)]
        three = picture._replace(pixels=np.ascontiguousarray(picture.pixels[..., places]))
        made = Crops(*(np.empty((*array.shape[:-1], 3), np.uint8) for array in out))
        _cut_three(three, params, made, is_rgb=False)
        for target, source in zip(out, made, strict=True):
            target[..., first : first + 3] = source[..., : channels - first]


def _cut_three(picture: Decoded, params: CropParams, out: Crops, *, is_rgb: bool) -> None:
    numba_crops, scratch = _crop_kernel(), _scratch()
    height, width = picture.pixels.shape[:2]
    num_bytes = picture.pixels.nbytes
    flat = scratch.bytes("picture", num_bytes + numba_crops.SLACK)
    if picture.pixels.ctypes.data != flat.ctypes.data:
        flat[:num_bytes] = picture.pixels.ravel()  # with readable bytes behind it
    table = params.table
    if picture.denominator > 1:
        table = table.copy()
        table[:, TOP : WIDTH + 1] /= picture.denominator
        table[:, TOP] += picture.top_shift
        table[:, LEFT] += picture.left_shift
    bilinear = params.config.interpolation == "bilinear"
    numba_crops.crop_all(
        flat,
        height,
        width,
        table,
        bilinear,
        is_rgb,
        len(out.global_crops),
        out.global_crops,
        out.local_crops,
        *scratch.for_crops(width, table, 1.0 if bilinear else 2.0),
    )


@cache
def _crop_kernel() -> Any:
    from dinoray.pipeline.augment.kernels import numba_crops  # imported here because it needs numba

    return numba_crops


_of_this_thread = threading.local()


def _scratch() -> Any:
    """Return this thread's memory for the kernel."""
    if not hasattr(_of_this_thread, "scratch"):
        _of_this_thread.scratch = _crop_kernel().Scratch()
    return _of_this_thread.scratch


def _picture_memory(num_bytes: int) -> Image:
    """Return the memory into which this thread decodes its next picture."""
    if jit.MISSING:
        return np.empty(num_bytes, np.uint8)
    return _scratch().bytes("picture", num_bytes + _crop_kernel().SLACK)
