"""Image files of every format, made on the spot, and what Pillow sees in them."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, features

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 50_000_000


def picture() -> Pixels:
    """A small picture that no flip or turn leaves the same: uint8 [40,56,3]."""
    y, x = np.mgrid[:40, :56]
    texture = np.random.default_rng(0).normal(0, 8, (40, 56, 1))
    return np.clip(np.stack([4 * x, 3 * y + x, 180 - 2 * y], axis=-1) + texture, 0, 255).astype(np.uint8)


def encode(image: Image.Image | Pixels, image_format: str, **options) -> bytes:
    """The bytes of a file."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pillow(data: bytes) -> Pixels:
    """The picture as Pillow alone decodes it, upright."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


FILES = {
    "jpeg": encode(picture(), "JPEG", quality=90),
    "progressive jpeg": encode(picture(), "JPEG", progressive=True),
    "gray jpeg": encode(Image.fromarray(picture()).convert("L"), "JPEG"),
    "cmyk jpeg": encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95),
    "png": encode(picture(), "PNG"),
    "palette png": encode(Image.fromarray(picture()).quantize(200), "PNG"),
    "1-bit png": encode(Image.fromarray(picture()).convert("1"), "PNG"),
    "webp": encode(picture(), "WEBP"),
    "lossless webp": encode(picture(), "WEBP", lossless=True),
    "bmp": encode(picture(), "BMP"),
    "palette bmp": encode(Image.fromarray(picture()).quantize(200), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "lzw tiff": encode(picture(), "TIFF", compression="tiff_lzw"),
    "gif": encode(picture(), "GIF"),
    "jpeg 2000": encode(picture(), "JPEG2000"),
    "ppm": encode(picture(), "PPM"),
}
if features.check("avif"):
    FILES["avif"] = encode(picture(), "AVIF")


def scene(width: int, height: int) -> Image.Image:
    """A picture with edges, slopes and some grain, that no flip or turn leaves the same."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    rings = 60 * np.sign(np.sin(25 * np.hypot(x - 0.3, y - 0.2)))
    grain = np.random.default_rng(0).normal(0, 6, (height, width))
    planes = [140 + rings + grain - 90 * y, 110 + 120 * x - rings / 2 + grain, 60 + 150 * y + grain]
    return Image.fromarray(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return encode(image, "JPEG", **{"quality": 95, **options})
