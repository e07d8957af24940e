"""Formats that few programs write: what is decoded is what Pillow or arithmetic gives, or a bad image by its name."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import MAX_PIXELS, encode, picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dinoray.pipeline.data.config import PixelsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode, is_deep, read_samples
from dinoray.pipeline.data.decoding.signatures import content_of
from dinoray.pipeline.data.listing.names import role_of
from dinoray.pipeline.data.reading.bad_kinds import kind_of

tifffile = pytest.importorskip("tifffile")

RGB = Image.fromarray(picture())
GRAY = RGB.convert("L")
ALPHA = np.add.outer(np.arange(40), 3 * np.arange(56)).astype(np.uint8)
RGBA = Image.fromarray(np.dstack([picture(), ALPHA]))


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def gray_png(values: np.ndarray, bits: int, *more: bytes) -> bytes:
    """A gray PNG of 1 to 16 bits, with more chunks before the pixels."""
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        digits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]
        rows = [np.packbits(row).tobytes() for row in digits]
    head = struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + pixels + chunk(b"IEND", b"")


def animation(image_format: str) -> bytes:
    second = Image.fromarray(255 - picture())
    return encode(RGB, image_format, save_all=True, append_images=[second], lossless=True)


def pam(values: np.ndarray, kind: str, most: int = 255) -> bytes:
    height, width, depth = values.shape
    head = f"P7\n# by hand\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\nMAXVAL {most}\nTUPLTYPE {kind}\nENDHDR\n"
    return head.encode() + values.astype(">u2" if most > 255 else "u1").tobytes()


def over_white(data: bytes) -> np.ndarray:
    """The first picture of a file by Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


AS_PILLOW = {
    "CMYK TIFF": encode(RGB.convert("CMYK"), "TIFF"),
    "CMYK TIFF of 16 bits": tiff(
        np.asarray(RGB.convert("CMYK")).astype(np.uint16) * 257, photometric="separated"
    ),
    "YCbCr TIFF": encode(RGB.convert("YCbCr"), "TIFF"),
    "YCbCr TIFF, LZW": encode(RGB.convert("YCbCr"), "TIFF", compression="tiff_lzw"),
    "palette TIFF": encode(RGB.quantize(99), "TIFF"),
    "TIFF of 1 bit": encode(RGB.convert("1"), "TIFF"),
    "fax in TIFF": encode(RGB.convert("1"), "TIFF", compression="group4"),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "JPEG", quality=95),
    "animated WebP": animation("WEBP"),
    "animated GIF": animation("GIF"),
    "animated PNG": animation("PNG"),
    "GIF with a transparent colour": encode(RGB.quantize(9), "GIF", transparency=3),
    "gray and alpha PNG": encode(RGBA.convert("LA"), "PNG"),
    "PNG with a transparent colour": encode(RGB, "PNG", transparency=tuple(picture()[7, 9].tolist())),
    "gray PNG with a transparent level": encode(GRAY, "PNG", transparency=int(np.asarray(GRAY)[7, 9])),
    "palette PNG with a transparent colour": encode(RGB.quantize(9), "PNG", transparency=3),
    "PNG of 1 bit with a transparent level": encode(RGB.convert("1"), "PNG", transparency=1),
    "bitmap of text": b"P1\n3 2\n1 0 1\n0 1 0\n",
}


@pytest.mark.parametrize("name", AS_PILLOW)
def test_a_rare_format_is_what_pillow_shows(name: str) -> None:
    pixels = decode(AS_PILLOW[name], max_pixels=MAX_PIXELS)
    assert np.abs(pixels.astype(int) - over_white(AS_PILLOW[name])).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_a_gray_png_is_compared_with_its_own_bits(bits: int) -> None:
    most = (1 << bits) - 1
    values = np.add.outer(np.arange(5), np.arange(8)) % (most + 1)
    level = min(most, 1)
    data = gray_png(values, bits, chunk(b"tRNS", struct.pack(">H", level)))
    shown = values * 255 // most if bits < 16 else values >> 8
    pixels = decode(data, max_pixels=MAX_PIXELS, config=PixelsConfig(value_range=None))
    np.testing.assert_array_equal(pixels[..., 0], np.where(values == level, 255, shown))
    assert read_samples(data, max_pixels=MAX_PIXELS).values.shape == (5, 8, 2)


def test_a_transparent_colour_of_16_bits_is_laid_over_white() -> None:
    values = np.full((2, 3, 3), 40_000)
    values[0, 0] = 7
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(">HHH", 7, 7, 7)),
            chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""),
        ]
    )
    pixels = decode(data, max_pixels=9, config=PixelsConfig(value_range=None))
    assert pixels[..., 1].tolist() == [[255, 156, 156], [156, 156, 156]]


def test_gamma_and_a_profile_change_no_sample() -> None:
    values = np.arange(40, dtype=np.uint16).reshape(5, 8) * 1600
    plain = decode(gray_png(values, 16), max_pixels=MAX_PIXELS)
    gamma = chunk(b"gAMA", struct.pack(">I", 100_000))
    np.testing.assert_array_equal(decode(gray_png(values, 16, gamma), max_pixels=MAX_PIXELS), plain)
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100_000))
    np.testing.assert_array_equal(decode(encode(RGB, "PNG", pnginfo=info), max_pixels=MAX_PIXELS), picture())


@pytest.mark.parametrize("most", [200, 255, 4095])
@pytest.mark.parametrize(
    ("kind", "depth", "num_colours", "has_alpha"),
    [
        ("GRAYSCALE", 1, 1, False),
        ("GRAYSCALE_ALPHA", 2, 1, True),
        ("RGB", 3, 3, False),
        ("RGB_ALPHA", 4, 3, True),
        ("", 4, 4, False),
        ("RGB", 5, 5, False),
    ],
)
def test_a_pam_has_the_channels_that_its_type_names(
    kind: str, depth: int, num_colours: int, has_alpha: bool, most: int
) -> None:
    values = np.random.default_rng(0).integers(0, most + 1, (6, 7, depth))
    data = pam(values, kind, most)
    samples = read_samples(data, max_pixels=MAX_PIXELS)
    assert (samples.num_colours, samples.has_alpha) == (num_colours, has_alpha)
    assert np.abs(samples.values - values * ((65535 if most > 255 else 255) / most)).max() <= 0.51
    assert is_deep(data) == (most > 255)
    assert (role_of("a.PAM"), content_of(data[:265])) == ("image", "image")
    with pytest.raises(BadImage, match="cut off PAM"):
        decode(data[:-1], max_pixels=MAX_PIXELS)
    with pytest.raises(BadImage, match="too large: 7x6 pixels"):
        decode(data, max_pixels=41)


def test_black_and_white_in_a_pam_span_the_range_and_a_damaged_header_is_named() -> None:
    data = pam(np.array([[[0], [1]]]), "BLACKANDWHITE", 1)
    assert decode(data, max_pixels=2)[0, :, 0].tolist() == [0, 255]
    for damaged in (data.replace(b"ENDHDR", b"ENDHDX"), data.replace(b"DEPTH 1", b"DEPTH 0"), data[:9]):
        with pytest.raises(BadImage, match="damaged PAM: its header lacks"):
            decode(damaged, max_pixels=2)


@pytest.mark.parametrize(
    ("data", "channels"),
    [
        (AS_PILLOW["TIFF of 1 bit"], 1),
        (AS_PILLOW["fax in TIFF"], 1),
        (AS_PILLOW["gray and alpha PNG"], 2),
        (AS_PILLOW["gray PNG with a transparent level"], 2),
        (AS_PILLOW["palette PNG with a transparent colour"], 4),
        (AS_PILLOW["PNG with a transparent colour"], 4),
        (pam(np.zeros((2, 3, 13)), "MULTISPECTRAL"), 13),
        (AS_PILLOW["CMYK TIFF"], 3),
        (AS_PILLOW["CMYK JPEG"], 3),
    ],
)
def test_a_rare_format_has_the_channels_that_it_shows(data: bytes, channels: int) -> None:
    config = PixelsConfig(channels=channels)
    assert decode(data, max_pixels=MAX_PIXELS, config=config).shape[2] == channels
    other = PixelsConfig(channels=channels + 1 if channels > 3 else 5)
    with pytest.raises(BadImage, match=f"^{channels} channels?, but data.channels="):
        decode(data, max_pixels=MAX_PIXELS, config=other)


def subsampled() -> bytes:
    """Colours of half the pixels in each direction, without compression."""
    data = tiff(np.zeros((8, 8, 3), np.uint8), photometric="ycbcr", subsampling=(1, 1))
    return data.replace(struct.pack("<HHII", 279, 4, 1, 192), struct.pack("<HHII", 279, 4, 1, 96))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (tiff(np.zeros((9, 8, 3), np.uint8), photometric="cielab"), "CIELab, 3 channels of 8 bits"),
        (tiff(np.zeros((9, 8, 3), np.uint16), photometric="cielab"), "CIELab, 3 channels of 16 bits"),
        (tiff(np.zeros((9, 8, 3), np.uint8), photometric="icclab"), "ICCLab, 3 channels of 8 bits"),
        (tiff(np.zeros((9, 8, 3), np.float32), photometric="ycbcr"), "YCbCr, 3 channels of 32 bits"),
        (tiff(np.zeros((9, 8), np.uint16), photometric="cfa"), "a colour filter array, 1 channel of 16 bits"),
        (subsampled(), "YCbCr, 3 channels of 8 bits"),
    ],
)
def test_a_tiff_that_is_not_read_is_named_by_its_kind(data: bytes, what: str) -> None:
    with pytest.raises(BadImage, match=f"^TIFF of a kind that is not read: {what}, ") as raised:
        decode(data, max_pixels=MAX_PIXELS)
    assert raised.value.reason.endswith("; save it as RGB or gray")
    assert kind_of("corrupt", raised.value.reason) == "TIFF of a kind that is not read"
