"""Bytes that are no whole image: BadImage with a reason, and never another error or half a picture."""

import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import FILES, MAX_PIXELS, encode, picture
from paths import SHARED
from PIL import Image, UnidentifiedImageError

from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode

HOSTILE = SHARED / "hostile"


def refused(data: bytes, **limits) -> str:
    """The reason why these bytes are refused."""
    with pytest.raises(BadImage) as raised:
        decode(data, **{"max_pixels": MAX_PIXELS, **limits})
    assert "\n" not in raised.value.reason
    assert str(raised.value) == raised.value.reason
    return raised.value.reason


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_refused_or_whole(name: str, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(FILES[name]) - 1))
    try:
        pixels = decode(FILES[name][:kept], max_pixels=MAX_PIXELS)
    except BadImage:
        return
    # Some formats end with bytes that no pixel needs.
    assert len(FILES[name]) - kept < 30
    np.testing.assert_array_equal(pixels, decode(FILES[name], max_pixels=MAX_PIXELS))


def test_a_jpeg_2000_cut_off_between_tiles_is_refused() -> None:
    data = encode(picture(), "JPEG2000", tile_size=(16, 16))
    assert decode(data, max_pixels=MAX_PIXELS).shape == (40, 56, 3)
    starts = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\x90"]
    assert len(starts) == 12
    for start in starts:
        assert refused(data[:start]) == "cut off JPEG2000: no end of codestream"


@pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "gray jpeg", "cmyk jpeg"])
@pytest.mark.parametrize("cut", [1, 2, 3, 20, 200])
def test_a_jpeg_without_its_end_is_refused(name: str, cut: int) -> None:
    assert "cut off JPEG" in refused(FILES[name][:-cut])


def announced_size(data: bytes) -> tuple[int, int]:
    """Width and height by Pillow, or of a TIFF that it does not open by tifffile."""
    try:
        return Image.open(io.BytesIO(data)).size
    except UnidentifiedImageError:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            return page.imagewidth, page.imagelength


def test_of_a_tag_that_stands_twice_in_a_tiff_the_first_counts() -> None:
    damaged = bytearray(FILES["tiff"])
    samples_per_pixel, width = (tag.to_bytes(2, "little") for tag in (277, 256))
    place = damaged.index(samples_per_pixel)
    damaged[place : place + 2] = width  # with the value 3
    pixels = decode(bytes(damaged), max_pixels=1_000_000)
    assert pixels.shape[1::-1] == announced_size(bytes(damaged)) == (56, 40)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_picture_of_the_announced_size_or_are_refused(
    name: str, data: st.DataObject
) -> None:
    damaged = bytearray(FILES[name])
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[position] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = decode(bytes(damaged), max_pixels=1_000_000)
        except BadImage:
            return
        announced = announced_size(bytes(damaged))
    assert sorted(pixels.shape[:2]) == sorted(announced)
    assert pixels.dtype == np.uint8


@settings(max_examples=200, deadline=None)
@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF"]),
    rest=st.binary(max_size=200),
)
def test_noise_is_refused(start: bytes, rest: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(start + rest, max_pixels=1)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"\0" * 4096, "not an image"),
        (
            b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
            "not an image: starts with b'<?xml ve'",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
    ],
)
def test_what_is_no_image_is_said_to_be_none(data: bytes, reason: str) -> None:
    assert refused(data).startswith(reason)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds one row of it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * (1 + 3 * min(width, 1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 12_000, 30_000, 65_535])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_announces_too_many_pixels_is_refused_by_its_header(side: int) -> None:
    assert refused(png_header(side, side)).startswith("too large")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_turned_error_means_too_large() -> None:
    assert refused(png_header(12_000, 12_000), max_pixels=10**9).startswith("too large")


def test_the_largest_and_the_smallest_allowed_image_pass() -> None:
    data = FILES["png"]
    assert decode(data, max_pixels=40 * 56, min_side=40).shape == (40, 56, 3)
    assert refused(data, max_pixels=40 * 56 - 1) == "too large: 56x40 pixels, max_pixels=2239"
    assert refused(data, min_side=41) == "too small: 56x40 pixels, min_side=41"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (3000, 20)])
def test_extreme_shapes_decode(width: int, height: int) -> None:
    for image_format in ("JPEG", "PNG", "WEBP"):
        data = encode(np.full((height, width, 3), 90, np.uint8), image_format)
        assert decode(data, max_pixels=MAX_PIXELS).shape == (height, width, 3)


@pytest.mark.parametrize(("mode", "dtype"), [("F", "float32"), ("I", "int32")])
def test_samples_without_a_fixed_range_are_refused(mode: str, dtype: str) -> None:
    data = encode(Image.new(mode, (8, 8)), "TIFF")
    assert refused(data) == f"{dtype} samples have no fixed range; set data.value_range=[LOW, HIGH]"


def test_colours_that_are_not_rgb_are_refused() -> None:
    assert refused(encode(Image.new("LAB", (8, 8)), "TIFF")) == (
        "TIFF of a kind that is not read: CIELab, 3 channels of 8 bits, compression 1; save it as RGB or gray"
    )


def test_a_text_chunk_that_swells_to_64_mib_is_refused() -> None:
    text = b"comment\0\0" + zlib.compress(b"a" * (64 << 20))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    data = FILES["png"]
    assert refused(data[:33] + chunk + data[33:]).startswith("damaged header")


# A collection of awkward files, each with what a sane loader does.


def hostile_entries() -> list:
    manifest = HOSTILE / "manifest.json"
    if not manifest.exists():
        return [pytest.param({}, marks=pytest.mark.skip(reason="needs ../shared/data/hostile"))]
    entries = [
        e for e in json.loads(manifest.read_text()) if e["file"] and not e["key"].startswith("parquet/")
    ]
    return [pytest.param(entry, id=f"{entry['file']} {entry['what']}"[:60]) for entry in entries]


@pytest.mark.parametrize("entry", hostile_entries())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_hostile_file_is_treated_as_its_manifest_expects(entry: dict) -> None:
    data, expect = (HOSTILE / entry["file"]).read_bytes(), entry["expect"]
    if expect.startswith(("skip", "ignore")):
        refused(data)
        return
    assert expect.startswith("decode")
    pixels = decode(data, max_pixels=MAX_PIXELS)
    if "upright" in expect:
        assert pixels.shape == (128, 96, 3)
        first = next(HOSTILE / e.values[0]["file"] for e in hostile_entries() if "orientation 1" in e.id)
        reference = decode(first.read_bytes(), max_pixels=MAX_PIXELS)
        assert np.abs(pixels.astype(int) - reference).mean() < 3
    if "v>>8" in expect:
        assert 60 < pixels.mean() < 67
