"""Decode an image file's bytes to uint8 RGB pixels, or raise BadImage with a reason; never half a picture.

Stands between the source, whose bytes may be anything, and augment/multicrop.py, which takes any picture. The
header is read first, so a file that claims too many pixels costs nothing. The decoder is chosen by content,
never by file name:

    OpenCV   JPEG, PNG, WebP, BMP in gray, RGB or CMYK, of 8 or 16 bits: correct for these, and the fastest
    Pillow   the rest: GIF, TIFF, JPEG 2000, AVIF, PPM, palettes, and transparency, laid over white

No files, no storage and no Ray here.
"""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoray.models.errors import ResourceError, one_line
from dinoray.pipeline.data.bad_image import BadImage
from dinoray.pipeline.data.decoder_process import decode_apart
from dinoray.pipeline.data.pillow import decode_pillow, open_pillow

_OPENCV_FORMATS = {"JPEG", "MPO", "PNG", "WEBP", "BMP"}
_OPENCV_MODES = {"1", "L", "RGB", "CMYK", "I;16", "I;16B"}
_JPEG_IN_TIFF = {"jpeg", "tiff_jpeg"}

MAX_SCANS = 500
"""Maximum scans of a JPEG, as libjpeg-turbo advises; encoders write about ten."""
MAX_SCANNED_PIXELS = 2_000_000_000
"""Maximum of pixels times scans of a JPEG, some seconds of work: each scan may visit every pixel, in a few bytes.

A limit of time on the clock would make it depend on the load of the machine which images a run learns from.
"""

_EXIF, _ORIENTATION = b"Exif\0\0", 0x0112
_SOF0, _SOF1, _SOS, _EOI = 0xC0, 0xC1, 0xDA, 0xD9
_NO_FRAME_HEADERS = (0xC4, 0xC8, 0xCC)  # tables among the markers of frame headers
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # among coded pixels, without restart markers
_TURNS: dict[int, Callable[[Any], Any]] = {
    2: lambda p: cv2.flip(p, 1),
    3: lambda p: cv2.rotate(p, cv2.ROTATE_180),
    4: lambda p: cv2.flip(p, 0),
    5: cv2.transpose,
    6: lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE),
    7: lambda p: cv2.rotate(cv2.transpose(p), cv2.ROTATE_180),
    8: lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def decode(data: bytes, *, max_pixels: int, min_side: int = 1) -> npt.NDArray[np.uint8]:
    """Decode an image file into uint8 RGB [H,W,3], C-contiguous and upright.

    Raises BadImage for anything that is not a whole image of at most `max_pixels` pixels whose shorter side
    has at least `min_side`. Files of more than about 179 megapixels are refused whatever `max_pixels` is. Raises
    ResourceError if the machine cannot start a process for a file that needs one.
    """
    header = open_pillow(data)
    width, height = header.size
    check_size(width, height, max_pixels=max_pixels, min_side=min_side)
    if header.format in ("JPEG", "MPO"):
        check_scans(data, width, height)
    if header.format == "JPEG2000" and _stops_between_tiles(data):
        raise BadImage("cut off JPEG2000: no end of codestream")
    try:
        if _opencv_is_right(header):
            pixels = _decode_opencv(data)
        else:
            pixels = decode_apart(data) if _may_be_slow(header) else decode_pillow(header)
    except (BadImage, ResourceError):
        raise
    # Arbitrary bytes reach a dozen parsers here, and each parser has its own exceptions.
    except Exception as error:
        raise BadImage(f"damaged or cut off {header.format}: {one_line(error)}") from error
    if pixels.shape not in {(height, width, 3), (width, height, 3)}:
        raise BadImage(f"damaged {header.format}: {width}x{height} pixels announced, {pixels.shape} decoded")
    return pixels


def check_size(width: int, height: int, *, max_pixels: int, min_side: int) -> None:
    """Raise BadImage if a picture has more than `max_pixels` pixels or a side shorter than `min_side`."""
    if width * height > max_pixels:
        raise BadImage(f"too large: {width}x{height} pixels, max_pixels={max_pixels}")
    if min(width, height) < min_side:
        raise BadImage(f"too small: {width}x{height} pixels, min_side={min_side}")


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raise BadImage if a JPEG of this size has more than MAX_SCANS scans, or too many for its pixels."""
    most = max(1, min(MAX_SCANS, MAX_SCANNED_PIXELS // (width * height)))
    found = count_scans(data)
    if found > most:
        raise BadImage(f"too many scans: {found} of {width}x{height} pixels, at most {most}")


def count_scans(data: bytes) -> int:
    """Return how often a decoder passes over the pixels of a JPEG: once if its first scan has all of them.

    What follows the end of the picture does not count: a phone may append a film.
    """
    place, is_sequential, num_components = 2, False, 0
    for marker, place in _segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME_HEADERS:
            is_sequential = marker in (_SOF0, _SOF1)
            num_components = data[place + 9] if place + 9 < len(data) else 0
        elif marker == _SOS:
            if is_sequential and place + 4 < len(data) and data[place + 4] == num_components:
                return 1
            break
    else:
        return 0
    num_scans = 0
    for match in _MARKER.finditer(data, place):
        marker = match[1][0]
        if marker == _EOI:
            break
        num_scans += marker == _SOS
    return num_scans


def jpeg_orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG, 1 to 8; 1 if it is missing or invalid."""
    if not _has_exif(data):
        return 1
    exif = Image.Exif()
    # A damaged EXIF block does not mean damaged pixels: they are used as stored.
    try:
        exif.load(Image.open(io.BytesIO(data), formats=("JPEG", "MPO")).info["exif"])
        orientation = exif.get(_ORIENTATION)
    except Exception:
        return 1
    return orientation if orientation in _TURNS else 1


def turn_upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return a picture stored with an EXIF orientation from 1 to 8 as upright and C-contiguous."""
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation > 1 else pixels


def eval_crop(image: npt.NDArray[np.uint8], *, size: int) -> npt.NDArray[np.uint8]:
    """Return the centre crop of an image (uint8 [H,W,3]) for evaluation: uint8 [size,size,3].

    DINO's protocol: shorter side to size * 256 / 224 (bicubic, antialiased), then the central square.
    """
    height, width = image.shape[:2]
    short = round(size * 256 / 224)
    new_width, new_height = (
        (short, short * height // width) if width <= height else (short * width // height, short)
    )
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    x_scale, y_scale = width / new_width, height / new_height
    # Only the square is computed: a whole 1 x 5000 image would become 256 x 1,280,000 pixels.
    box = (left * x_scale, top * y_scale, (left + size) * x_scale, (top + size) * y_scale)
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def _has_exif(data: bytes) -> bool:
    """Return True if a JPEG has an EXIF segment before its pixels.

    Most files have none, and Pillow is slow to check.
    """
    return any(data.startswith(_EXIF, place + 4) for _, place in _segments(data))


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, place) of the segments of a JPEG up to its first scan, that included."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        yield marker, place
        if marker == _SOS:
            return
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def _opencv_is_right(header: Image.Image) -> bool:
    """Return True if OpenCV decodes such a file correctly: upright, first frame, without transparency."""
    if header.format not in _OPENCV_FORMATS or header.mode not in _OPENCV_MODES:
        return False
    if header.has_transparency_data:
        return False
    # Versions of OpenCV differ in the first picture of an animated PNG, and only some turn a WebP upright.
    if header.format == "PNG" and getattr(header, "is_animated", False):
        return False
    return not (header.format == "WEBP" and "exif" in header.info)


def _may_be_slow(header: Image.Image) -> bool:
    """Return True if the time for such a file is not bounded by its number of pixels.

    The coded bits of JPEG 2000 and AVIF decide it, and the scans of a JPEG inside a TIFF.
    """
    return header.format in ("JPEG2000", "AVIF") or (
        header.format == "TIFF" and header.info.get("compression") in _JPEG_IN_TIFF
    )


def _stops_between_tiles(data: bytes) -> bool:
    """Return True if a JPEG 2000 file has no end marker.

    Its decoder would return a picture with black tiles.
    """
    # Tile data contain no FF followed by more than 8F: after the last tile start, FF D9 can only be the end.
    return not 0 <= data.rfind(b"\xff\x90") < data.rfind(b"\xff\xd9")


def _decode_opencv(data: bytes) -> npt.NDArray[np.uint8]:
    # IMREAD_COLOR_RGB came with OpenCV 4.11, the first version that refuses a truncated JPEG; older versions
    # fill the rest with gray. A JPEG is turned here, since libraries differ in how they read a damaged EXIF
    # block.
    is_jpeg = data[:2] == b"\xff\xd8"
    flags = cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_IGNORE_ORIENTATION if is_jpeg else 0)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if pixels is None:
        raise ValueError("OpenCV finds no whole picture")
    return turn_upright(pixels, jpeg_orientation(data)) if is_jpeg else pixels
