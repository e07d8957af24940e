"""Open an image file: find its size, then decode it, a JPEG also at a fraction of its size.

Stands between the source and augment/multicrop.py. simplejpeg decodes JPEGs in gray or YCbCr: it skips the
work that a smaller picture does not need and writes into existing memory. decode.py decodes all other files
and those that simplejpeg refuses, and its verdict is final. No crops, no storage and no Ray here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.data.bad_image import BadImage
from dinoray.pipeline.data.decode import check_scans, check_size, decode, jpeg_orientation, turn_upright

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: OpenCV then decodes JPEGs, at full size
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Default size of the largest image that is decoded, in pixels."""
DENOMINATORS = (1, 2, 4, 8)
"""Denominators of the fractions at which a JPEG is decoded; their inverse transforms are fast."""

_MIRRORED_X, _MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations whose upright picture starts with the last pixels of the stored picture, in x or in y."""


class Decoded(NamedTuple):
    """A picture, uint8 RGB [H,W,3]. A pixel x of the whole image lies at x / denominator + shift."""

    pixels: Pixels
    denominator: int
    left_shift: float
    top_shift: float


class Encoded(NamedTuple):
    """An image file; `width` and `height` are of the upright picture.

    `pixels` is None only for a JPEG that can be decoded at a fraction of its size; other files are decoded
    already.
    """

    data: bytes
    width: int
    height: int
    orientation: int
    max_pixels: int
    pixels: Pixels | None

    def decode(self, denominator: int, memory: Callable[[int], Pixels]) -> Decoded:
        """Decode upright and C-contiguous, at 1/`denominator` of the size if the file allows it.

        `memory` returns a flat array of at least the given number of bytes; the result may be a view of it.
        Raises BadImage if the file is not a whole image.
        """
        if self.pixels is not None:
            return Decoded(self.pixels, 1, 0.0, 0.0)
        decoded = self._decode_jpeg(denominator, memory)
        if decoded is not None:
            return decoded
        pixels = decode(self.data, max_pixels=self.max_pixels)
        if pixels.shape[:2] != (self.height, self.width):  # the kernels trust the size
            height, width = pixels.shape[:2]
            raise BadImage(
                f"damaged JPEG: {self.width}x{self.height} pixels announced, {width}x{height} decoded"
            )
        return Decoded(pixels, 1, 0.0, 0.0)

    def _decode_jpeg(self, denominator: int, memory: Callable[[int], Pixels]) -> Decoded | None:
        width, height = (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)
        small_width, small_height = -(-width // denominator), -(-height // denominator)
        try:
            pixels = simplejpeg.decode_jpeg(
                self.data,
                "RGB",
                min_width=small_width,
                min_height=small_height,
                buffer=memory(3 * small_width * small_height),
            )
        except ValueError:
            return None  # decode() then finds out if the file is damaged, and why
        if pixels.shape != (small_height, small_width, 3):
            return None
        if self.orientation == 1:
            return Decoded(pixels, denominator, 0.0, 0.0)
        pixels = turn_upright(pixels, self.orientation)
        # The last column of a reduced picture may cover fewer pixels than the others. Mirroring puts it
        # first.
        left_shift = pixels.shape[1] - self.width / denominator if self.orientation in _MIRRORED_X else 0.0
        top_shift = pixels.shape[0] - self.height / denominator if self.orientation in _MIRRORED_Y else 0.0
        return Decoded(pixels, denominator, left_shift, top_shift)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = 1) -> Encoded:
    """Find the size of an image file, from its header if possible. Raises BadImage as `decode` does."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            space = ""  # decode() then raises the reason
        if space in ("YCbCr", "Gray"):
            check_size(width, height, max_pixels=max_pixels, min_side=min_side)
            check_scans(data, width, height)
            orientation = jpeg_orientation(data)
            if orientation >= 5:
                width, height = height, width
            return Encoded(data, width, height, orientation, max_pixels, None)
    pixels = decode(data, max_pixels=max_pixels, min_side=min_side)
    return Encoded(data, pixels.shape[1], pixels.shape[0], 1, max_pixels, pixels)
