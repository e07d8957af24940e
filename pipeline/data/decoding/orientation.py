"""Which way up the picture in an image file is, read in one place for all formats; and turning it upright.

The tag Orientation of EXIF decides; where EXIF has none, `tiff:Orientation` in XMP, except in a JPEG, where
viewers do not read it. A damaged block does not mean damaged pixels: they are used as stored. No pixels are
decoded here; no Ray.
"""

import re
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoray.pipeline.data.decoding.jpeg_segments import exif_of_jpeg
from dinoray.pipeline.data.decoding.png_chunks import metadata_of_png

_ORIENTATION = 0x0112
_IN_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b")
_TURNS: dict[int, Callable[[Any], Any]] = {
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p[::-1].swapaxes(0, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: p[:, ::-1].swapaxes(0, 1),
}
_TURNS_OF_BYTES: dict[int, Callable[[Any], Any]] = {  # several times faster than the above
    2: lambda p: cv2.flip(p, 1),
    3: lambda p: cv2.rotate(p, cv2.ROTATE_180),
    4: lambda p: cv2.flip(p, 0),
    5: cv2.transpose,
    6: lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE),
    7: lambda p: cv2.rotate(cv2.transpose(p), cv2.ROTATE_180),
    8: lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def orientation_of(data: bytes, header: Image.Image) -> int:
    """Return the orientation, 1 to 8, of a file that Pillow has opened but not decoded; 1 if missing or invalid."""
    if header.format in ("JPEG", "MPO"):
        return orientation_of_jpeg(data)
    if header.format == "PNG":
        return orientation_in(*metadata_of_png(data))
    return orientation_in(header.info.get("exif"), header.info.get("xmp"))


def orientation_of_jpeg(data: bytes) -> int:
    """Return the orientation of a JPEG, 1 to 8; 1 if it is missing or invalid."""
    return orientation_in(exif_of_jpeg(data), None)


def orientation_in(exif: bytes | None, xmp: bytes | str | None) -> int:
    """Return the orientation, 1 to 8, in blocks of EXIF and XMP; 1 if it is missing or invalid."""
    tag = None
    if exif:
        block = Image.Exif()
        try:
            block.load(exif)
            tag = block.get(_ORIENTATION)
        except Exception:  # any parser may raise any exception
            tag = None
    if tag is None and xmp:
        found = _IN_XMP.search(xmp.encode(errors="replace") if isinstance(xmp, str) else xmp)
        tag = int(found[1]) if found else None
    return valid_orientation(tag)


def valid_orientation(tag: Any) -> int:
    """Return the value of a tag if it is an orientation, 1 to 8, else 1."""
    return tag if isinstance(tag, int) and tag in _TURNS else 1


def turn_upright(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Return a picture [H,W,C] stored with an orientation from 1 to 8 as upright and C-contiguous."""
    if orientation == 1:
        return pixels
    is_picture = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    return np.ascontiguousarray((_TURNS_OF_BYTES if is_picture else _TURNS)[orientation](pixels))
