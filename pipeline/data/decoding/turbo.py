"""Decode JPEGs in gray or YCbCr with simplejpeg, also at a fraction of their size; no Ray here.

It skips the work that a smaller picture does not need, writes into existing memory, and refuses whatever libjpeg
warns of: decode.py then decides whether that is damage.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow then decodes JPEGs, at full size
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]


def turbo_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG that `decode_turbo` may decode; None for any other file."""
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if space in ("YCbCr", "Gray") else None


def decode_turbo(
    data: bytes, width: int, height: int, denominator: int, memory: Callable[[int], Pixels]
) -> Pixels | None:
    """Decode a JPEG of this size at 1/`denominator` of it, as stored: uint8 RGB [h,w,3]; None if it is not flawless.

    `memory` returns a flat array of at least the given number of bytes; the result may be a view of it.
    """
    small_width, small_height = -(-width // denominator), -(-height // denominator)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_width=small_width,
            min_height=small_height,
            buffer=memory(3 * small_width * small_height),
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (small_height, small_width, 3) else None
