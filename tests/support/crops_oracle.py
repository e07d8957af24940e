"""Slow, obvious twin of the kernels: PIL and torchvision apply the same parameters, op by op.

Also the pictures that both are tried on, and ways to ask a kernel for one crop.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torchvision.transforms.functional as F
from paths import SHARED
from PIL import Image, ImageFilter, ImageOps

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import crop_rng, cut
from dinoray.pipeline.augment.params import CropParams, OneCrop, sample
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.decoding.jpeg import Decoded

Pixels = npt.NDArray[np.uint8]

PHOTOS = SHARED / "photos-small" / "train" / "part-00000.parquet"

KERNELS = pytest.mark.parametrize("kernel", ["numba", "torch"])

PLAIN = OneCrop(0, 0, 1, 1, flip=False, jitter=(), gray=False, blur_sigma=None, solarize=None, size=96)
"""A crop whose pixels stay as they are."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def cut_one(image: Pixels | Decoded, crop: OneCrop, kernel: str, *, interpolation: str = "bicubic") -> Pixels:
    """One crop of a picture by one of the kernels, the same as global and as local crop."""
    picture = image if isinstance(image, Decoded) else Decoded(image, 1, 0.0, 0.0)
    config = CropsConfig(
        num_global_crops=1,
        num_local_crops=1,
        global_crop_size=crop.size,
        local_crop_size=crop.size,
        global_blur_prob=(0,),
        global_solarize_prob=(0,),
        interpolation=interpolation,
        kernel=kernel,
    )
    height, width = picture.pixels.shape[:2]
    params = CropParams(width * picture.denominator, height * picture.denominator, np.empty(0), config)
    crops = cut(picture, params.with_crops([crop, crop]))
    np.testing.assert_array_equal(crops.global_crops, crops.local_crops)
    return crops.global_crops[0]


def box_alone(crop: OneCrop) -> OneCrop:
    """The same region, its pixels left as they are."""
    return PLAIN._replace(**dict(zip(crop._fields[:4], crop[:4], strict=True)), size=crop.size)


def operate(image: Pixels, kernel: str, **what) -> Pixels:
    """A square picture after pixel operations alone: its crop is the whole of it at its own size."""
    side = len(image)
    return cut_one(image, PLAIN._replace(height=side, width=side, size=side, **what), kernel)


def oracle_crop(image: Pixels, params: OneCrop, *, interpolation: str = "bicubic") -> Pixels:
    """What DINO's augmentation makes of an image with these parameters."""
    crop = oracle_box(image, params, interpolation=interpolation)
    if params.flip:
        crop = F.hflip(crop)
    if params.vertical_flip:
        crop = F.vflip(crop)
    if params.quarter_turn:
        crop = crop.transpose(Image.Transpose.ROTATE_90)
    if params.stains is not None:
        crop = Image.fromarray(oracle_stains(np.asarray(crop), params.stains))
    for operation, factor in params.jitter:
        crop = oracle_colour(crop, operation, factor)
    if params.gray:
        crop = F.to_grayscale(crop, num_output_channels=3)
    if params.blur_sigma is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=params.blur_sigma))
    if params.solarize is not None:
        crop = ImageOps.solarize(crop, threshold=params.solarize)
    return np.asarray(crop)


def oracle_box(image: Pixels, params: OneCrop, *, interpolation: str = "bicubic") -> Image.Image:
    """The box, resized."""
    right, bottom = params.left + params.width, params.top + params.height
    # A box need not end at whole pixels; what lies beyond the pixels that it touches is not seen.
    left, top = math.floor(params.left), math.floor(params.top)
    region = Image.fromarray(image).crop(
        (left, top, min(math.ceil(right), image.shape[1]), min(math.ceil(bottom), image.shape[0]))
    )
    box = (
        params.left - left,
        params.top - top,
        min(right - left, region.width),
        min(bottom - top, region.height),
    )
    return region.resize((params.size, params.size), _FILTERS[interpolation], box=box)


def oracle_colour(crop: Image.Image, operation: str, factor: float) -> Image.Image:
    """One operation of the colour jitter."""
    if operation == "brightness":
        return F.adjust_brightness(crop, factor)
    if operation == "contrast":
        return F.adjust_contrast(crop, factor)
    if operation == "saturation":
        return F.adjust_saturation(crop, factor)
    assert operation == "hue"
    return F.adjust_hue(crop, factor)


def oracle_stains(crop: Pixels, changes: Sequence[float]) -> Pixels:
    """Deconvolution into hematoxylin, eosin and DAB as scikit-image's rgb2hed has it, but of logarithms to base 10,
    without setting negative amounts to 0; and back."""
    rgb_from_hed = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    densities = -np.log10(np.maximum(crop, 0.25) / 255)
    amounts = np.linalg.solve(rgb_from_hed.T, densities.reshape(-1, 3).T).T
    changed = amounts * changes[:3] + changes[3:]
    levels = 255 * 10 ** -(changed @ rgb_from_hed)
    return np.clip(levels.round(), 0, 255).astype(np.uint8).reshape(crop.shape)


@lru_cache
def drawn_pictures() -> list[Pixels]:
    """Twelve pictures with what photographs have: gradients, edges, texture, soft colours."""
    rng = np.random.default_rng(0)
    pictures = []
    for height, width in [(375, 500), (500, 375), (256, 256), (128, 171)] * 3:
        y, x = np.mgrid[:height, :width] / max(height, width)
        light = 90 + 90 * np.sin(2 * x + rng.uniform(0, 6)) * np.cos(3 * y + rng.uniform(0, 6))
        tint = 1 + 0.35 * np.stack([np.sin(3 * x + phase) for phase in rng.uniform(0, 6, 3)], axis=-1)
        picture = light[..., None] * tint
        for _ in range(6):
            top, left = rng.uniform(0, 0.7, 2)
            inside = (np.abs(y - top) < rng.uniform(0.03, 0.2)) & (np.abs(x - left) < rng.uniform(0.03, 0.2))
            picture[inside] = picture[inside] * 0.3 + rng.uniform(30, 170, 3)
        stripes = 10 * np.sin(90 * (x + y)) * (x > 0.5)
        texture = rng.normal(0, 6, (height, width, 1)) + stripes[..., None]
        pictures.append(np.clip(picture + texture, 0, 255).astype(np.uint8))
    return pictures


@lru_cache
def large_picture(width: int, height: int) -> Pixels:
    """A picture with detail of every size, as large as those of cameras."""
    rng, side = np.random.default_rng(0), max(width, height)
    picture = np.full((height, width, 3), 120, np.float32)
    cells = 4
    while cells < 2 * side:
        # The coarse layers differ between channels, the fine ones are light alone: as photographs are.
        shape = (1 + cells * height // side, 1 + cells * width // side, 3 if cells < 32 else 1)
        layer = rng.normal(0, 60 / cells**0.5 if cells < 32 else 100 / cells**0.45, shape).astype(np.float32)
        picture += cv2.resize(layer, (width, height)).reshape(height, width, -1)
        cells *= 2
    for _ in range(60):
        top, left = rng.integers(0, height), rng.integers(0, width)
        box = picture[top : top + rng.integers(9, height // 5), left : left + rng.integers(9, height // 5)]
        box *= 0.4
        box += rng.uniform(20, 140, 3).astype(np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def photo_files(number: int) -> list[bytes]:
    """JPEG files of photographs spread over the classes; none where the photographs are not at hand."""
    if not PHOTOS.exists():
        return []
    column = pq.read_table(PHOTOS, columns=["image"]).column("image")
    return [column[i].as_py() for i in range(0, len(column), len(column) // number)][:number]


def pictures() -> list[Pixels]:
    """The drawn pictures, and photographs where there are some."""
    return drawn_pictures() + [decode(file, max_pixels=1_000_000) for file in photo_files(40)]


@lru_cache
def replays() -> list[tuple[Pixels, OneCrop]]:
    """Every crop of every picture with the default settings: (image, parameters)."""
    return [
        (image, crop)
        for n, image in enumerate(pictures())
        for crop in sample(
            crop_rng(0, 0, f"picture {n}"), image.shape[1], image.shape[0], CropsConfig()
        ).crops
    ]


@lru_cache
def oracle_replays(interpolation: str) -> list[Pixels]:
    """The crops of `replays` as the oracle makes them."""
    return [oracle_crop(image, crop, interpolation=interpolation) for image, crop in replays()]


def error(ours: Pixels, theirs: Pixels | Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).mean())


def signal_to_noise(ours: Pixels, theirs: Pixels) -> float:
    """Peak signal to noise ratio in decibels; 78 and more count as equal."""
    squares = (ours.astype(int) - theirs.astype(int)) ** 2
    return 10 * math.log10(255**2 / max(squares.mean(), 1e-3))
