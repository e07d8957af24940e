"""Open an image file: find its size, then decode it, a JPEG also at a fraction of its size.

Stands between the source and augment/multicrop.py. turbo.py decodes JPEGs in gray or YCbCr. decode.py decodes all
other files and those that turbo.py refuses, and its verdict is final. No crops, no storage and no Ray here.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import check_jpeg, decode
from dinoray.pipeline.data.decoding.orientation import orientation_of_jpeg, turn_upright
from dinoray.pipeline.data.decoding.turbo import decode_turbo, turbo_size

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Default size of the largest image that is decoded, in pixels."""
DENOMINATORS = (1, 2, 4, 8)
"""Denominators of the fractions at which a JPEG is decoded; their inverse transforms are fast."""

_DEFAULTS = PixelsConfig()
_MIRRORED_X, _MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations whose upright picture starts with the last pixels of the stored picture, in x or in y."""


class Decoded(NamedTuple):
    """A picture, uint8 [H,W,C]. A pixel x of the whole image lies at x / denominator + shift."""

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
        pixels = decode_turbo(self.data, width, height, denominator, memory)
        if pixels is None or self.orientation == 1:
            return None if pixels is None else Decoded(pixels, denominator, 0.0, 0.0)
        pixels = turn_upright(pixels, self.orientation)
        # The last column of a reduced picture may cover fewer pixels than the others. Mirroring puts it
        # first.
        left_shift = pixels.shape[1] - self.width / denominator if self.orientation in _MIRRORED_X else 0.0
        top_shift = pixels.shape[0] - self.height / denominator if self.orientation in _MIRRORED_Y else 0.0
        return Decoded(pixels, denominator, left_shift, top_shift)


def open_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = 1, config: PixelsConfig = _DEFAULTS
) -> Encoded:
    """Find the size of an image file, from its header if possible. Raises BadImage as `decode` does."""
    size = turbo_size(data) if config.channels == 3 else None
    if size is not None:
        check_jpeg(data, size, max_pixels=max_pixels, min_side=min_side)
        orientation = orientation_of_jpeg(data)
        width, height = size[::-1] if orientation >= 5 else size
        return Encoded(data, width, height, orientation, max_pixels, None)
    pixels = decode(data, max_pixels=max_pixels, min_side=min_side, config=config)
    return Encoded(data, pixels.shape[1], pixels.shape[0], 1, max_pixels, pixels)
