"""Read a PNG's chunks: its depth, its metadata, and the file without what has no effect on pixels. No Ray here."""

import binascii
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_MOST_TEXT_BYTES = 1 << 20
"""Metadata are read no further, so that a chunk which swells costs nothing."""


def is_16_bit(data: bytes) -> bool:
    """Return True if the samples of a PNG have 16 bits."""
    return data[24:25] == b"\x10"


def has_alpha_and_gray(data: bytes) -> bool:
    """Return True if a PNG has the two channels gray and alpha."""
    return data[25:26] == b"\x04"


def transparent_gray(data: bytes) -> int | None:
    """Return the level, among 8 or 16 bits, that is transparent in a gray PNG; None without one, or with colours.

    Pillow compares the level of a file of 2 or 4 bits with pixels of 8.
    """
    bits = data[24]
    if data[25] != 0:
        return None
    for kind, start, end in _chunks(data):
        if kind == b"tRNS" and end - start >= 2:
            level = int.from_bytes(data[start : start + 2], "big") & ((1 << bits) - 1)
            return level * 255 // ((1 << bits) - 1) if bits < 8 else level
        if kind == b"IDAT":
            break
    return None


def bare_png(data: bytes) -> bytes | None:
    """Return a PNG with only the chunks that decide its pixels; None if one of them is missing or damaged.

    libpng then has nothing to warn of, such as a colour profile, and no orientation to apply. Of an animation this
    is the picture for viewers without animation.
    """
    parts, last = [SIGNATURE], b""
    for kind, start, end in _chunks(data):
        if kind not in _PIXEL_CHUNKS:
            continue
        if zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        parts.append(data[start - 8 : end + 4])
        last = kind
    return b"".join(parts) if last == b"IEND" else None


def metadata_of_png(data: bytes) -> tuple[bytes | None, bytes | None]:
    """Return the blocks of EXIF and XMP of a PNG, each None without one.

    EXIF stands in the chunk eXIf, or as text in a profile of the programs that are older than this chunk.
    """
    exif: bytes | None = None
    texts: dict[bytes, bytes] = {}
    for kind, start, end in _chunks(data):
        if kind == b"eXIf":
            exif = exif or data[start:end]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, _, body = data[start:end].partition(b"\0")
            if name.startswith((b"Raw profile type ", b"XML:com.adobe.xmp")):
                texts.setdefault(name, _text(kind, body))
    profiles = [
        _profile(texts[name])
        for name in (b"Raw profile type exif", b"Raw profile type APP1")
        if name in texts
    ]
    exif = exif or next((one for one in profiles if one[:6] == b"Exif\0\0"), None)
    xmp = texts.get(b"XML:com.adobe.xmp")
    if xmp is None:
        others = [*profiles, _profile(texts.get(b"Raw profile type xmp", b""))]
        xmp = next((one for one in others if b"tiff:Orientation" in one), None)
    return exif, xmp


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, start, end) of the bodies of the chunks up to the last, as far as the file has them."""
    place = len(SIGNATURE)
    while place + 12 <= len(data):
        start = place + 8
        end = start + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            return
        kind = data[place + 4 : start]
        yield kind, start, end
        if kind == b"IEND":
            return
        place = end + 4


def _text(kind: bytes, body: bytes) -> bytes:
    """Return the text of a chunk without its name, at most _MOST_TEXT_BYTES of it."""
    is_packed = kind == b"zTXt"
    if kind == b"zTXt":
        body = body[1:]
    elif kind == b"iTXt":
        is_packed = body[:1] == b"\1"
        body = body[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not is_packed:
        return body[:_MOST_TEXT_BYTES]
    try:
        return zlib.decompressobj().decompress(body, _MOST_TEXT_BYTES)
    except zlib.error:
        return b""


def _profile(text: bytes) -> bytes:
    """Return the bytes of a raw profile: a name, a length, and hexadecimal digits in lines."""
    try:
        return binascii.unhexlify(b"".join(b"".join(text.lstrip().split(b"\n")[2:]).split()))
    except binascii.Error:
        return b""
