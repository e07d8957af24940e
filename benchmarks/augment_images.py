"""JPEG files in memory for benchmarks/augment.py: generated with a photograph's statistics, or from a folder.

A decoder's time depends on bits and pixels, the time of later stages on pixels alone. So a generated file has
the size, the chroma subsampling and the bits per pixel of a common kind of photograph. It also has the
statistics that cause such bits: overlapping objects, noise of equal energy in every octave (1/f) on them, and
little colour in the fine octaves.
"""

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinoray.models.errors import DataError

Rng = np.random.Generator


class Kind(NamedTuple):
    """Common properties of the files in a generated set."""

    width: int
    height: int
    subsampling: int
    """Numbers as in Pillow: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0."""
    bits_per_pixel: float


KINDS = {
    "0.2 MP": Kind(500, 375, 0, 4.5),
    "3 MP": Kind(2048, 1536, 2, 1.3),
    "6 MP": Kind(3008, 2000, 1, 2.5),
}
"""ImageNet's median; typical photographs on the web; photographs as written by a camera."""


def draw_photos(kind: Kind, count: int) -> list[bytes]:
    """Return JPEG files of `count` generated pictures, every other upright; the same for the same Pillow."""
    files = []
    for i in range(count):
        rng = np.random.default_rng([kind.width, kind.height, i])
        sides = (kind.width, kind.height) if i % 2 == 0 else (kind.height, kind.width)
        files.append(_encode(_draw(rng, *sides), kind))
    return files


def read_photos(folder: Path, count: int) -> tuple[list[bytes], int]:
    """Return the first `count` gray or RGB JPEG files below a folder, by name, and the number skipped.

    Raises DataError if there is none: only JPEG can be decoded at a fraction of its size, and by every peer.
    """
    files: list[bytes] = []
    others = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if _is_jpeg(data):
            files.append(data)
        else:
            others += 1
        if len(files) == count:
            break
    if not files:
        raise DataError(f"--images {folder}: no JPEG file in gray or RGB below it; check the path")
    return files, others


def num_pixels(file: bytes) -> int:
    """Return the number of pixels of an image file, from its header."""
    with Image.open(io.BytesIO(file)) as image:
        return image.width * image.height


def _is_jpeg(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8"):
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except OSError:
        return False
    return image.mode in ("L", "RGB")


def _draw(rng: Rng, width: int, height: int) -> NDArray[np.uint8]:
    """Return a picture, uint8 RGB [height,width,3]."""
    colours = np.zeros((height, width, 3), np.uint8)
    roughness = np.zeros((height, width), np.uint8)
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)])
    for i in range(80):
        outline = corners if i == 0 else _outline(rng, width, height)
        colour = rng.uniform(15, 240, 3)
        colour += 0.6 * (colour.mean() - colour)  # real scenes are grayish
        cv2.fillPoly(colours, [outline], colour.tolist(), cv2.LINE_AA)
        # Sky and out-of-focus areas are smooth; few areas are rough.
        cv2.fillPoly(roughness, [outline], 5 + 85 * rng.random() ** 2, cv2.LINE_AA)
    picture = colours.astype(np.float32)
    picture += (_octaves(rng, width, height, finest=0) * (roughness / np.float32(6)))[..., None]
    for channel in range(3):
        picture[..., channel] += 4 * _octaves(rng, width, height, finest=3)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _outline(rng: Rng, width: int, height: int) -> NDArray[np.int32]:
    """Return corners of a polygon or ellipse in pixels; small sizes are far more frequent than large ones."""
    corners = 40 if rng.random() < 0.5 else int(rng.integers(3, 9))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    if corners == 40:
        angles = np.linspace(0, 2 * np.pi, corners)
    axes = max(width, height) * 0.015 / rng.uniform(0.03, 1) * rng.uniform(0.3, 1, 2)
    around = np.stack([np.cos(angles), np.sin(angles)], axis=-1) * axes
    return (rng.uniform(0, (width, height)) + around).round().astype(np.int32)


def _octaves(rng: Rng, width: int, height: int, *, finest: int) -> NDArray[np.float32]:
    """Return 1/f noise, float32 [height,width]: equal white noise at every scale from 2**`finest` px on."""
    field = np.zeros((1, 1), np.float32)
    for octave in range(int(np.log2(min(width, height))), finest - 1, -1):
        size = (-(-width // 2**octave), -(-height // 2**octave))
        field = cv2.resize(field, size, interpolation=cv2.INTER_CUBIC)
        field += rng.standard_normal(field.shape, np.float32)
    return cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC)


def _encode(picture: NDArray[np.uint8], kind: Kind) -> bytes:
    """Return the file of the highest quality that stays within the kind's bits per pixel."""
    image = Image.fromarray(picture)
    low, high = 1, 100
    data = b""
    while low <= high:
        quality = (low + high) // 2
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling=kind.subsampling)
        if 8 * file.tell() <= kind.bits_per_pixel * picture.shape[0] * picture.shape[1]:
            data, low = file.getvalue(), quality + 1
        else:
            high = quality - 1
    return data or file.getvalue()
