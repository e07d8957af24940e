"""Measure one decoded image: its format, size and range of values, and what tells whether another one is the same.

Used where a data set is looked into: by `jobs.pack` for each image, by `jobs.doctor` for a sample. No storage and no
Ray here.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import is_deep, open_array, read_samples
from dinoray.pipeline.data.decoding.jpeg import DENOMINATORS, Decoded, Encoded, Pixels, open_image
from dinoray.pipeline.data.decoding.npy import is_npy
from dinoray.pipeline.data.decoding.pillow import open_pillow
from dinoray.pipeline.data.decoding.samples import as_rgb, to_pixels
from dinoray.pipeline.data.decoding.tiff import channels_in_words, is_pillows
from dinoray.pipeline.data.decoding.tiff_pages import is_tiff, read_pages

SMALL_SIDE, SMALL_BYTES = 8, 192
"""Side in pixels, and bytes, of the RGB picture by which two images with similar hashes are compared."""
_DEFAULTS = PixelsConfig()
_DIGEST_BYTES = 16
_LEAST_SIDE = 32
"""Pixels of the shorter side of a picture that is measured, unless the image has fewer."""
_MODES = {
    "1": "black and white",
    "L": "gray, 8 bits",
    "LA": "gray and alpha, 8 bits",
    "P": "palette",
    "RGB": "RGB, 8 bits",
    "RGBA": "RGB and alpha, 8 bits",
    "CMYK": "CMYK, 8 bits",
    "I;16": "gray, 16 bits",
    "I;16B": "gray, 16 bits",
}


class ImageFacts(NamedTuple):
    """What one image is. `low`, `high` and `mean` are of its values at the size at which it was decoded."""

    format: str
    channels: str
    """Channels and depth of the file, for people."""
    width: int
    height: int
    num_bytes: int
    low: float
    high: float
    mean: float
    digest: bytes
    """BLAKE2b of the file, 16 bytes: the same for the same bytes alone."""
    difference_hash: int
    """64 bits: whether each cell of a grid of 9 x 8 is darker than its right neighbour. The same picture in another
    file, or at another size, has nearly the same."""
    small: bytes
    """The picture as uint8 RGB [8,8,3]."""


SCHEMA = pa.schema(
    {
        "format": pa.string(),
        "channels": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "num_bytes": pa.int64(),
        "low": pa.float32(),
        "high": pa.float32(),
        "mean": pa.float32(),
        "digest": pa.binary(_DIGEST_BYTES),
        "difference_hash": pa.uint64(),
        "small": pa.binary(SMALL_BYTES),
    }
)
"""Columns of a table of ImageFacts."""


def open_any(data: bytes, *, max_pixels: int, config: PixelsConfig = _DEFAULTS) -> Encoded:
    """As `open_image`, but the samples of an image of more than 8 bits are shown in their own range, not in a run's."""
    if not is_deep(data):
        return open_image(data, max_pixels=max_pixels, config=config)
    samples = read_samples(data, max_pixels=max_pixels, config=config)
    values = samples.values[np.isfinite(samples.values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    shown = config.model_copy(update={"value_range": (low, high if high > low else low + 1)})
    pixels = to_pixels(samples, shown)
    return Encoded(data, pixels.shape[1], pixels.shape[0], 1, max_pixels, pixels)


def decode_whole(image: Encoded, *, most: float = DENOMINATORS[-1]) -> Decoded:
    """Return the picture, of a JPEG at the least size that `measure_image` takes, or that `most` allows.

    That is the cheapest check which reads the whole file: only the transform of the pixels gets cheaper with the size.
    Raises BadImage unless the file is a whole image.
    """
    most = min(most, min(image.width, image.height) / _LEAST_SIDE)
    denominator = max((d for d in DENOMINATORS if d <= most), default=1)
    return image.decode(denominator, lambda num_bytes: np.empty(num_bytes, np.uint8))


def picture_box(image: Encoded, picture: Decoded) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the whole image in a reduced picture, whose last pixels may cover less."""
    left, top = picture.left_shift, picture.top_shift
    return left, top, left + image.width / picture.denominator, top + image.height / picture.denominator


def measure_image(image: Encoded, picture: Decoded) -> ImageFacts:
    """Return the facts of an opened image, of which `picture` is its picture at any size."""
    pixels = picture.pixels
    kind, channels = _header(image.data, pixels)
    whole, box = Image.fromarray(as_rgb(pixels)), picture_box(image, picture)
    small = whole.resize((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BILINEAR, box)
    grid = np.asarray(whole.resize((9, 8), Image.Resampling.BILINEAR, box), np.int32).sum(axis=2)
    bits = np.packbits(grid[:, :-1] < grid[:, 1:])
    return ImageFacts(
        kind,
        channels,
        image.width,
        image.height,
        len(image.data),
        float(pixels.min()),
        float(pixels.max()),
        float(pixels.mean()),
        hashlib.blake2b(image.data, digest_size=_DIGEST_BYTES).digest(),
        int.from_bytes(bits.tobytes(), "big"),
        small.tobytes(),
    )


def facts_table(facts: Sequence[ImageFacts]) -> pa.Table:
    """Return a table of one row for each image, of SCHEMA."""
    columns: Any = zip(*facts, strict=True) if facts else ((),) * len(SCHEMA)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.table(arrays, schema=SCHEMA)


def _header(data: bytes, pixels: Pixels) -> tuple[str, str]:
    """Return the format and the channels of a file; those of its pixels if Pillow does not read its header."""
    if (array := open_array(data)) is not None:
        kind = "NPY" if is_npy(data) else "PAM"
        return kind, f"{channels_in_words(array.values.shape[2])}, {array.values.dtype}"
    if is_tiff(data) and not is_pillows(page := read_pages(data)[0]):
        return "TIFF", f"{channels_in_words(page.num_channels)}, {page.bits} bits"
    try:
        header = open_pillow(data)
    except BadImage:
        return "other", channels_in_words(pixels.shape[2])
    return header.format or "other", _MODES.get(header.mode, header.mode)
