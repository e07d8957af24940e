"""Decode the samples of a TIFF as they are stored: any number of channels, 1 to 64 bits, whole numbers and floats.

decode.py chooses this decoder for what Pillow does not open, or opens with fewer bits: gray and RGB of more than 8
bits, bands, channels stored one after the other. Strips and tiles of formats other than deflate are unpacked by the
libtiff in Pillow: each is handed to it as a gray picture of bytes. No Ray here.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinoray.models.errors import one_line
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.samples import Samples
from dinoray.pipeline.data.decoding.tiff_pages import (
    BLACK_IS_ZERO,
    FLOAT,
    RGB,
    SIGNED,
    UNSIGNED,
    WHITE_IS_ZERO,
    YCBCR,
    Page,
)

Values = npt.NDArray[Any]

MAX_CHANNELS = 16
"""Maximum channels of a picture."""

_NONE, _LZW, _DEFLATE, _PACKBITS, _OLD_DEFLATE, _LZMA, _ZSTD = 1, 5, 8, 32773, 32946, 34925, 50000
_BY_PILLOW = (_LZW, _PACKBITS, _LZMA, _ZSTD)
_DIFFERENCES, _FLOAT_DIFFERENCES = 2, 3
_MULTIPLIED = 1
_ALPHA = (_MULTIPLIED, 2, 999)
"""Kinds of extra channel that are alpha; 999 is of an old Corel Draw."""
_KINDS = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}
_PHOTOMETRIC = {
    WHITE_IS_ZERO: "gray",
    BLACK_IS_ZERO: "gray",
    RGB: "RGB",
    3: "a palette",
    4: "a mask",
    5: "CMYK",
    YCBCR: "YCbCr",
    8: "CIELab",
    9: "ICCLab",
    10: "ITULab",
    32803: "a colour filter array",
    32844: "LogL",
    32845: "LogLuv",
}


def is_readable(page: Page) -> bool:
    """Return True if `decode_page` reads such a page with all its channels."""
    return (
        page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        and page.bits >= 8
        and page.compression in (_NONE, _DEFLATE, _OLD_DEFLATE, *_BY_PILLOW)
    )


def is_pillows(page: Page) -> bool:
    """Return True if Pillow decodes such a page correctly as RGB: up to 8 bits, with colours that it knows."""
    if page.bits > 8 or page.bits == 0 or page.sample_format != UNSIGNED:
        return page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
    if page.photometric == RGB:
        return page.num_channels == 3 or (
            page.num_channels == 4 and page.extra[:1] != () and not page.is_planar
        )
    return page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO) or (
        page.num_channels == 1 or (page.num_channels == 2 and page.extra[:1] in ((1,), (2,)))
    )


def channels_in_words(number: int) -> str:
    """Return the number of channels with its noun."""
    return "1 channel" if number == 1 else f"{number} channels"


def is_subsampled(page: Page) -> bool:
    """Return True for colours of fewer pixels than the picture, stored without compression."""
    return (
        page.photometric == YCBCR
        and page.compression == _NONE
        and sum(page.num_bytes) < page.width * page.height * page.num_channels
    )


def not_read(page: Page) -> str:
    """Return the reason why a page is a bad image that neither `decode_page` nor Pillow reads."""
    colours = _PHOTOMETRIC.get(page.photometric, f"photometric {page.photometric}")
    return (
        f"TIFF of a kind that is not read: {colours}, {channels_in_words(page.num_channels)} of {page.bits} bits, "
        f"compression {page.compression}; save it as RGB or gray"
    )


def decode_page(data: bytes, page: Page) -> Samples:
    """Decode a page as it is stored, not turned upright. Raises BadImage if it is damaged or of a kind not read."""
    if page.num_channels > MAX_CHANNELS:
        raise BadImage(f"{page.num_channels} channels; at most {MAX_CHANNELS} are read")
    if page.compression not in (_NONE, _DEFLATE, _OLD_DEFLATE, *_BY_PILLOW):
        raise BadImage(
            f"TIFF of {channels_in_words(page.num_channels)} of {page.bits} bits with compression {page.compression}; "
            "write it with deflate, LZW or ZSTD"
        )
    dtype = _dtype(page)
    num_planes = page.num_channels if page.is_planar else 1
    depth = page.num_channels // num_planes
    rows, columns = page.block
    down, across = -(-page.height // rows), -(-page.width // columns)
    if min(len(page.offsets), len(page.num_bytes)) < num_planes * down * across:
        raise BadImage("damaged TIFF: strips or tiles are missing")
    values = np.empty((page.height, page.width, page.num_channels), dtype.newbyteorder("="))
    for number in range(num_planes * down * across):
        plane, place = divmod(number, down * across)
        top, left = place // across * rows, place % across * columns
        height = rows if page.is_tiled else min(rows, page.height - top)
        block = _block(data, page, number, (height, columns, depth), dtype)
        target = values[top : top + rows, left : left + columns, plane * depth : (plane + 1) * depth]
        target[:] = block[: target.shape[0], : target.shape[1]]
    return _described(_full_range(values, page), page)


def _described(values: Values, page: Page) -> Samples:
    num_colours = 3 if page.photometric == RGB and page.num_channels >= 3 else 1
    has_alpha = page.num_channels > num_colours and page.extra[:1] != () and page.extra[0] in _ALPHA
    if page.photometric != RGB and page.num_channels > 2:
        num_colours = page.num_channels  # bands
    return Samples(
        values,
        num_colours,
        has_alpha=has_alpha and num_colours < page.num_channels,
        is_multiplied=has_alpha and page.extra[0] == _MULTIPLIED,
        is_inverted=page.photometric == WHITE_IS_ZERO,
    )


def _dtype(page: Page) -> np.dtype[Any]:
    """Return the type of a stored sample; of fewer or odd bits, that of the sample once it is unpacked."""
    if (
        page.bits in (8, 16, 32, 64)
        and page.sample_format in _KINDS
        and (page.bits, page.sample_format) != (8, FLOAT)
    ):
        return np.dtype(f"{page.order}{_KINDS[page.sample_format]}{page.bits // 8}")
    if 1 <= page.bits < 16 and page.sample_format == UNSIGNED and page.predictor == 1:
        return np.dtype(f"{page.order}u{1 if page.bits < 8 else 2}")
    raise BadImage(
        f"TIFF with {page.bits or 'several numbers of'} bits of format {page.sample_format} a sample"
    )


def _full_range(values: Values, page: Page) -> Values:
    """Return samples of odd bits as 8 or 16 bits, floats as float32, and small signed ones as 16 bits."""
    if page.sample_format == UNSIGNED and page.bits not in (8, 16, 32, 64):
        most, full = (1 << page.bits) - 1, 255 if page.bits < 8 else 65535
        return ((values.astype(np.uint32) * full + most // 2) // most).astype(values.dtype)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(np.int16) if values.dtype == np.int8 else values


def _block(data: bytes, page: Page, number: int, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> Values:
    """Return one strip or tile [rows, columns, depth] in the order of bytes of its file."""
    rows, columns, depth = shape
    row_bytes = (columns * depth * page.bits + 7) // 8
    start, size = page.offsets[number], page.num_bytes[number]
    stored = data[start : start + size]
    if len(stored) < size:
        raise BadImage(f"cut off TIFF: {len(stored)} of {size} bytes of a strip or tile")
    raw = _unpacked(stored, page, rows, row_bytes)
    if len(raw) < rows * row_bytes:
        raise BadImage(f"cut off TIFF: {len(raw)} of {rows * row_bytes} bytes of a strip or tile")
    bytes_ = np.frombuffer(raw, np.uint8, rows * row_bytes).reshape(rows, row_bytes)
    if page.bits not in (8, 16, 32, 64):
        return _of_bits(bytes_, page, columns * depth).reshape(shape).astype(dtype)
    if page.predictor == _FLOAT_DIFFERENCES:
        bytes_ = np.cumsum(bytes_.reshape(rows, -1, depth), axis=1, dtype=np.uint8)
        by_value = bytes_.reshape(rows, page.bits // 8, -1).swapaxes(1, 2)
        return np.ascontiguousarray(by_value).view(dtype.newbyteorder(">")).reshape(shape)
    values = bytes_.view(dtype).reshape(shape)
    if page.predictor == _DIFFERENCES:
        whole = np.dtype(f"{page.order}u{dtype.itemsize}")
        summed = np.cumsum(values.view(whole), axis=1, dtype=whole.newbyteorder("="))
        return summed.view(dtype.newbyteorder("="))
    return values


def _of_bits(bytes_: npt.NDArray[np.uint8], page: Page, per_row: int) -> Values:
    bits = np.unpackbits(bytes_, axis=1)[:, : per_row * page.bits].reshape(len(bytes_), per_row, page.bits)
    return bits @ (1 << np.arange(page.bits)[::-1])


def _unpacked(stored: bytes, page: Page, rows: int, row_bytes: int) -> bytes:
    if page.compression == _NONE:
        return stored if page.fill_order == 1 or page.bits >= 8 else stored.translate(_REVERSED)
    if page.compression in (_DEFLATE, _OLD_DEFLATE):
        try:
            return zlib.decompressobj().decompress(stored, rows * row_bytes)
        except zlib.error as error:
            raise BadImage(f"damaged TIFF: {one_line(error)}") from error
    try:
        return Image.open(io.BytesIO(_gray_tiff(stored, page, rows, row_bytes)), formats=("TIFF",)).tobytes()
    except Exception as error:  # any parser may raise any exception
        raise BadImage(f"damaged TIFF: {one_line(error)}") from error


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _gray_tiff(stored: bytes, page: Page, rows: int, row_bytes: int) -> bytes:
    """Return a TIFF of one strip that holds bytes instead of samples."""
    tags = {
        256: row_bytes,
        257: rows,
        258: 8,
        259: page.compression,
        262: BLACK_IS_ZERO,
        266: page.fill_order,
    }
    tags |= {273: 8, 277: 1, 278: rows, 279: len(stored)}  # as in tiff_pages.py
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    padded = stored + bytes(len(stored) % 2)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(padded)) + padded + directory
