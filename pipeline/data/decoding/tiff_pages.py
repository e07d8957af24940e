"""Read the pages of a TIFF: what its tags say of size, samples, layout and orientation. Decodes no pixels; no Ray here.

TIFF 6.0 (Adobe, 1992) and BigTIFF. Pillow opens only the combinations of tags that it knows, which leave out most
pictures of more than 8 bits and of more than four channels.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dinoray.pipeline.data.decoding.bad_image import BadImage

_STARTS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_TYPES = {1: "B", 2: "c", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f", 12: "d",
          13: "I", 16: "Q", 17: "q", 18: "Q"}  # fmt: skip
_MOST_PAGES, _MOST_VALUES = 10_000, 50_000_000

# Tags, and their values.
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
_STRIPS, _ORIENTATION, _CHANNELS, _STRIP_ROWS, _STRIP_BYTES, _PLANAR = 273, 274, 277, 278, 279, 284
_PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _EXTRA, _FORMAT, _XMP = (
    317, 322, 323, 324, 325, 338, 339, 700
)  # fmt: skip
_REDUCED, _MASK = 1, 4
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6
UNSIGNED, SIGNED, FLOAT, _UNDEFINED = 1, 2, 3, 4


@dataclass(frozen=True)
class Page:
    """One picture of a TIFF, as its tags describe it."""

    order: str
    """Of the bytes of a number: < or >."""
    width: int
    height: int
    num_channels: int
    bits: int
    """Of each sample; 0 if channels differ."""
    sample_format: int
    photometric: int
    extra: tuple[int, ...]
    """What channels behind the colours are: 0 unknown, 1 and 2 alpha, with colours multiplied by it or not."""
    compression: int
    predictor: int
    fill_order: int
    is_planar: bool
    """Channels are stored one after the other."""
    block: tuple[int, int]
    """Rows and columns of a strip or tile."""
    is_tiled: bool
    offsets: tuple[int, ...]
    num_bytes: tuple[int, ...]
    orientation: int
    xmp: bytes | None


def is_tiff(data: bytes) -> bool:
    """Return True if a file starts as a TIFF does."""
    return data[:4] in _STARTS


def read_pages(data: bytes) -> list[Page]:
    """Return the pages of a TIFF, without thumbnails, reduced copies and masks. Raises BadImage if it is damaged."""
    try:
        pages = [(tags.get(_SUBFILE, (0,))[0], _page(tags, order)) for order, tags in _directories(data)]
    except (struct.error, IndexError, KeyError, ValueError, OverflowError) as error:
        raise BadImage(f"damaged TIFF: its tags cannot be read ({type(error).__name__})") from error
    full = [page for subfile, page in pages if not subfile & (_REDUCED | _MASK)] or [
        page for _, page in pages
    ]
    if not full:
        raise BadImage("damaged TIFF: it has no page")
    return full


def _directories(data: bytes) -> Iterator[tuple[str, dict[int, Any]]]:
    """Yield the order of bytes, and the values by tag, of each directory of the main chain."""
    order, is_big = _STARTS[data[:4]]
    place = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)[0]
    entry, seen = ("HHQ", 20) if is_big else ("HHI", 12), set[int]()
    while place and place not in seen and len(seen) < _MOST_PAGES:
        seen.add(place)
        number = struct.unpack_from(order + ("Q" if is_big else "H"), data, place)[0]
        start = place + (8 if is_big else 2)
        tags: dict[int, Any] = {}
        if start + number * entry[1] > len(data):
            raise ValueError("entries beyond the end")
        for at in range(start, start + number * entry[1], entry[1]):
            tag, kind, count = struct.unpack_from(order + entry[0], data, at)
            if kind not in _TYPES:
                continue
            form = order + f"{count}{_TYPES[kind][0]}" if kind != 5 else order + f"{2 * count}I"
            inline = at + entry[1] - (8 if is_big else 4)
            if count > _MOST_VALUES:
                raise ValueError("too many values")
            if struct.calcsize(form) > (8 if is_big else 4):
                inline = struct.unpack_from(order + ("Q" if is_big else "I"), data, inline)[0]
            tags.setdefault(tag, struct.unpack_from(form, data, inline))  # the first counts, as for libtiff
        yield order, tags
        place = struct.unpack_from(order + ("Q" if is_big else "I"), data, start + number * entry[1])[0]


def _page(tags: dict[int, Any], order: str) -> Page:
    def one(tag: int, default: int) -> int:
        return int(tags.get(tag, (default,))[0])

    width, height, is_tiled = one(_WIDTH, 0), one(_HEIGHT, 0), _TILES in tags
    bits = set(tags.get(_BITS, (1,)))
    formats = {UNSIGNED if kind == _UNDEFINED else kind for kind in tags.get(_FORMAT, (UNSIGNED,))}
    block = (
        (one(_TILE_HEIGHT, 0), one(_TILE_WIDTH, 0))
        if is_tiled
        else (min(one(_STRIP_ROWS, height), height), width)
    )
    if min(width, height, *block, one(_CHANNELS, 1)) < 1:
        raise ValueError("no pixels")
    return Page(
        order=order,
        width=width,
        height=height,
        num_channels=one(_CHANNELS, 1),
        bits=bits.pop() if len(bits) == 1 else 0,
        sample_format=formats.pop() if len(formats) == 1 else 0,
        photometric=one(_PHOTOMETRIC, -1),
        extra=tuple(tags.get(_EXTRA, ())),
        compression=one(_COMPRESSION, 1),
        predictor=one(_PREDICTOR, 1),
        fill_order=one(_FILL_ORDER, 1),
        is_planar=one(_PLANAR, 1) == 2 and one(_CHANNELS, 1) > 1,
        block=block,
        is_tiled=is_tiled,
        offsets=tuple(tags.get(_TILES if is_tiled else _STRIPS, ())),
        num_bytes=tuple(tags.get(_TILE_BYTES if is_tiled else _STRIP_BYTES, ())),
        orientation=one(_ORIENTATION, 0),
        xmp=_bytes_of(tags.get(_XMP)),
    )


def _bytes_of(values: Any) -> bytes | None:
    return bytes(values) if values and isinstance(values[0], int) else None
