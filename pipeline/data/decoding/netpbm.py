"""Decode binary PGM, PPM and PAM files of any depth. Pillow reads the first two byte by byte in Python, and no PAM.

The highest value in the header is white: values become 8 bits if it is below 256, else 16. No Ray here.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.samples import Samples

_HEADER = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")
_PAM, _PAM_END, _MOST_PAM_HEADER = b"P7\n", b"\nENDHDR\n", 1 << 16
_COLOURS = {b"BLACKANDWHITE": 1, b"GRAYSCALE": 1, b"RGB": 3}
_ALPHA = b"_ALPHA"


def decode_netpbm(data: bytes) -> Samples | None:
    """Decode a binary PGM or PPM; None for other files. Raises BadImage if pixels are missing."""
    header = _HEADER.match(data)
    if header is None:
        return None
    num_channels = {b"5": 1, b"6": 3}[header[1]]
    shape = int(header[3]), int(header[2]), num_channels
    return Samples(_values(data, header.end(), shape, int(header[4]), "PPM"), num_channels)


def is_pam(data: bytes) -> bool:
    """Return True if a file starts as a PAM does."""
    return data.startswith(_PAM)


def is_deep_pam(data: bytes) -> bool:
    """Return True if the header of a PAM allows samples of more than 8 bits. Raises BadImage if it is damaged."""
    return _pam_header(data)[0][b"MAXVAL"] > 255


def decode_pam(data: bytes) -> Samples:
    """Decode a PAM. Raises BadImage if its header is damaged or pixels are missing.

    Its type says what the channels are; those of an unknown type are neither colours nor alpha.
    """
    numbers, kind, start = _pam_header(data)
    num_channels = numbers[b"DEPTH"]
    shape = numbers[b"HEIGHT"], numbers[b"WIDTH"], num_channels
    values = _values(data, start, shape, numbers[b"MAXVAL"], "PAM")
    has_alpha = kind.endswith(_ALPHA)
    num_colours = _COLOURS.get(kind.removesuffix(_ALPHA))
    if num_colours is None or num_colours + has_alpha != num_channels:
        return Samples(values, num_channels)
    return Samples(values, num_colours, has_alpha=has_alpha)


def _pam_header(data: bytes) -> tuple[dict[bytes, int], bytes, int]:
    """Return the numbers in the header of a PAM, its type, and where the pixels begin."""
    end = data.find(_PAM_END, 0, _MOST_PAM_HEADER)
    words = [line.split() for line in data[len(_PAM) : max(end, 0)].split(b"\n")]
    fields = {line[0]: b" ".join(line[1:]) for line in words if line}
    names = (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")
    if end < 0 or not all(re.fullmatch(rb"0*[1-9]\d{0,8}", fields.get(name, b"")) for name in names):
        raise BadImage("damaged PAM: its header lacks WIDTH, HEIGHT, DEPTH, MAXVAL or ENDHDR")
    return {name: int(fields[name]) for name in names}, fields.get(b"TUPLTYPE", b""), end + len(_PAM_END)


def _values(data: bytes, start: int, shape: tuple[int, int, int], most: int, what: str) -> npt.NDArray[Any]:
    if not 1 <= most <= 65535:
        raise BadImage(f"damaged {what}: highest value {most}, must be 1 to 65535")
    kind, full = (np.dtype(">u2"), 65535) if most > 255 else (np.dtype("u1"), 255)
    num_values = shape[0] * shape[1] * shape[2]
    if len(data) - start < num_values * kind.itemsize:
        raise BadImage(f"cut off {what}: {len(data) - start} of {num_values * kind.itemsize} bytes of pixels")
    values = np.frombuffer(data, kind, num_values, start).reshape(shape)
    if most != full:
        values = np.minimum((values.astype(np.uint32) * full + most // 2) // most, full)
    return values.astype(kind.newbyteorder("="))
