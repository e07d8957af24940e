"""Read a JPEG's segments: how many scans it has, which size, and its EXIF block. Decodes no pixels; no Ray here.

A scan may visit every pixel in a few bytes, so the number of scans bounds the time that a decoder takes.
"""

import re
from collections.abc import Iterator

from dinoray.pipeline.data.decoding.bad_image import BadImage

MAX_SCANS = 500
"""Maximum scans of a JPEG, as libjpeg-turbo advises; encoders write about ten."""
MAX_SCANNED_PIXELS = 2_000_000_000
"""Maximum of pixels times scans of a JPEG, some seconds of work: each scan may visit every pixel, in a few bytes.

A limit of time on the clock would make it depend on the load of the machine which images a run learns from.
"""

_EXIF = b"Exif\0\0"
_SOF0, _SOF1, _SOS, _EOI = 0xC0, 0xC1, 0xDA, 0xD9
_NO_FRAME_HEADERS = (0xC4, 0xC8, 0xCC)  # tables among the markers of frame headers
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # among coded pixels, without restart markers


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


def exif_of_jpeg(data: bytes) -> bytes | None:
    """Return the EXIF block of a JPEG, which stands before its pixels; None without one."""
    for _, place in _segments(data):
        if data.startswith(_EXIF, place + 4):
            return data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
    return None


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
