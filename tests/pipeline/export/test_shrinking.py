"""Shrinking: what becomes of an image that has more pixels than it may, and how many it may have."""

import io
from typing import Any

import numpy as np
import pytest
from crops_oracle import photo_files
from hypothesis import example, given
from hypothesis import strategies as st
from image_files import encode, jpeg, pillow, scene
from PIL import Image

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.export.packing import shrink, shrink_pixels, shrunk_size

MOST = 40_000
ORIENTATION = 0x0112


def resized_by_pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pillow(data)).resize(size, Image.Resampling.LANCZOS)).astype(int)


def deviation(shrunk: bytes, data: bytes) -> float:
    """Mean absolute difference, in levels of 255, from the original as Pillow alone resizes it."""
    found = pillow(shrunk).astype(int)
    return float(np.abs(found - resized_by_pillow(data, found.shape[1::-1])).mean())


# Shrinking.


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_of_no_more_pixels_stays_the_very_same_bytes(image_format: str) -> None:
    data = encode(scene(200, 200), image_format, quality=95)
    assert shrink(data, max_pixels=200 * 200) is data
    assert shrink(data, max_pixels=200 * 100) != data


@pytest.mark.parametrize("kind", ["16 bits", "float"])
def test_an_image_of_more_than_8_bits_keeps_its_depth(kind: str) -> None:
    ramp = np.linspace(0, 4095, 300 * 200).reshape(200, 300)
    picture = Image.fromarray(ramp.astype(np.uint16 if kind == "16 bits" else np.float32))
    data = encode(picture, "PNG" if kind == "16 bits" else "TIFF")
    assert shrink(data, max_pixels=MOST) is data
    with pytest.raises(BadImage):
        shrink(data[: len(data) // 2], max_pixels=MOST)


def test_a_larger_image_becomes_a_jpeg_of_quality_95_with_its_colours_at_full_resolution() -> None:
    shrunk = Image.open(io.BytesIO(shrink(jpeg(scene(640, 480)), max_pixels=MOST)))
    assert shrunk.format == "JPEG"
    assert [sampling[1:3] for sampling in shrunk.layer] == [(1, 1)] * 3
    twin = Image.open(io.BytesIO(jpeg(scene(8, 8), quality=95)))
    assert shrunk.quantization == twin.quantization
    assert "exif" not in shrunk.info


def test_the_quality_can_be_chosen() -> None:
    data = jpeg(scene(640, 480))
    best, usual, least = (len(shrink(data, max_pixels=MOST, quality=q)) for q in (98, 95, 60))
    assert best > usual > least


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (201, 201), (1999, 1111), (5000, 20), (3000, 14)])
def test_the_picture_keeps_its_shape_and_has_as_many_pixels_as_it_may(size: tuple[int, int]) -> None:
    data = jpeg(scene(*size), quality=100)
    height, width = pillow(shrink(data, max_pixels=MOST)).shape[:2]
    assert width * height <= MOST
    assert width * height > MOST * (1 - 1.5 / min(width, height))
    scale = (MOST / (size[0] * size[1])) ** 0.5
    assert abs(width - size[0] * scale) <= 1
    assert abs(height - size[1] * scale) <= 1


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 10**6))
@example(99, 99, 1)
def test_a_size_is_shrunk_once_to_what_is_allowed_and_never_enlarged(
    width: int, height: int, most: int
) -> None:
    new_width, new_height = shrunk_size(width, height, most)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert new_width * new_height <= most
    assert ((new_width, new_height) == (width, height)) is (width * height <= most)
    assert shrunk_size(new_width, new_height, most) == (new_width, new_height)
    if width != height:
        assert shrunk_size(height, width, most) == (new_height, new_width)


def test_no_side_is_longer_than_a_jpeg_can_have() -> None:
    assert shrunk_size(1, 100_000, 100_000) == (1, 100_000)  # as it is
    assert shrunk_size(3, 100_000, 270_000) == (2, 65_500)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 5000), (1, 1)])
def test_a_line_of_pixels_is_shrunk_along_itself(size: tuple[int, int]) -> None:
    shrunk = shrink(encode(scene(*size), "BMP"), max_pixels=100)
    height, width = pillow(shrunk).shape[:2]
    assert min(width, height) == 1
    assert max(width, height) == min(100, max(size))


FORMATS = {
    "jpeg 4:2:0": jpeg(scene(900, 700), subsampling=2),
    "progressive jpeg": jpeg(scene(900, 700), progressive=True),
    "gray jpeg": jpeg(scene(900, 700).convert("L")),
    "cmyk jpeg": jpeg(scene(900, 700).convert("CMYK")),
    "png": encode(scene(900, 700), "PNG"),
    "palette png": encode(scene(900, 700).quantize(200), "PNG"),
    "gray png": encode(scene(900, 700).convert("L"), "PNG"),
    "webp": encode(scene(900, 700), "WEBP"),
    "tiff": encode(scene(900, 700), "TIFF"),
    "exactly a fourth": jpeg(scene(800, 800)),
    "over an eighth": jpeg(scene(2003, 1601)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_picture_is_the_one_that_pillow_resizes(name: str) -> None:
    shrunk = shrink(FORMATS[name], max_pixels=MOST)
    assert deviation(shrunk, FORMATS[name]) < 1.7  # levels of 255, some 1.2 of which are JPEG's at quality 95
    # What is left where the encoding costs next to nothing: a decoder's rounding, or another of its scales.
    best = shrink(FORMATS[name], max_pixels=MOST, quality=100)
    assert deviation(best, FORMATS[name]) < 1.2
    if "gray" in name:
        assert np.ptp(pillow(shrunk).astype(int), axis=-1).max() == 0


@pytest.mark.parametrize("name", ["jpeg 4:2:0", "over an eighth"])
def test_no_other_place_or_filter_comes_as_near(name: str) -> None:
    shrunk = shrink(FORMATS[name], max_pixels=MOST, quality=100)
    pixels, best = pillow(shrunk).astype(int), deviation(shrunk, FORMATS[name])
    expected = resized_by_pillow(FORMATS[name], pixels.shape[1::-1])
    for axis in (0, 1):
        for step in (-1, 1):
            assert np.abs(np.roll(pixels, step, axis) - expected).mean() > 4 * best
    nearest = Image.fromarray(pillow(FORMATS[name])).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)
    assert np.abs(np.asarray(nearest).astype(int) - expected).mean() > 4 * best


@pytest.mark.skipif(not photo_files(1), reason="needs ../shared/data/photos-small")
def test_photographs_deviate_by_no_more_than_their_encoding() -> None:
    for data in photo_files(20):
        shrunk = shrink(data, max_pixels=9000)
        if shrunk is not data:
            exact = resized_by_pillow(data, pillow(shrunk).shape[1::-1]).astype(np.uint8)
            encoding = np.abs(pillow(jpeg(Image.fromarray(exact), subsampling=0)).astype(int) - exact).mean()
            assert deviation(shrunk, data) < encoding + 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 480), (1203, 905)])  # the latter decoded at half its odd size
def test_it_stands_upright_and_says_nothing_of_turning(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = jpeg(scene(*size), exif=exif, subsampling=2)
    shrunk = shrink(data, max_pixels=MOST)
    height, width = np.asarray(Image.open(io.BytesIO(shrunk))).shape[:2]
    assert (width < height) is (orientation >= 5)
    assert Image.open(io.BytesIO(shrunk)).getexif().get(ORIENTATION) is None
    assert deviation(shrunk, data) < 2


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_picture_that_is_turned_lies_as_exactly_as_one_that_is_not(orientation: int) -> None:
    """Decoded at an eighth, the last row and column stand for one pixel each; turned, they may come first."""
    image, exif = scene(1601, 1201), Image.Exif()
    exif[ORIENTATION] = orientation
    plain, turned = jpeg(image), jpeg(image, exif=exif)
    deviations = [deviation(shrink(data, max_pixels=7500, quality=100), data) for data in (plain, turned)]
    assert deviations[1] < 1.2 * deviations[0]


def test_what_shrinking_would_not_make_smaller_stays_as_it_is() -> None:
    rough = jpeg(scene(320, 240), quality=20)
    assert shrink(rough, max_pixels=320 * 239) is rough


@pytest.mark.parametrize(
    "data",
    [
        b"<html>no picture</html>",
        b"",
        jpeg(scene(640, 480))[:-3000],
        jpeg(scene(100, 100))[:-300],
        encode(scene(100, 100), "PNG")[:-300],
    ],
    ids=["text", "empty", "large, cut off", "small, cut off", "small PNG, cut off"],
)
def test_what_is_no_whole_image_is_bad_whatever_its_size(data: bytes) -> None:
    with pytest.raises(BadImage):
        shrink(data, max_pixels=MOST)


def test_an_image_beyond_what_may_be_decoded_is_bad() -> None:
    with pytest.raises(BadImage, match="640x480"):
        shrink(jpeg(scene(640, 480)), max_pixels=MOST, most_pixels=640 * 479)


# How many pixels.


@pytest.mark.parametrize(
    ("crops", "pixels"),
    [
        ({}, 269_863),  # 96^2 / 0.05 * 1.21^2 = 184,320 * 1.4641
        ({"local_crop_scale": (0.1, 0.4)}, 183_657),  # now the global crops: 224^2 / 0.4 * 1.4641
        ({"num_local_crops": 0, "local_blur_prob": 0.5}, 183_657),
        ({"global_crop_scale": (0.25, 1)}, 293_851),  # 224^2 / 0.25 * 1.4641
        ({"global_crop_size": 32, "local_crop_size": 10, "local_crop_scale": (0.2, 1)}, 3749),
    ],
)
def test_the_crop_that_asks_for_most_decides(crops: dict[str, Any], pixels: int) -> None:
    assert shrink_pixels(CropsConfig(**crops)) == pixels


def test_without_slack_the_smallest_region_is_exactly_its_crop() -> None:
    assert shrink_pixels(CropsConfig(), slack=1.0) == 96 * 96 * 20
