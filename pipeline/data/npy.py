"""Read pictures that are arrays of numpy: [H,W], [H,W,C] or [C,H,W] in a .npy file. No pickles, no Ray here."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from dinoray.models.errors import one_line
from dinoray.pipeline.data.bad_image import BadImage
from dinoray.pipeline.data.samples import Samples
from dinoray.pipeline.data.tiff import MAX_CHANNELS

Values = npt.NDArray[Any]

_MAGIC = b"\x93NUMPY"


def is_npy(data: bytes) -> bool:
    """Return True if a file starts as an array of numpy does."""
    return data.startswith(_MAGIC)


def open_npy(data: bytes) -> Samples:
    """Return the picture in an array. Raises BadImage if the array is none."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, is_fortran, dtype = read(file)
    except Exception as error:  # a header is Python text
        raise BadImage(f"damaged header: {one_line(error)}") from error
    if dtype.kind not in "buif" or len(shape) not in (2, 3) or 0 in shape or is_fortran:
        raise BadImage(
            f"an array of {dtype} {list(shape)} is no picture; save uint8, uint16 or float32 [H,W,C]"
        )
    num_values = int(np.prod(shape, dtype=object))
    if len(data) - file.tell() < num_values * dtype.itemsize:
        raise BadImage(f"cut off array: {len(data) - file.tell()} of {num_values * dtype.itemsize} bytes")
    values = _channels_last(np.frombuffer(data, dtype, num_values, file.tell()).reshape(shape))
    num_channels = values.shape[2]
    return Samples(_plain(values), num_channels)


def _channels_last(values: Values) -> Values:
    if values.ndim == 2:
        return values[..., None]
    if values.shape[2] <= MAX_CHANNELS:
        return values
    if values.shape[0] <= MAX_CHANNELS:
        return np.ascontiguousarray(values.transpose(1, 2, 0))
    raise BadImage(f"an array of {list(values.shape)} has more than {MAX_CHANNELS} channels")


def _plain(values: Values) -> Values:
    """Return numbers in the order of bytes of this machine, floats as float32, and bits as 0 and 255."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype == np.int8:
        return values.astype(np.int16)
    return values.astype(values.dtype.newbyteorder("="))
