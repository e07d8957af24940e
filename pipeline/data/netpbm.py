"""Decode binary PGM and PPM files of any depth, which Pillow reads byte by byte in Python. No Ray here."""

import re

import numpy as np

from dinoray.pipeline.data.bad_image import BadImage
from dinoray.pipeline.data.samples import Samples

_HEADER = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d{1,9})" + rb"\s")


def decode_netpbm(data: bytes) -> Samples | None:
    """Decode a binary PGM or PPM; None for other files. Raises BadImage if pixels are missing.

    The highest value in the header is white: values become 8 bits if it is below 256, else 16.
    """
    header = _HEADER.match(data)
    if header is None:
        return None
    num_channels, most = {b"5": 1, b"6": 3}[header[1]], int(header[4])
    if not 1 <= most <= 65535:
        raise BadImage(f"damaged PPM: highest value {most}, must be 1 to 65535")
    kind, full = (np.dtype(">u2"), 65535) if most > 255 else (np.dtype("u1"), 255)
    shape = int(header[3]), int(header[2]), num_channels
    num_values = shape[0] * shape[1] * num_channels
    if len(data) - header.end() < num_values * kind.itemsize:
        raise BadImage(
            f"cut off PPM: {len(data) - header.end()} of {num_values * kind.itemsize} bytes of pixels"
        )
    values = np.frombuffer(data, kind, num_values, header.end()).reshape(shape)
    if most != full:
        values = np.minimum((values.astype(np.uint32) * full + most // 2) // most, full)
    return Samples(values.astype(kind.newbyteorder("=")), num_channels)
