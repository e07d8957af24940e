"""One decoder rule: orientation wherever a file has it, depth, odd BMP and TIFF, and nothing printed."""

import os
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import pytest
from image_files import FILES, MAX_PIXELS, encode, picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode, read_samples

GRADIENT = np.add.outer(np.arange(40), 56 * np.arange(56)) % 4096
"""Values of 12 bits, [40,56]."""
TWELVE = PixelsConfig(value_range=(0, 4095))
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_profile(name: str, body: bytes) -> bytes:
    """A profile as ImageMagick writes it: hexadecimal digits in lines."""
    digits = body.hex()
    lines = "\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    return f"\n{name}\n{len(body):8}\n{lines}\n".encode()


def png_16(colour_type: int, values: np.ndarray) -> bytes:
    """A PNG of 16 bits with any of the channels that PNG has."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


PNGS = {
    "rgb": encode(picture(), "PNG"),
    "rgba": encode(Image.fromarray(picture()).convert("RGBA"), "PNG"),
    "gray": encode(Image.fromarray(picture()).convert("L"), "PNG"),
    "rgb of 16 bits": png_16(2, picture().astype(int) * 257),
    "gray of 16 bits": png_16(0, picture()[..., 0].astype(int) * 257),
}
METADATA = {
    "eXIf": chunk(b"eXIf", EXIF[6:]),
    "zTXt exif": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw_profile("exif", EXIF))),
    "tEXt exif": chunk(b"tEXt", b"Raw profile type exif\0" + raw_profile("exif", EXIF)),
    "iTXt exif": chunk(b"iTXt", b"Raw profile type exif\0\0\0\0\0" + raw_profile("exif", EXIF)),
    "APP1": chunk(
        b"zTXt", b"Raw profile type APP1\0\0" + zlib.compress(raw_profile("generic profile", EXIF))
    ),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode()),
    "packed xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP.encode())),
    "xmp profile": chunk(
        b"zTXt", b"Raw profile type xmp\0\0" + zlib.compress(raw_profile("xmp", XMP.encode()))
    ),
}


@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("name", PNGS)
def test_a_png_is_turned_by_whichever_chunk_says_so(name: str, metadata: str, place: str) -> None:
    data = PNGS[name]
    at = data.index(b"IDAT") - 4 if place == "before the pixels" else len(data) - 12
    turned = decode(data[:at] + METADATA[metadata] + data[at:], max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(turned, np.rot90(decode(data, max_pixels=MAX_PIXELS), -1))


@pytest.mark.parametrize("image_format", ["WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_xmp_turns_a_webp_and_a_tiff(image_format: str, mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    options: dict[str, Any] = {"lossless": True, "xmp": XMP.encode()} if image_format == "WEBP" else {}
    if image_format == "TIFF":
        options = {"tiffinfo": {700: XMP.encode()}}
    np.testing.assert_array_equal(
        decode(encode(image, image_format, **options), max_pixels=MAX_PIXELS), np.rot90(picture(), -1)
    )


def test_the_tag_of_exif_goes_before_xmp() -> None:
    upright = EXIF.replace(b"\x01\x12\0\x03\0\0\0\x01\0\x06", b"\x01\x12\0\x03\0\0\0\x01\0\x01")
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    data = encode(picture(), "PNG", exif=upright, pnginfo=info)
    np.testing.assert_array_equal(decode(data, max_pixels=MAX_PIXELS), picture())


# Depth.


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6])
def test_12_bits_in_a_png_of_16_span_the_range(colour_type: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]
    values = np.repeat(GRADIENT[..., None], channels, axis=2)
    if colour_type >= 4:
        values[..., -1] = 65535
    data = png_16(colour_type, values)
    expected = np.round(GRADIENT * 255 / 4095)
    for config in (TWELVE, PixelsConfig()):  # alone, a picture has as many bits as it needs
        pixels = decode(data, max_pixels=MAX_PIXELS, config=config)
        assert np.abs(pixels - expected[..., None]).max() <= 0.5
    assert decode(data, max_pixels=MAX_PIXELS, config=PixelsConfig(value_range=None)).max() == 3119 >> 8


def test_colours_of_16_bits_keep_their_order_and_alpha_is_not_scaled() -> None:
    values = np.zeros((2, 2, 4), int)
    values[..., 0], values[..., 3] = 4095, 32768
    pixels = decode(png_16(6, values), max_pixels=4, config=TWELVE)
    assert pixels[0, 0].tolist() == [255, 127, 127]


def tiff_16(values: np.ndarray, photometric: int, order: str = "<") -> bytes:
    """A TIFF of one strip of gray samples."""
    pixels = values.astype(f"{order}{values.dtype.kind}{values.dtype.itemsize}").tobytes()
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = {
        256: width,
        257: height,
        258: 8 * values.itemsize,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
    }
    tags |= {279: len(pixels), 339: form}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(pixels))
    return start + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_gray_tiffs_of_any_depth_are_mapped_and_white_is_white(
    photometric: int, dtype: str, order: str
) -> None:
    expected = np.round(GRADIENT * 255 / 4095)
    pixels = decode(tiff_16(GRADIENT.astype(dtype), photometric, order), max_pixels=MAX_PIXELS, config=TWELVE)
    assert np.abs(pixels[..., 1] - (expected if photometric else 255 - expected)).max() <= 1


def test_a_16_bit_tiff_whose_zero_is_white_is_no_negative() -> None:
    pixels = decode(tiff_16(GRADIENT.astype("u2") * 16, 0), max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(pixels[..., 0], 255 - (GRADIENT * 16 >> 8))


def test_what_is_not_a_number_becomes_black() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 5]], "f4")
    pixels = decode(tiff_16(values, 1), max_pixels=4, config=PixelsConfig(value_range=(0, 10)))
    assert pixels[0, :, 0].tolist() == [0, 255, 0, 128]


@pytest.mark.parametrize(
    ("head", "white"),
    [(b"P5\n# made by hand\n56 40\n4095\n", 4095), (b"P5 56 40 65535 ", 65535), (b"P6 56 40 4095\n", 4095)],
)
def test_pgm_and_ppm_of_more_than_8_bits_are_read_with_all_bits(head: bytes, white: int) -> None:
    channels = 3 if head.startswith(b"P6") else 1
    data = head + np.repeat(GRADIENT[..., None], channels, axis=2).astype(">u2").tobytes()
    samples = read_samples(data, max_pixels=MAX_PIXELS)
    assert samples.values.shape == (40, 56, channels)
    assert np.abs(samples.values[..., 0] - GRADIENT * (65535 / white)).max() <= 0.5
    with pytest.raises(BadImage, match="cut off PPM"):
        decode(data[:-1], max_pixels=MAX_PIXELS)


def test_8_bits_are_left_as_they_are() -> None:
    for name in ("png", "gif", "tiff", "bmp", "ppm", "lossless webp"):
        there, elsewhere = (
            decode(FILES[name], max_pixels=MAX_PIXELS, config=c) for c in (PixelsConfig(), TWELVE)
        )
        np.testing.assert_array_equal(there, elsewhere)


# Odd files.


def bmp(num_bits: int, masks: tuple[int, ...], values: np.ndarray, header_bytes: int = 108) -> bytes:
    """A BMP whose pixels are bit fields, from the bottom row to the top."""
    row_bytes = -(-values.shape[1] * num_bits // 32) * 4
    rows = b"".join(
        row.astype(f"<u{num_bits // 8}").tobytes().ljust(row_bytes, b"\0") for row in values[::-1]
    )
    head = struct.pack(
        "<IiiHHIIiiII", header_bytes, *values.shape[::-1], 1, num_bits, 3, len(rows), 0, 0, 0, 0
    )
    head += struct.pack(f"<{len(masks)}I", *masks)
    head = head.ljust(header_bytes, b"\0") if header_bytes > 40 else head
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(rows), 0, 0, 14 + len(head)) + head + rows


@pytest.mark.parametrize("header_bytes", [40, 56, 108, 124])
@pytest.mark.parametrize(
    ("bits", "masks"), [((5, 6, 5), (0xF800, 0x7E0, 0x1F)), ((5, 5, 5), (0x7C00, 0x3E0, 0x1F))]
)
def test_a_bmp_of_16_bits_is_read(bits: tuple[int, ...], masks: tuple[int, ...], header_bytes: int) -> None:
    levels = [(picture()[..., i].astype(int) >> (8 - bits[i])) for i in range(3)]
    fields = (levels[0] << (bits[1] + bits[2])) | (levels[1] << bits[2]) | levels[2]
    more = (0,) if header_bytes > 40 else ()
    pixels = decode(bmp(16, masks + more, fields, header_bytes), max_pixels=MAX_PIXELS)
    for i in range(3):
        np.testing.assert_array_equal(pixels[..., i], levels[i] * 255 // ((1 << bits[i]) - 1))


@pytest.mark.parametrize(("alpha", "level"), [(0, 40), (255, 40), (128, 147)])
def test_a_bmp_is_transparent_only_if_its_alpha_is_used(alpha: int, level: int) -> None:
    fields = np.full((4, 5), alpha << 24 | 40 << 16 | 40 << 8 | 40)
    pixels = decode(bmp(32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), fields), max_pixels=MAX_PIXELS)
    assert np.abs(pixels.astype(int) - level).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_tiff_of_a_few_bits_spans_the_range(bits: int) -> None:
    packed = np.full((8, bits), 0xF0, np.uint8)
    data = tiff_16(packed, 1)
    head = data.index(struct.pack("<HHI", 256, 4, 1)) + 8
    data = data[:head] + struct.pack("<I", 8) + data[head + 4 :]
    data = data.replace(struct.pack("<HHII", 258, 4, 1, 8), struct.pack("<HHII", 258, 4, 1, bits))
    pixels = decode(data, max_pixels=MAX_PIXELS)
    assert set(np.unique(pixels)) == {0, 255}


def test_what_opencv_refuses_has_a_second_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: None)
    for name in ("png", "lossless webp"):
        np.testing.assert_array_equal(decode(FILES[name], max_pixels=MAX_PIXELS), picture())


# Nothing is printed, by Python or in C.


@contextmanager
def stderr_of_process() -> Any:
    """A function that returns what has been written to file descriptor 2 meanwhile."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 10_000, 0).decode()
        finally:
            os.dup2(before, 2)
            os.close(before)


def odd_jpegs() -> dict[str, bytes]:
    data = encode(picture(), "JPEG", quality=92)
    tables, scan = data.find(b"\xff\xdb"), data.find(b"\xff\xda")
    spectral_end = scan + int.from_bytes(data[scan + 2 : scan + 4], "big")
    return {
        "bytes before the end": data[:-2] + b"\x12\x34\x56" + data[-2:],
        "bytes before a table": data[:tables] + b"\1\2\3" + data[tables:],
        "a scan of no band": data[:spectral_end] + b"\0" + data[spectral_end + 1 :],
        "an unknown transform": data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x07" + data[2:],
        "fill bytes": data[:tables] + b"\xff\xff" + data[tables:],
    }


def test_harmless_flaws_of_a_jpeg_cost_neither_the_picture_nor_a_line() -> None:
    expected = decode(encode(picture(), "JPEG", quality=92), max_pixels=MAX_PIXELS)
    with stderr_of_process() as written:
        for name, data in odd_jpegs().items():
            np.testing.assert_array_equal(decode(data, max_pixels=MAX_PIXELS), expected, err_msg=name)
        assert written() == ""


NOISY = {
    "png with a damaged profile": lambda: (
        FILES["png"][:33] + chunk(b"iCCP", b"icc\0\0" + b"x") + FILES["png"][33:]
    ),
    "png with damaged pixels": lambda: FILES["png"][:100] + b"\0" * 40 + FILES["png"][140:],
    "palette with alpha": lambda: encode(
        Image.fromarray(picture()).quantize(9), "PNG", transparency=bytes(9)
    ),
    "exif of nonsense": lambda: encode(
        picture(), "WEBP", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\x99" * 40
    ),
    "tiff of 9 channels": lambda: tiff_16(GRADIENT.astype("u1"), 2),
}


def test_no_decoder_prints(tmp_path: Any) -> None:
    files = {**odd_jpegs(), **{name: make() for name, make in NOISY.items()}}
    for number, data in enumerate(files.values()):
        (tmp_path / str(number)).write_bytes(data)
    code = (
        "import pathlib, sys\n"
        "from dinoray.pipeline.data.decoding.bad_image import BadImage\n"
        "from dinoray.pipeline.data.decoding.decode import decode\n"
        "for file in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: decode(file.read_bytes(), max_pixels=10**6)\n"
        "    except BadImage: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr + done.stdout == ""
