"""Slow, obvious twin of the kernels: PIL and torchvision apply the same parameters, op by op.

Also the pictures that both are tried on.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from pipeline.crop_params import OneCrop, sample
from pipeline.crops import crop_rng
from pipeline.crops_config import CropsConfig
from pipeline.decode import decode

Pixels = npt.NDArray[np.uint8]

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos-small" / "train" / "part-00000.parquet"


def oracle_crop(image: Pixels, params: OneCrop) -> Pixels:
    """What DINO's augmentation makes of an image with these parameters."""
    crop = oracle_box(image, params)
    if params.flip:
        crop = F.hflip(crop)
    for operation, factor in params.jitter:
        crop = oracle_colour(crop, operation, factor)
    if params.gray:
        crop = F.to_grayscale(crop, num_output_channels=3)
    if params.blur_sigma is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(radius=params.blur_sigma))
    if params.solarize is not None:
        crop = ImageOps.solarize(crop, threshold=params.solarize)
    return np.asarray(crop)


def oracle_box(image: Pixels, params: OneCrop) -> Image.Image:
    """The box, resized."""
    right, bottom = params.left + params.width, params.top + params.height
    region = Image.fromarray(image).crop((params.left, params.top, right, bottom))
    return region.resize((params.size, params.size), Image.Resampling.BICUBIC)


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


def error(ours: Pixels, theirs: Pixels | Image.Image) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).mean())
