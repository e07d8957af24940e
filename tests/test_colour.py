"""Pixel operations: the same factor gives the picture that PIL and torchvision give."""

import numpy as np
import pytest
from crops_oracle import Pixels, drawn_pictures, error, oracle_box, oracle_colour, replays
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from pipeline import colour
from pipeline.crop_params import OneCrop

JITTER = {
    "brightness": colour.adjust_brightness,
    "contrast": colour.adjust_contrast,
    "saturation": colour.adjust_saturation,
    "hue": colour.adjust_hue,
}


@pytest.fixture(scope="module")
def boxes() -> list[tuple[Pixels, OneCrop]]:
    """(resized box, parameters): the pictures that the operations start from."""
    return [(np.asarray(oracle_box(image, params)), params) for image, params in replays()]


@pytest.mark.parametrize(
    ("operation", "mean", "worst"),
    [
        ("brightness", 0.001, 0.01),
        ("contrast", 0.01, 0.2),
        ("saturation", 0.01, 0.5),
        # PIL keeps hue, saturation and value in 8 bits, cut off; OpenCV rounds them.
        ("hue", 0.5, 2.5),
    ],
)
def test_each_jitter_operation_is_torchvisions(
    boxes: list[tuple[Pixels, OneCrop]], operation: str, mean: float, worst: float
) -> None:
    errors = [
        error(JITTER[operation](box, factor), oracle_colour(Image.fromarray(box), operation, factor))
        for box, params in boxes
        for name, factor in params.jitter
        if name == operation
    ]
    assert np.mean(errors) < mean
    assert np.max(errors) < worst


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.9])
def test_jitter_factors_at_the_ends_mean_what_they_mean_to_torchvision(operation: str, factor: float) -> None:
    image = drawn_pictures()[3]
    assert (
        error(JITTER[operation](image, factor), oracle_colour(Image.fromarray(image), operation, factor))
        < 0.2
    )


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.25, 0.5])
def test_hue_turns_primary_colours_as_torchvision_does(shift: float) -> None:
    primaries = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [9, 9, 9]]], np.uint8)
    theirs = np.asarray(oracle_colour(Image.fromarray(primaries), "hue", shift)).astype(int)
    assert np.abs(colour.adjust_hue(primaries, shift).astype(int) - theirs).max() <= 6


def test_grayscale_is_pils(boxes: list[tuple[Pixels, OneCrop]]) -> None:
    for box, _ in boxes:
        assert error(colour.to_grayscale(box), F.to_grayscale(Image.fromarray(box), 3)) < 0.05


def test_blur_is_pils_edges_included(boxes: list[tuple[Pixels, OneCrop]]) -> None:
    errors = [
        error(colour.blur(box, sigma), Image.fromarray(box).filter(ImageFilter.GaussianBlur(sigma)))
        for box, sigma in [(box, params.blur_sigma) for box, params in boxes]
        if sigma is not None
    ]
    assert np.mean(errors) < 0.01
    assert np.max(errors) < 0.2


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.35, 1.3, 2.1, 7.5])
def test_blur_of_any_strength_is_pils(sigma: float) -> None:
    image = drawn_pictures()[3]
    theirs = Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))
    assert error(colour.blur(image, sigma), theirs) < 0.02


def test_blur_differs_from_pils_by_rounding_where_taps_are_sixths() -> None:
    # At sigma 1 every box is 1/6, 4/6, 1/6: many sums end in a half, which the two libraries round apart.
    image = drawn_pictures()[3]
    assert error(colour.blur(image, 1.0), Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.0))) < 0.7


@pytest.mark.parametrize("threshold", [0, 1, 128, 255, 256])
def test_solarization_is_pils_at_every_level(threshold: int) -> None:
    levels = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    theirs = np.asarray(ImageOps.solarize(Image.fromarray(levels), threshold=threshold))
    np.testing.assert_array_equal(colour.solarize(levels, threshold), theirs)
