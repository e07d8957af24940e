"""Whole crops of both kernels against PIL's and torchvision's with the same parameters: how far apart, at most.

Differences are in levels of 255. For scale: writing a picture as JPEG of quality 90 moves it by 1.2, leaving the
hue alone instead of turning it by 4, leaving the blur out by 6.
"""

import io

import numpy as np
import pytest
from crops_oracle import (
    KERNELS,
    PLAIN,
    Pixels,
    box_alone,
    cut_one,
    drawn_pictures,
    error,
    large_picture,
    oracle_box,
    oracle_crop,
    oracle_replays,
    replays,
    signal_to_noise,
)  # fmt: skip
from image_files import encode
from PIL import Image, ImageOps

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.multicrop import apply, crop_rng, cut, decode_denominator
from dinoray.pipeline.augment.params import CropParams, OneCrop, sample
from dinoray.pipeline.data.decoding.jpeg import Decoded

INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
ORIENTATION = 0x0112


@KERNELS
@INTERPOLATIONS
def test_the_resized_box_is_pils(kernel: str, interpolation: str) -> None:
    errors = [
        error(
            cut_one(image, box_alone(crop), kernel, interpolation=interpolation),
            oracle_box(image, crop, interpolation=interpolation),
        )
        for image, crop in replays()
    ]
    # PIL, and torch, round between the passes of the filter; the fast kernel does not.
    assert np.mean(errors) < {"numba": 0.25, "torch": 0.05}[kernel]
    assert np.max(errors) < {"numba": 0.3, "torch": 0.5}[kernel]


# kernel -> highest mean and 95th percentile of the difference, lowest median and 5th percentile of the ratio.
GATES = {"numba": (0.3, 0.6, 52, 47), "torch": (0.6, 1.2, 48, 41)}


@KERNELS
@INTERPOLATIONS
def test_the_whole_chain_is_the_reference_chain(kernel: str, interpolation: str) -> None:
    pairs = [
        (cut_one(image, crop, kernel, interpolation=interpolation), theirs)
        for (image, crop), theirs in zip(replays(), oracle_replays(interpolation), strict=True)
    ]
    errors = [error(ours, theirs) for ours, theirs in pairs]
    ratios = [signal_to_noise(ours, theirs) for ours, theirs in pairs]
    mean, most, median, least = GATES[kernel]
    assert np.mean(errors) < mean
    assert np.percentile(errors, 95) < most
    assert np.median(ratios) > median
    assert np.percentile(ratios, 5) > least


@KERNELS
@pytest.mark.parametrize("name", ["global 1", "global 2", "local"])
def test_crops_have_as_much_fine_detail_as_the_references(name: str, kernel: str) -> None:
    def detail(crop: Pixels) -> float:
        gray = crop.mean(axis=-1)
        laplacian = 4 * gray[1:-1, 1:-1] - gray[2:, 1:-1] - gray[:-2, 1:-1] - gray[1:-1, 2:] - gray[1:-1, :-2]
        return float((laplacian**2).mean())

    which = {"global 1": [0], "global 2": [1], "local": range(2, 10)}[name]
    chosen = [n for n in range(len(replays())) if n % 10 in which]
    ratios = [
        detail(cut_one(*replays()[n], kernel)) / detail(theirs)
        for n in chosen
        if detail(theirs := oracle_replays("bicubic")[n]) > 1
    ]
    assert len(ratios) > 0.8 * len(chosen)
    assert 0.98 < np.mean(ratios) < 1.02


@KERNELS
@INTERPOLATIONS
@pytest.mark.parametrize("size", [8, 17, 98, 100])
def test_crops_of_any_size_from_boxes_of_any_fraction_are_pils(
    size: int, interpolation: str, kernel: str
) -> None:
    image = drawn_pictures()[0]
    rng, errors = np.random.default_rng(size), []
    for _ in range(60):
        height, width = rng.integers(20, 640, 2)
        crop = PLAIN._replace(height=int(height), width=int(width), size=size)
        crop = crop._replace(top=int(rng.integers(0, 700 - height)), left=int(rng.integers(0, 940 - width)))
        x, y = rng.uniform(0, 0.99, 2)
        picture = Decoded(image, 2, x, y)
        seen = crop._replace(
            top=crop.top / 2 + y, left=crop.left / 2 + x, height=crop.height / 2, width=crop.width / 2
        )
        ours = cut_one(picture, crop, kernel, interpolation=interpolation)
        errors.append(error(ours, oracle_box(image, seen, interpolation=interpolation)))
    # Torch begins at whole pixels, and the fallback finds one that nearly is where the box begins.
    assert np.mean(errors) < {"numba": 0.25, "torch": 1.2}[kernel]
    assert np.max(errors) < {"numba": 0.4, "torch": 4.0}[kernel]


@KERNELS
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 2), (2, 1), (1, 5000), (5000, 1), (5000, 20), (20, 5000), (30, 12000), (7, 3)]
)
def test_pictures_of_extreme_shapes_have_pils_crops(shape: tuple[int, int], kernel: str) -> None:
    rng = np.random.default_rng(sum(shape))
    image = (80 + 90 * rng.random((*shape, 1)) + 20 * rng.random((*shape, 3))).astype(np.uint8)
    config = CropsConfig(global_crop_size=100, local_crop_size=17, kernel=kernel)
    params = sample(crop_rng(0, 0, f"{shape}"), shape[1], shape[0], config)
    crops = cut(Decoded(image, 1, 0.0, 0.0), params)
    for ours, crop in zip([*crops.global_crops, *crops.local_crops], params.crops, strict=True):
        assert error(ours, oracle_crop(image, crop)) < {"numba": 0.75, "torch": 3.0}[kernel]


# JPEGs that are decoded at a fraction of their size.


def assert_close(pairs: list[tuple[Pixels, Pixels]], kernel: str) -> None:
    """Hold (ours, theirs) to what reduced decoding may cost."""
    errors = [error(ours, theirs) for ours, theirs in pairs]
    assert np.mean(errors) < {"numba": 0.45, "torch": 0.8}[kernel]
    assert np.percentile(errors, 95) < {"numba": 0.8, "torch": 1.6}[kernel]


def replayed(data: bytes, upright: Pixels, config: CropsConfig, epoch: int) -> list[tuple[Pixels, Pixels]]:
    """(crop of a JPEG file by a kernel, crop of the whole picture by the oracle)."""
    params = sample(crop_rng(0, epoch, "large"), upright.shape[1], upright.shape[0], config)
    crops = apply(data, params)
    return [
        (ours, oracle_crop(upright, crop))
        for ours, crop in zip([*crops.global_crops, *crops.local_crops], params.crops, strict=True)
    ]


@KERNELS
@pytest.mark.parametrize("slack", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("width", "height"), [(2048, 1536), (1999, 1501)])
def test_crops_of_a_reduced_picture_are_those_of_the_whole(
    width: int, height: int, slack: float, kernel: str
) -> None:
    data = encode(large_picture(width, height), "JPEG", quality=88)
    upright = np.array(Image.open(io.BytesIO(data)))
    config = CropsConfig(kernel=kernel, decode_slack=slack)
    for epoch in (1, 3):
        params = sample(crop_rng(0, epoch, "large"), width, height, config)
        assert decode_denominator(params) == {1.0: 4, 1.25: 2, 2.0: 2}[slack]
    assert_close(replayed(data, upright, config, 1) + replayed(data, upright, config, 3), kernel)


@KERNELS
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("denominator", [1, 2, 4])
def test_crops_of_a_turned_file_are_those_of_the_upright_picture(
    denominator: int, orientation: int, kernel: str
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encode(large_picture(1003, 749), "JPEG", quality=90, exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    # Regions of 223 pixels and more, and crops that are smaller by just enough for this denominator.
    size = int(223 / 1.25 / denominator)
    scale = {"global_crop_scale": (0.2, 0.4), "local_crop_scale": (0.15, 0.2)}
    config = CropsConfig(
        **scale, global_crop_size=size, local_crop_size=size, kernel=kernel, num_local_crops=2
    )
    params = sample(crop_rng(0, 0, "large"), upright.shape[1], upright.shape[0], config)
    assert decode_denominator(params) == denominator
    if denominator > 1:
        assert_close([pair for epoch in range(3) for pair in replayed(data, upright, config, epoch)], kernel)
        return
    ours, theirs = apply(data, params), cut(Decoded(upright, 1, 0.0, 0.0), params)
    np.testing.assert_array_equal(ours.global_crops, theirs.global_crops)
    np.testing.assert_array_equal(ours.local_crops, theirs.local_crops)


@pytest.mark.parametrize(
    ("sides", "sizes", "slack", "denominator"),
    [
        ([(448, 448), (192, 192)], [224, 96], 1.0, 2),
        ([(448, 447), (192, 192)], [224, 96], 1.0, 1),
        ([(448, 448), (191, 192)], [224, 96], 1.0, 1),
        ([(448, 448), (192, 192)], [224, 96], 1.01, 1),
        ([(900, 2000), (480, 500)], [224, 96], 1.0, 4),
        ([(900, 2000), (480, 500)], [224, 96], 1.25, 2),
        ([(900, 2000), (480, 500)], [224, 96], 2.0, 2),
        ([(900, 2000), (480, 500)], [224, 96], 2.6, 1),
        ([(9000, 9000), (9000, 9000)], [224, 96], 1.25, 8),
        ([(100, 9000), (9000, 9000)], [224, 96], 1.0, 1),
    ],
)
def test_the_picture_is_reduced_as_far_as_its_tightest_region_allows(
    sides: list[tuple[int, int]], sizes: list[int], slack: float, denominator: int
) -> None:
    config = CropsConfig(decode_slack=slack)
    crops = [
        PLAIN._replace(height=height, width=width, size=size)
        for (height, width), size in zip(sides, sizes, strict=True)
    ]
    params = CropParams(9000, 9000, np.empty(0), config).with_crops(crops)
    assert decode_denominator(params) == denominator


def test_parameters_that_were_not_drawn_read_back_as_they_were_given() -> None:
    crop = OneCrop(3, 4, 50, 60, True, (("hue", -0.03), ("contrast", 1.2)), True, 1.5, 99, 40)
    params = CropParams(100, 100, np.empty(0), CropsConfig()).with_crops([crop, PLAIN])
    assert params.crops == (crop, PLAIN)
