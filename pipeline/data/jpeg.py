"""An image file whose size is known, and which can be decoded at a fraction of it.

Stands between the source and augment/multicrop.py. A JPEG in gray or YCbCr goes to simplejpeg, which skips what a
smaller picture does not need and writes into memory that is there; what it refuses, and every other file, goes to
decode.py, which has the last word. Knows nothing of crops, storage or Ray.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.decode import BadImage, check_size, decode, jpeg_orientation, turn_upright

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: OpenCV decodes JPEGs then, at full size
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 100_000_000
"""Largest image that is decoded unless another number is given."""
DENOMINATORS = (1, 2, 4, 8)
"""Fractions of its size at which a JPEG is decoded: the ones whose inverse transforms are fast."""

_MIRRORED_X, _MIRRORED_Y = (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations whose upright picture has the stored one's last pixels first, in x or in y."""


class Decoded(NamedTuple):
    """A picture, uint8 RGB [H,W,3], and where the pixels of the whole image lie in it: x / denominator + shift."""

    pixels: Pixels
    denominator: int
    left_shift: float
    top_shift: float


class Encoded(NamedTuple):
    """An image file; `width` and `height` are those of the upright picture.

    `pixels` is there already unless the file is a JPEG that can be decoded at a fraction of its size.
    """

    data: bytes
    width: int
    height: int
    orientation: int
    max_pixels: int
    pixels: Pixels | None

    def decode(self, denominator: int, memory: Callable[[int], Pixels]) -> Decoded:
        """Decode at 1/`denominator` where the file allows it, upright, C-contiguous.

        `memory` gives a flat array of at least that many bytes, in which the pixels may lie afterwards. Raises
        BadImage for what is not a whole image.
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
            return None  # decode() says whether that is damage, and why
        if pixels.shape != (small_height, small_width, 3):
            return None
        if self.orientation == 1:
            return Decoded(pixels, denominator, 0.0, 0.0)
        pixels = turn_upright(pixels, self.orientation)
        # The last column of a reduced picture may stand for fewer pixels than the others. Mirrored, it comes first.
        left_shift = pixels.shape[1] - self.width / denominator if self.orientation in _MIRRORED_X else 0.0
        top_shift = pixels.shape[0] - self.height / denominator if self.orientation in _MIRRORED_Y else 0.0
        return Decoded(pixels, denominator, left_shift, top_shift)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int = 1) -> Encoded:
    """Find the size of an image file, from its header where that is enough. Raises BadImage as `decode` does."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            space = ""  # decode() says what is wrong with it
        if space in ("YCbCr", "Gray"):
            check_size(width, height, max_pixels=max_pixels, min_side=min_side)
            orientation = jpeg_orientation(data)
            if orientation >= 5:
                width, height = height, width
            return Encoded(data, width, height, orientation, max_pixels, None)
    pixels = decode(data, max_pixels=max_pixels, min_side=min_side)
    return Encoded(data, pixels.shape[1], pixels.shape[0], 1, max_pixels, pixels)
