"""Pixel operations of both kernels: the same factor gives the picture that PIL and torchvision give.

Resizing a picture to its own size changes no pixel: so each operation is seen alone, on the same input.
"""

import numpy as np
import pytest
from crops_oracle import KERNELS, Pixels, drawn_pictures, error, operate, oracle_box, oracle_colour, replays
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as F

from dinoray.pipeline.augment.kernels import opencv_colour as colour
from dinoray.pipeline.augment.params import OneCrop


@pytest.fixture(scope="module")
def boxes() -> list[tuple[Pixels, OneCrop]]:
    """(resized box, parameters): the pictures that the operations start from."""
    return [(np.array(oracle_box(image, params)), params) for image, params in replays()]


def noise(side: int) -> Pixels:
    """A square picture of all colours, where every rounding comes to light."""
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)


def blurred(image: Pixels, sigma: float) -> Pixels:
    """The picture after PIL's blur."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_of_the_fast_kernel_are_torchvisions_to_the_pixel(
    boxes: list[tuple[Pixels, OneCrop]], operation: str
) -> None:
    for box, params in boxes:
        if factor := dict(params.jitter).get(operation):
            ours = operate(box, "numba", jitter=((operation, factor),))
            np.testing.assert_array_equal(ours, oracle_colour(Image.fromarray(box), operation, factor))


def test_hue_of_the_fast_kernel_is_torchvisions_but_for_single_levels(
    boxes: list[tuple[Pixels, OneCrop]],
) -> None:
    errors, differing = [], []
    for box, params in boxes:
        if factor := dict(params.jitter).get("hue"):
            ours = operate(box, "numba", jitter=(("hue", factor),))
            theirs = np.asarray(oracle_colour(Image.fromarray(box), "hue", factor))
            errors.append(error(ours, theirs))
            differing.append((ours != theirs).any(axis=-1).mean())
    assert np.mean(errors) < 0.02
    assert np.max(errors) < 0.1
    assert np.mean(differing) < 0.01


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
def test_each_jitter_operation_of_the_fallback_is_nearly_torchvisions(
    boxes: list[tuple[Pixels, OneCrop]], operation: str, mean: float, worst: float
) -> None:
    errors = [
        error(
            operate(box, "torch", jitter=((operation, factor),)),
            oracle_colour(Image.fromarray(box), operation, factor),
        )
        for box, params in boxes
        for name, factor in params.jitter
        if name == operation
    ]
    assert np.mean(errors) < mean
    assert np.max(errors) < worst


@pytest.mark.parametrize(("kernel", "gate"), [("numba", 0), ("torch", 0.2)])
@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.9, 4.0])
def test_jitter_factors_at_the_ends_mean_what_they_mean_to_torchvision(
    operation: str, factor: float, kernel: str, gate: float
) -> None:
    for image in (drawn_pictures()[2], noise(17)):
        ours = operate(image, kernel, jitter=((operation, factor),))
        assert error(ours, oracle_colour(Image.fromarray(image), operation, factor)) <= gate


@pytest.mark.parametrize(("kernel", "gate"), [("numba", 1), ("torch", 6)])
@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.25, 0.5])
def test_hue_turns_primary_colours_as_torchvision_does(shift: float, kernel: str, gate: int) -> None:
    primaries = np.zeros((9, 9, 3), np.uint8)
    colours = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [9, 9, 9], [0, 0, 0], [255, 255, 255]]
    primaries[: len(colours)] = np.array(colours)[:, None]
    theirs = np.asarray(oracle_colour(Image.fromarray(primaries), "hue", shift)).astype(int)
    assert np.abs(operate(primaries, kernel, jitter=(("hue", shift),)).astype(int) - theirs).max() <= gate


@pytest.mark.parametrize(("kernel", "gate"), [("numba", 0), ("torch", 0.05)])
def test_grayscale_is_pils(boxes: list[tuple[Pixels, OneCrop]], kernel: str, gate: float) -> None:
    for box, _ in [*boxes[::3], (noise(33), None)]:
        assert error(operate(box, kernel, gray=True), F.to_grayscale(Image.fromarray(box), 3)) <= gate


def test_blur_of_the_fast_kernel_is_pils_to_the_pixel(boxes: list[tuple[Pixels, OneCrop]]) -> None:
    for box, params in boxes:
        if params.blur_sigma is not None:
            ours = operate(box, "numba", blur_sigma=params.blur_sigma)
            np.testing.assert_array_equal(ours, blurred(box, params.blur_sigma))


@settings(max_examples=150)
@given(sigma=st.floats(0, 8), side=st.sampled_from([8, 17, 96, 98, 224]))
def test_blur_of_the_fast_kernel_is_pils_for_every_strength_and_size(sigma: float, side: int) -> None:
    image = noise(side)
    np.testing.assert_array_equal(operate(image, "numba", blur_sigma=sigma), blurred(image, sigma))


# At 1.3 and 2.1 PIL's own float32 tells: weights made in float64 are off in their last bit.
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.3, 2**0.5, 2.0, 2.1, 6**0.5, 3.7, 7.5, 20.0])
@pytest.mark.parametrize("side", [8, 17, 96, 98, 224])
def test_blur_of_the_fast_kernel_is_pils_on_noise(side: int, sigma: float) -> None:
    image = noise(side)
    np.testing.assert_array_equal(operate(image, "numba", blur_sigma=sigma), blurred(image, sigma))


def test_blur_of_the_fallback_is_nearly_pils_edges_included(boxes: list[tuple[Pixels, OneCrop]]) -> None:
    errors = [
        error(operate(box, "torch", blur_sigma=params.blur_sigma), blurred(box, params.blur_sigma))
        for box, params in boxes
        if params.blur_sigma is not None
    ]
    assert np.mean(errors) < 0.01
    assert np.max(errors) < 0.2


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.35, 1.3, 2.1, 7.5])
def test_blur_of_the_fallback_is_nearly_pils_for_any_strength(sigma: float) -> None:
    image = drawn_pictures()[2]
    assert error(operate(image, "torch", blur_sigma=sigma), blurred(image, sigma)) < 0.02


def test_blur_of_the_fallback_differs_from_pils_by_rounding_where_taps_are_sixths() -> None:
    # At sigma 1 every box is 1/6, 4/6, 1/6: many sums end in a half, which the two libraries round apart.
    image = drawn_pictures()[2]
    assert error(operate(image, "torch", blur_sigma=1.0), blurred(image, 1.0)) < 0.7


@KERNELS
@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarization_is_pils_at_every_level(threshold: int, kernel: str) -> None:
    levels = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    theirs = np.asarray(ImageOps.solarize(Image.fromarray(levels), threshold=threshold))
    np.testing.assert_array_equal(operate(levels, kernel, solarize=threshold), theirs)


@KERNELS
def test_solarization_from_256_on_inverts_nothing(kernel: str) -> None:
    np.testing.assert_array_equal(operate(noise(16), kernel, solarize=256), noise(16))


def test_operations_of_the_fallback_leave_their_input_alone() -> None:
    image = noise(16)
    colour.solarize(colour.blur(colour.to_grayscale(colour.adjust_hue(image, 0.1)), 1.0), 128)
    for operation in (colour.adjust_brightness, colour.adjust_contrast, colour.adjust_saturation):
        operation(image, 1.3)
    for operation, argument in ((colour.blur, 1.0), (colour.solarize, 9), (colour.adjust_hue, 0.1)):
        operation(image, argument)
    np.testing.assert_array_equal(image, noise(16))
