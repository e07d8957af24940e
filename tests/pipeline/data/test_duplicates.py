"""Which images repeat an earlier one: by their bytes, by their hashes and pictures, and in which order."""

import numpy as np
import pytest
from image_files import encode, scene
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dinoray.pipeline.data import duplicates
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.image_facts import ImageFacts, decode_whole, facts_table, measure_image
from dinoray.pipeline.data.decoding.jpeg import open_image
from dinoray.pipeline.data.duplicates import MOST_BITS, MOST_LEVELS, find_exact, find_near

RNG = np.random.default_rng(0)


def pairs(found: duplicates.Duplicates) -> list[tuple[int, int]]:
    return list(zip(found.images.tolist(), found.originals.tolist(), strict=True))


def near(hashes: list[int], levels: list[int] | None = None) -> list[tuple[int, int]]:
    """Of images whose pictures are of one level each."""
    small = np.repeat(np.array(levels or [0] * len(hashes), np.uint8)[:, None], 192, axis=1)
    return pairs(find_near(np.array(hashes, np.uint64), lambda images: small[images]))


def facts(data: bytes) -> ImageFacts:
    image = open_image(data)
    return measure_image(image, decode_whole(image))


def test_of_images_with_the_same_bytes_the_first_is_the_original() -> None:
    digests = np.array([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [1, 2]], np.uint64)
    assert pairs(find_exact(digests)) == [(2, 0), (4, 1), (5, 0)]


def test_hashes_that_differ_in_few_bits_anywhere_are_found_and_no_others() -> None:
    hashes = RNG.integers(0, 2**64, 400, np.uint64)
    for image in range(200, 400):
        flips = RNG.choice(64, MOST_BITS + image % 2, replace=False)  # every other one in a bit too many
        hashes[image] = hashes[image - 200] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    assert near(hashes.tolist()) == [(image, image - 200) for image in range(200, 400, 2)]


def test_pictures_decide_where_hashes_are_the_same() -> None:
    assert near([7, 7, 7, 7], [0, MOST_LEVELS, MOST_LEVELS + 1, 2 * MOST_LEVELS + 1]) == [(1, 0), (3, 2)]
    assert near([7, 7], [0, MOST_LEVELS + 1]) == []


def test_an_image_is_compared_with_originals_alone() -> None:
    """The third is near the second, which is left out for the first."""
    assert near([0b0, 0b11, 0b1111]) == [(1, 0)]
    assert near([0b0, 0b11, 0b1111, 0b111]) == [(1, 0), (3, 0)]


def test_very_many_alike_take_little_memory_and_are_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MOST_COMPARED", 5)
    monkeypatch.setattr(duplicates, "_MOST_CLOSE", 2)
    monkeypatch.setattr(duplicates, "_MOST_ORIGINALS", 2)
    assert near([7] * 1000) == [(image, 0) for image in range(1, 1000)]
    assert len(near(list(range(256)))) > 100


PHOTO = scene(400, 300)


def saved(image: Image.Image, **options: int) -> bytes:
    return encode(image, "JPEG", **{"quality": 90, **options})


@pytest.mark.parametrize(
    ("other", "is_near"),
    [
        (saved(PHOTO, quality=40), True),
        (saved(PHOTO.resize((200, 150), Image.Resampling.LANCZOS)), True),
        (encode(PHOTO, "PNG"), True),
        (encode(PHOTO, "WEBP"), True),
        (saved(ImageOps.mirror(PHOTO)), False),
        (saved(ImageOps.invert(PHOTO)), False),
        (saved(PHOTO.crop((60, 0, 400, 300))), False),
    ],
)
def test_a_picture_is_known_in_another_file_and_at_another_size(other: bytes, is_near: bool) -> None:
    table = facts_table([facts(saved(PHOTO)), facts(other)])
    small: NDArray[np.uint8] = np.frombuffer(b"".join(table["small"].to_pylist()), np.uint8).reshape(2, -1)
    found = find_near(table["difference_hash"].to_numpy(), lambda images: small[images])
    assert pairs(found) == ([(1, 0)] if is_near else [])


def is_whole(data: bytes, *, reduced: bool) -> bool:
    try:
        image = open_image(data)
        if reduced:
            decode_whole(image)
        else:
            image.decode(1, lambda num_bytes: np.empty(num_bytes, np.uint8))
    except BadImage:
        return False
    return True


@pytest.mark.parametrize("progressive", [False, True])
def test_a_reduced_picture_shows_the_damage_that_a_whole_one_does(progressive: bool) -> None:
    data = saved(PHOTO, progressive=progressive)
    damaged = [data[:length] for length in range(200, len(data), len(data) // 40)]
    for place in range(700, len(data), len(data) // 40):
        damaged.append(data[:place] + bytes([data[place] ^ 0x5A]) + data[place + 1 :])
    verdicts = [is_whole(one, reduced=True) for one in damaged]
    assert verdicts == [is_whole(one, reduced=False) for one in damaged]
    assert is_whole(data, reduced=True)
    assert verdicts.count(False) >= 40


def test_facts_are_of_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = facts(saved(PHOTO.rotate(90, expand=True), exif=exif.tobytes()))  # type: ignore[arg-type]
    upright = facts(saved(PHOTO))
    assert (turned.width, turned.height, turned.format, turned.channels) == (400, 300, "JPEG", "RGB, 8 bits")
    assert (turned.difference_hash ^ upright.difference_hash).bit_count() <= MOST_BITS
    gray = facts(encode(Image.new("L", (5, 3), 9), "PNG"))
    assert gray[:8] == ("PNG", "gray, 8 bits", 5, 3, gray.num_bytes, 9.0, 9.0, 9.0)
