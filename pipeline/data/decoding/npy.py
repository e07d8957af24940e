"""Read pictures that are arrays of numpy: [H,W], [H,W,C] or [C,H,W] in a .npy file. No pickles, no Ray here.

The last axis is that of the channels if it has at most 16, else the first.
"""

import io
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinoray.models.errors import one_line
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.samples import Samples
from dinoray.pipeline.data.decoding.tiff import MAX_CHANNELS

Values = npt.NDArray[Any]

_MAGIC = b"\x93NUMPY"


class _Header(NamedTuple):
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    num_bytes: int
    """Of the header itself."""


def is_npy(data: bytes) -> bool:
    """Return True if a file starts as an array of numpy does."""
    return data.startswith(_MAGIC)


def begins_picture(head: bytes) -> bool:
    """Return True for an array of the shape and type of a picture, by the first bytes of its file (128 suffice)."""
    try:
        _header(head)
    except BadImage:
        return False
    return True


def is_deep_npy(data: bytes) -> bool:
    """Return True if the samples become more than 8 bits. Raises BadImage if the array is no picture."""
    return _header(data).dtype not in (np.uint8, np.bool_)


def open_npy(data: bytes) -> Samples:
    """Return the picture in an array. Raises BadImage if the array is none."""
    shape, is_fortran, dtype, start = _header(data)
    num_values = int(np.prod(shape, dtype=object))
    if len(data) - start < num_values * dtype.itemsize:
        raise BadImage(f"cut off array: {len(data) - start} of {num_values * dtype.itemsize} bytes")
    values = np.frombuffer(data, dtype, num_values, start).reshape(shape, order="F" if is_fortran else "C")
    picture: Values = np.ascontiguousarray(_plain(_channels_last(values)))
    return Samples(picture, picture.shape[2])


def _header(data: bytes) -> _Header:
    """Read the header of an array that is a picture. Raises BadImage if it is damaged, or of another array."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file)
    except Exception as error:  # a header is Python text
        raise BadImage(f"damaged header: {one_line(error)}") from error
    num_axes = len(shape)
    is_picture = num_axes == 2 or (num_axes == 3 and min(shape[0], shape[-1]) <= MAX_CHANNELS)
    if dtype.kind not in "buif" or not is_picture or 0 in shape:
        raise BadImage(
            f"an array of {dtype} {list(shape)} is no picture; save uint8, uint16 or float32 [H,W,C] of at most "
            f"{MAX_CHANNELS} channels"
        )
    return _Header(shape, is_fortran, dtype, file.tell())


def _channels_last(values: Values) -> Values:
    if values.ndim == 2:
        return values[..., None]
    return values if values.shape[2] <= MAX_CHANNELS else values.transpose(1, 2, 0)


def _plain(values: Values) -> Values:
    """Return numbers in the order of bytes of this machine, floats as float32, and bits as 0 and 255."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype == np.int8:
        return values.astype(np.int16)
    return values.astype(values.dtype.newbyteorder("="))
