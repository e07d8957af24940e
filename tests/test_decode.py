"""Decoding: a whole upright RGB picture or BadImage, whatever the bytes; and the crop for evaluation."""

import io
import json
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from crops_oracle import drawn_pictures, photo_files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from pipeline.decode import BadImage, decode, eval_crop

Pixels = npt.NDArray[np.uint8]

HOSTILE = Path(__file__).parents[2] / "shared" / "data" / "hostile"
MAX_PIXELS = 50_000_000
ORIENTATION = 0x0112


def picture() -> Pixels:
    """A small picture that no flip or turn leaves the same: uint8 [40,56,3]."""
    y, x = np.mgrid[:40, :56]
    texture = np.random.default_rng(0).normal(0, 8, (40, 56, 1))
    return np.clip(np.stack([4 * x, 3 * y + x, 180 - 2 * y], axis=-1) + texture, 0, 255).astype(np.uint8)


def encode(image: Image.Image | Pixels, image_format: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def pillow(data: bytes) -> Pixels:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def refused(data: bytes, **limits) -> str:
    """The reason why these bytes are refused."""
    with pytest.raises(BadImage) as raised:
        decode(data, **{"max_pixels": MAX_PIXELS, **limits})
    assert "\n" not in raised.value.reason
    assert str(raised.value) == raised.value.reason
    return raised.value.reason


FILES = {
    "jpeg": encode(picture(), "JPEG", quality=90),
    "progressive jpeg": encode(picture(), "JPEG", progressive=True),
    "gray jpeg": encode(Image.fromarray(picture()).convert("L"), "JPEG"),
    "cmyk jpeg": encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95),
    "png": encode(picture(), "PNG"),
    "palette png": encode(Image.fromarray(picture()).quantize(200), "PNG"),
    "1-bit png": encode(Image.fromarray(picture()).convert("1"), "PNG"),
    "webp": encode(picture(), "WEBP"),
    "lossless webp": encode(picture(), "WEBP", lossless=True),
    "bmp": encode(picture(), "BMP"),
    "palette bmp": encode(Image.fromarray(picture()).quantize(200), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "lzw tiff": encode(picture(), "TIFF", compression="tiff_lzw"),
    "gif": encode(picture(), "GIF"),
    "jpeg 2000": encode(picture(), "JPEG2000"),
    "ppm": encode(picture(), "PPM"),
}
if features.check("avif"):
    FILES["avif"] = encode(picture(), "AVIF")


# Pictures come out as people see them.


@pytest.mark.parametrize("name", FILES)
def test_every_format_decodes_as_pillow_shows_it(name: str) -> None:
    pixels = decode(FILES[name], max_pixels=MAX_PIXELS)
    assert pixels.shape == (40, 56, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    # The libraries convert CMYK with different rounding; all else is the same to the last level.
    assert np.abs(pixels.astype(int) - pillow(FILES[name])).max() <= (1 if "cmyk" in name else 0)


def test_channels_come_in_the_order_red_green_blue() -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    for image_format in ("PNG", "JPEG", "GIF"):
        assert decode(encode(red, image_format), max_pixels=64).mean(axis=(0, 1)).argmax() == 0


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_and_nonsense_ignored(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(image_format, {})
    pixels = decode(encode(picture(), image_format, exif=exif, **options), max_pixels=MAX_PIXELS)
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
            6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation)  # fmt: skip
    upright = Image.fromarray(picture())
    if turn is not None:
        upright = upright.transpose(Image.Transpose[turn])
    assert pixels.shape == np.asarray(upright).shape
    # JPEG's own loss; the smallest for a wrong turn is above 20.
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 4


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", [b"II*\0\xff\xff\xff\x7f" + b"\x99" * 40, b"nonsense", b""])
def test_a_damaged_exif_block_does_not_cost_the_picture(image_format: str, block: bytes) -> None:
    data = encode(picture(), image_format, exif=b"Exif\0\0" + block)
    assert decode(data, max_pixels=MAX_PIXELS).shape == (40, 56, 3)


@pytest.mark.parametrize("extension", [".png", ".tiff", ".jp2"])
def test_16_bit_gray_keeps_its_high_byte(extension: str) -> None:
    gray = (np.add.outer(np.arange(40), np.arange(56)) * 600).astype(np.uint16)
    pixels = decode(cv2.imencode(extension, gray)[1].tobytes(), max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(pixels, np.repeat((gray >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize(("extension", "tolerance"), [(".png", 0), (".jp2", 1)])
def test_16_bit_colour_keeps_its_high_byte_or_rounds_to_it(extension: str, tolerance: int) -> None:
    gray = (np.add.outer(np.arange(40), np.arange(56)) * 600).astype(np.uint16)
    bgr = np.stack([gray, gray // 2, gray // 3], axis=-1)
    pixels = decode(cv2.imencode(extension, bgr)[1].tobytes(), max_pixels=MAX_PIXELS)
    assert np.abs(pixels.astype(int) - (bgr[..., ::-1] >> 8)).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_laid_over_white(mode: str, image_format: str) -> None:
    image = Image.new(mode, (9, 8), (0,) * len(mode))  # black, and wholly transparent
    image.paste((100,) * (len(mode) - 1) + (255,), (0, 0, 3, 8))
    image.paste((0,) * (len(mode) - 1) + (128,), (3, 0, 6, 8))
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    pixels = decode(encode(image, image_format, **options), max_pixels=MAX_PIXELS)
    assert pixels[:, :3].min() == pixels[:, :3].max() == 100
    assert pixels[:, 3:6].min() == pixels[:, 3:6].max() == 127
    assert pixels[:, 6:].min() == 255


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.paste(0, (0, 0, 2, 4))
    for image_format in ("PNG", "GIF"):
        pixels = decode(encode(image, image_format, transparency=1), max_pixels=MAX_PIXELS)
        assert pixels[0, 0].tolist() == [10, 20, 30]
        assert pixels[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_declared_transparent_is_white(mode: str) -> None:
    seen, unseen = ((10, 20, 30), (90, 90, 90)) if mode == "RGB" else (10, 90)
    image = Image.new(mode, (4, 4), unseen)
    image.paste(seen, (0, 0, 2, 4))
    pixels = decode(encode(image, "PNG", transparency=unseen), max_pixels=MAX_PIXELS)
    assert pixels[0, 0].tolist() == ([10, 20, 30] if mode == "RGB" else [10, 10, 10])
    assert pixels[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(image_format: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    pixels = decode(data, max_pixels=MAX_PIXELS)
    assert pixels.shape == (10, 12, 3)
    assert pixels[5, 5].tolist() == [200, 0, 0]


def test_an_animated_png_gives_the_picture_that_viewers_without_animation_show() -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)
    assert decode(data, max_pixels=MAX_PIXELS)[5, 5].tolist() == [200, 0, 0]


def test_bytes_after_the_picture_are_ignored() -> None:
    first, second = FILES["jpeg"], encode(255 - picture(), "JPEG")
    alone = decode(first, max_pixels=MAX_PIXELS)
    np.testing.assert_array_equal(decode(first + b"\xa5" * 5000, max_pixels=MAX_PIXELS), alone)
    np.testing.assert_array_equal(decode(first + second, max_pixels=MAX_PIXELS), alone)


@pytest.mark.skipif(not photo_files(1), reason="needs ../shared/data/photos-small")
def test_photographs_decode_as_pillow_shows_them() -> None:
    for file in photo_files(40):
        np.testing.assert_array_equal(decode(file, max_pixels=MAX_PIXELS), pillow(file))


# What is refused, and that nothing else happens.


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
        announced = Image.open(io.BytesIO(damaged)).size
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


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_a_fixed_range_are_refused(mode: str) -> None:
    data = encode(Image.new(mode, (8, 8)), "TIFF")
    assert refused(data) == f"not 8 or 16 bits a channel: Pillow mode {mode}"


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


# Evaluation.


@pytest.mark.parametrize("size", [96, 224])
def test_the_evaluation_crop_is_torchvisions_resize_and_center_crop(size: int) -> None:
    reference = Compose([Resize(round(size * 256 / 224), InterpolationMode.BICUBIC), CenterCrop(size)])
    for image in drawn_pictures()[:4]:
        theirs = np.asarray(reference(Image.fromarray(image))).astype(int)
        assert np.abs(eval_crop(image, size=size).astype(int) - theirs).mean() < 0.05


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (20, 3000), (300, 301)])
def test_every_shape_has_an_evaluation_crop(shape: tuple[int, int]) -> None:
    crop = eval_crop(np.full((*shape, 3), 50, np.uint8), size=224)
    assert crop.shape == (224, 224, 3)
    assert crop.dtype == np.uint8
    assert (crop == 50).all()
