"""An image file whose size is known, and which can be decoded at a fraction of it.

Stands between the source and crops.py. A JPEG in gray or YCbCr goes to simplejpeg, which skips what a smaller
picture does not need and writes into memory that is there; what it refuses, and every other file, goes to
decode.py, which has the last word. Knows nothing of crops, storage or Ray.
"""

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.decode import check_size, decode

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: OpenCV decodes JPEGs then, at full size
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]

DENOMINATORS = (1, 2, 4, 8)
"""Fractions of its size at which a JPEG is decoded: the ones whose inverse transforms are fast."""

_EXIF, _ORIENTATION = b"Exif\0\0", 0x0112
# EXIF orientation -> what makes the stored picture upright, and whether its width or height are then mirrored.
_ROTATIONS: dict[int, tuple[Callable[[Any], Any], tuple[bool, bool]]] = {
    2: (lambda p: cv2.flip(p, 1), (True, False)),
    3: (lambda p: cv2.rotate(p, cv2.ROTATE_180), (True, True)),
    4: (lambda p: cv2.flip(p, 0), (False, True)),
    5: (cv2.transpose, (False, False)),
    6: (lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE), (True, False)),
    7: (lambda p: cv2.rotate(cv2.transpose(p), cv2.ROTATE_180), (True, True)),
    8: (lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE), (False, True)),
}


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
        return Decoded(decode(self.data, max_pixels=self.max_pixels), 1, 0.0, 0.0)

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
        turn, (mirrored_x, mirrored_y) = _ROTATIONS[self.orientation]
        pixels = np.ascontiguousarray(turn(pixels))
        # The last column of a reduced picture may stand for fewer pixels than the others. Mirrored, it comes first.
        left_shift = pixels.shape[1] - self.width / denominator if mirrored_x else 0.0
        top_shift = pixels.shape[0] - self.height / denominator if mirrored_y else 0.0
        return Decoded(pixels, denominator, left_shift, top_shift)


def open_image(data: bytes, *, max_pixels: int, min_side: int = 1) -> Encoded:
    """Find the size of an image file, from its header where that is enough. Raises BadImage as `decode` does."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            space = ""  # decode() says what is wrong with it
        if space in ("YCbCr", "Gray"):
            check_size(width, height, max_pixels=max_pixels, min_side=min_side)
            orientation = _orientation(data)
            if orientation >= 5:
                width, height = height, width
            return Encoded(data, width, height, orientation, max_pixels, None)
    pixels = decode(data, max_pixels=max_pixels, min_side=min_side)
    return Encoded(data, pixels.shape[1], pixels.shape[0], 1, max_pixels, pixels)


def _orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG, 1 to 8; 1 where nothing sensible is said."""
    if not _has_exif(data):
        return 1
    try:
        orientation = Image.open(io.BytesIO(data), formats=("JPEG", "MPO")).getexif().get(_ORIENTATION, 1)
    # A damaged EXIF block says nothing about the pixels: they stay as they lie.
    except Exception:
        return 1
    return orientation if orientation in _ROTATIONS else 1


def _has_exif(data: bytes) -> bool:
    """Whether a segment before a JPEG's pixels is EXIF: most files have none, and Pillow takes its time to say so."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:  # the pixels
            return False
        if marker == 0xFF:  # filling
            place += 1
            continue
        if data.startswith(_EXIF, place + 4):
            return True
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False
