"""A JPEG of many scans, each of which may visit every pixel, is refused before any is decoded."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import FILES, MAX_PIXELS, encode, picture
from PIL import Image

from dinoray.pipeline.data.decoding import jpeg_segments
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.decoding.jpeg import open_image
from dinoray.pipeline.data.decoding.jpeg_segments import MAX_SCANS, count_scans

PROGRESSIVE = FILES["progressive jpeg"]
SCANS = 10
"""Of what libjpeg writes."""


def with_scans(data: bytes, more: int) -> bytes:
    """A progressive file whose last scan is there `more` times more."""
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + more * last + b"\xff\xd9"


def scans_one_by_one(data: bytes) -> int:
    """Scan headers up to the end of the picture, by a walk over every byte."""
    place, count = 2, 0
    while place + 1 < len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD7:
            place += 1  # coded pixels, fill bytes and restart markers
            continue
        if marker == 0xD9:
            break
        count += marker == 0xDA
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return count


def refusal(data: bytes) -> str:
    """The reason for which both ways to decode refuse a file."""
    with pytest.raises(BadImage) as opened:
        open_image(data, max_pixels=MAX_PIXELS)
    with pytest.raises(BadImage) as decoded:
        decode(data, max_pixels=MAX_PIXELS)
    assert opened.value.reason == decoded.value.reason
    return opened.value.reason


def test_a_scan_limit_refuses_a_file_that_takes_minutes() -> None:
    data = with_scans(PROGRESSIVE, MAX_SCANS)
    assert refusal(data) == f"too many scans: {MAX_SCANS + SCANS} of 56x40 pixels, at most {MAX_SCANS}"


def test_fewer_scans_are_allowed_the_larger_the_picture_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg_segments, "MAX_SCANNED_PIXELS", 56 * 40 * SCANS)
    assert decode(PROGRESSIVE, max_pixels=MAX_PIXELS).shape == (40, 56, 3)
    assert "11 of 56x40 pixels, at most 10" in refusal(with_scans(PROGRESSIVE, 1))
    monkeypatch.setattr(jpeg_segments, "MAX_SCANNED_PIXELS", 1)  # a single scan is always allowed
    assert decode(FILES["jpeg"], max_pixels=MAX_PIXELS).shape == (40, 56, 3)


def test_a_camera_s_largest_picture_is_within_the_limits() -> None:
    assert 100_000_000 * SCANS <= jpeg_segments.MAX_SCANNED_PIXELS


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_scans_are_counted(mode: str, options: dict) -> None:
    data = encode(Image.fromarray(picture()).convert(mode), "JPEG", **options)
    assert count_scans(data) == scans_one_by_one(data)
    assert (count_scans(data) == 1) is ("progressive" not in options)


def test_a_thumbnail_and_what_follows_the_picture_have_scans_of_their_own() -> None:
    thumbnail = b"Exif\0\0" + 700 * b"\xff\xda\x00\x08"
    film = np.random.default_rng(0).bytes(200_000) + 700 * b"\xff\xda"
    for plain in (FILES["jpeg"], PROGRESSIVE):
        data = encode(Image.open(io.BytesIO(plain)), "JPEG", exif=thumbnail, progressive=plain is PROGRESSIVE)
        assert data.count(b"\xff\xda") > MAX_SCANS
        assert decode(data + film, max_pixels=MAX_PIXELS).shape == (40, 56, 3)
        assert open_image(data + film, max_pixels=MAX_PIXELS).width == 56


def test_a_sequential_file_in_one_scan_is_passed_over_once_whatever_follows() -> None:
    data = with_scans(FILES["jpeg"], 3)
    assert scans_one_by_one(data) == 4
    assert count_scans(data) == 1


@given(st.binary(max_size=60), st.integers(2, len(PROGRESSIVE)))
def test_any_bytes_are_counted_without_an_error(noise: bytes, place: int) -> None:
    for data in (noise, b"\xff\xd8" + noise, PROGRESSIVE[:place] + noise, PROGRESSIVE[:place]):
        assert 0 <= count_scans(data) <= len(data)
