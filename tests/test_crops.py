"""Multi-crop: what is sampled has the paper's distribution, what is applied is what PIL makes of it."""

import itertools
import math
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from crops_oracle import Pixels, drawn_pictures, oracle_box, oracle_colour, oracle_crop, pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from pipeline import colour
from pipeline.crop_params import CropParams, CropsConfig, sample_crops
from pipeline.crops import Crops, apply_crop, crop_bytes, crop_rng, describe_crops, multi_crop, resize_box

PLAIN = CropParams(
    top=0, left=0, height=1, width=1, flip=False, jitter=(), gray=False, blur_sigma=None, solarize=False
)
JITTER = {
    "brightness": colour.adjust_brightness,
    "contrast": colour.adjust_contrast,
    "saturation": colour.adjust_saturation,
    "hue": colour.adjust_hue,
}


# Same parameters, same picture: ours against PIL and torchvision. Errors are mean absolute, in levels of 255.


@pytest.fixture(scope="module")
def replays() -> list[tuple[Pixels, CropParams, int]]:
    """(image, parameters, size) of all crops of all test pictures."""
    config = CropsConfig()
    return [
        (image, params, config.global_crop_size if i < 2 else config.local_crop_size)
        for n, image in enumerate(pictures())
        for i, params in enumerate(
            sample_crops(crop_rng(0, 0, f"picture {n}"), image.shape[1], image.shape[0], config)
        )
    ]


@pytest.fixture(scope="module")
def boxes(replays: list[tuple[Pixels, CropParams, int]]) -> list[tuple[Pixels, CropParams]]:
    """(resized box, parameters) of the same crops: the picture that colour operations start from."""
    return [(np.asarray(oracle_box(image, params, size=size)), params) for image, params, size in replays]


def error(ours: Pixels, theirs: Pixels | Image.Image) -> float:
    return float(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).mean())


def test_the_resized_box_is_pils(replays: list[tuple[Pixels, CropParams, int]]) -> None:
    errors = [error(resize_box(i, p, size=size), oracle_box(i, p, size=size)) for i, p, size in replays]
    assert np.mean(errors) < 0.05
    assert np.max(errors) < 0.5


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
    boxes: list[tuple[Pixels, CropParams]], operation: str, mean: float, worst: float
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


def test_grayscale_is_pils(boxes: list[tuple[Pixels, CropParams]]) -> None:
    for box, _ in boxes:
        assert error(colour.to_grayscale(box), F.to_grayscale(Image.fromarray(box), 3)) < 0.05


def test_blur_is_pils_edges_included(boxes: list[tuple[Pixels, CropParams]]) -> None:
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


def test_the_whole_chain_is_the_reference_chain(replays: list[tuple[Pixels, CropParams, int]]) -> None:
    errors, psnr = [], []
    for image, params, size in replays:
        ours = apply_crop(image, params, size=size, solarize_threshold=128).astype(int)
        theirs = oracle_crop(image, params, size=size, solarize_threshold=128).astype(int)
        errors.append(np.abs(ours - theirs).mean())
        psnr.append(10 * math.log10(255**2 / max(((ours - theirs) ** 2).mean(), 1e-3)))
    assert np.mean(errors) < 0.6
    assert np.percentile(errors, 95) < 1.2
    assert np.median(psnr) > 48
    assert np.percentile(psnr, 5) > 40


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(["contrast", "brightness", "saturation"])))
def test_operations_run_in_the_order_of_the_paper(order: tuple[str, ...], gray: bool) -> None:
    image = drawn_pictures()[3]
    factors = {"contrast": 1.5, "brightness": 1.4, "saturation": 0.2}
    jitter = tuple((operation, factors[operation]) for operation in order)
    params = PLAIN._replace(
        height=100, width=120, flip=True, jitter=jitter, gray=gray, blur_sigma=1.6, solarize=True
    )
    ours = apply_crop(image, params, size=96, solarize_threshold=150)
    assert error(ours, oracle_crop(image, params, size=96, solarize_threshold=150)) < 0.3


# What is sampled.


def binomial_interval(trials: int, probability: float, *, miss: float = 1e-6) -> tuple[int, int]:
    """Counts that a binomial variable leaves with a chance of at most `miss` on either side, by summing."""
    if probability in (0.0, 1.0):
        return int(trials * probability), int(trials * probability)
    log_p, log_q = math.log(probability), math.log(1 - probability)
    pmf = [
        math.exp(
            math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
            + k * log_p + (trials - k) * log_q
        )
        for k in range(trials + 1)
    ]  # fmt: skip
    cdf = np.cumsum(pmf)
    return int(np.searchsorted(cdf, miss)), int(np.searchsorted(cdf, 1 - miss))


@pytest.fixture(scope="module")
def draws() -> list[list[CropParams]]:
    """The parameters of 4000 images' ten crops, as the pipeline draws them: a generator per key."""
    return [sample_crops(crop_rng(0, 0, f"key {n}"), 500, 375, CropsConfig()) for n in range(4000)]


@pytest.mark.parametrize(
    ("applied", "first_global", "second_global", "local"),
    [
        (lambda p: p.flip, 0.5, 0.5, 0.5),
        (lambda p: bool(p.jitter), 0.8, 0.8, 0.8),
        (lambda p: p.gray, 0.2, 0.2, 0.2),
        (lambda p: p.blur_sigma is not None, 1.0, 0.1, 0.5),
        (lambda p: p.solarize, 0.0, 0.2, 0.0),
    ],
    ids=["flip", "jitter", "gray", "blur", "solarize"],
)
def test_each_crop_index_has_the_frequencies_of_the_paper(
    draws: list[list[CropParams]], applied, first_global: float, second_global: float, local: float
) -> None:
    for crop, probability in enumerate([first_global, second_global] + [local] * 8):
        low, high = binomial_interval(len(draws), probability)
        assert low <= sum(applied(image[crop]) for image in draws) <= high, f"crop {crop}"


def test_what_is_applied_is_independent_between_operations_and_crops(draws: list[list[CropParams]]) -> None:
    columns = [
        [value for p in image[1:] for value in (p.flip, bool(p.jitter), p.gray, p.blur_sigma is not None)]
        for image in draws
    ]
    assert largest_correlation(columns) < 5.5 / math.sqrt(len(draws))  # 630 pairs: p = 2e-5


def test_how_much_is_independent_between_operations_and_crops() -> None:
    config = CropsConfig(
        jitter_prob=1, gray_prob=0.5, global_blur_prob=(1, 1), local_blur_prob=1, num_local_crops=2
    )
    columns = [
        [
            value
            for p in sample_crops(crop_rng(0, 0, f"key {n}"), 500, 375, config)
            for value in (p.height * p.width, p.flip, p.gray, p.blur_sigma, *dict(sorted(p.jitter)).values())
        ]
        for n in range(4000)
    ]
    assert largest_correlation(columns) < 5.5 / math.sqrt(len(columns))


def largest_correlation(columns: list[list[float]]) -> float:
    """Largest absolute correlation between two columns of a table of draws."""
    correlation = np.corrcoef(np.array(columns, dtype=float), rowvar=False)
    np.fill_diagonal(correlation, 0)
    return float(np.abs(correlation).max())


def test_all_24_jitter_orders_are_equally_frequent(draws: list[list[CropParams]]) -> None:
    orders = [tuple(name for name, _ in p.jitter) for image in draws for p in image if p.jitter]
    counts = [orders.count(order) for order in itertools.permutations(JITTER)]
    expected = len(orders) / 24
    assert sum(counts) == len(orders)
    assert sum((count - expected) ** 2 / expected for count in counts) < 58  # 23 degrees of freedom: p = 1e-4


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest gap between two empirical distribution functions."""
    points = np.concatenate([a, b])
    below_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())


@pytest.mark.parametrize(
    ("low", "high", "pick"),
    [
        (0.6, 1.4, lambda p: dict(p.jitter).get("brightness")),
        (0.6, 1.4, lambda p: dict(p.jitter).get("contrast")),
        (0.8, 1.2, lambda p: dict(p.jitter).get("saturation")),
        (-0.1, 0.1, lambda p: dict(p.jitter).get("hue")),
        (0.1, 2.0, lambda p: p.blur_sigma),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "sigma"],
)
def test_factors_are_uniform_over_their_range(
    draws: list[list[CropParams]], low: float, high: float, pick
) -> None:
    values = np.array([pick(p) for image in draws for p in image if pick(p) is not None])
    assert low <= values.min() < values.max() <= high
    assert ks_distance(values, np.linspace(low, high, 100_000)) < 1.95 / math.sqrt(len(values))  # p = 1e-3


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (2048, 1536), (500, 100)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int, scale: tuple[float, float]) -> None:
    config = CropsConfig(num_local_crops=98, local_crop_scale=scale, global_crop_scale=scale)
    rng = crop_rng(1, 0, f"{width} x {height} {scale}")
    ours = np.array(
        [p[:4] for _ in range(200) for p in sample_crops(rng, width, height, config)], dtype=float
    )
    empty = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        params = [RandomResizedCrop.get_params(empty, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(top, left, h, w) for top, left, h, w in params], dtype=float)
    gate = 2.2 * math.sqrt(1 / len(ours) + 1 / len(theirs))  # p = 1e-4: there are 40 comparisons
    for name, marginal in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "right margin": lambda b: width - b[:, 1] - b[:, 3],
    }.items():
        assert ks_distance(marginal(ours), marginal(theirs)) < gate, name


@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    low=st.floats(1e-6, 1),
    aspect=st.floats(0.1, 10),
    seed=st.integers(0, 2**32),
)
def test_boxes_lie_inside_the_image(width: int, height: int, low: float, aspect: float, seed: int) -> None:
    config = CropsConfig(local_crop_scale=(low, 1.0), aspect_ratio=(aspect, aspect * 1.5))
    for p in sample_crops(crop_rng(seed, 0, ""), width, height, config):
        assert 0 <= p.top < p.top + p.height <= height
        assert 0 <= p.left < p.left + p.width <= width


# Randomness is a function of (seed, epoch, key).


def test_the_random_stream_is_pinned() -> None:
    # A change here changes every run's crops: old checkpoints then do not resume into the same stream.
    pinned = [0.17031509534790334, 0.19580551373428112, 0.21776242951233193]
    assert crop_rng(0, 0, "train/a.jpg").random(3).tolist() == pinned
    first, second, *_ = sample_crops(crop_rng(0, 0, "train/a.jpg"), 500, 375, CropsConfig())
    assert first[:5] == (84, 134, 290, 325, True)
    assert second[:5] == (29, 92, 304, 282, False)


@pytest.mark.parametrize("other", [(1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (10, 0, "a"), (0, 0, "0/a")])
def test_another_seed_epoch_or_key_gives_other_crops(other: tuple[int, int, str]) -> None:
    config = CropsConfig()
    these = sample_crops(crop_rng(0, 0, "a"), 500, 375, config)
    those = sample_crops(crop_rng(*other), 500, 375, config)
    assert not set(these) & set(those)


def test_crops_of_one_image_differ() -> None:
    assert len(set(sample_crops(crop_rng(0, 0, "a"), 500, 375, CropsConfig()))) == 10


def test_keys_that_are_not_valid_text_have_crops_too() -> None:
    assert crop_rng(0, 0, "caf\udce9.jpg").random() != crop_rng(0, 0, "caf\udce8.jpg").random()


def run_python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter in the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_another_process_makes_the_same_crops() -> None:
    code = (
        "import numpy as np, zlib; from pipeline.crops import *;"
        "image = np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8);"
        "crops = multi_crop(image, crop_rng(3, 1, 'k'), CropsConfig());"
        "print(zlib.crc32(crops.global_crops), zlib.crc32(crops.local_crops))"
    )
    image = np.arange(90 * 120 * 3).reshape(90, 120, 3).astype(np.uint8)
    crops = multi_crop(image, crop_rng(3, 1, "k"), CropsConfig())
    here = f"{zlib.crc32(crops.global_crops)} {zlib.crc32(crops.local_crops)}"
    assert run_python(code, PYTHONHASHSEED="1").strip() == here


def test_global_random_state_is_neither_read_nor_advanced() -> None:
    image, config = drawn_pictures()[3], CropsConfig()
    results, states = [], []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        results.append(multi_crop(image, crop_rng(0, 0, "a"), config))
        after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        states.append(before == after)
    assert states == [True, True]
    np.testing.assert_array_equal(results[0].global_crops, results[1].global_crops)
    np.testing.assert_array_equal(results[0].local_crops, results[1].local_crops)


def test_fewer_local_crops_leave_the_others_as_they_were() -> None:
    def sample(**changes) -> list[CropParams]:
        return sample_crops(crop_rng(0, 0, "a"), 500, 375, CropsConfig(**changes))

    assert sample(num_local_crops=2) == sample()[:4]


def test_a_changed_probability_leaves_every_other_draw_as_it_was() -> None:
    def sample(**changes) -> list[CropParams]:
        return sample_crops(crop_rng(0, 0, "a"), 500, 375, CropsConfig(**changes))

    always = sample(jitter_prob=1.0)
    assert [p._replace(jitter=()) for p in always] == sample(jitter_prob=0.0)
    assert all(p.jitter in (q.jitter, ()) for p, q in zip(sample(), always, strict=True))


# The crops of an image.


@st.composite
def configs(draw) -> CropsConfig:
    def span(low: float, high: float) -> tuple[float, float]:
        ends = sorted(draw(st.tuples(st.floats(low, high), st.floats(low, high))))
        return ends[0], ends[1]

    probability = st.floats(0, 1)
    num_global_crops = draw(st.integers(1, 3))
    per_global = st.lists(probability, min_size=num_global_crops, max_size=num_global_crops)
    return CropsConfig(
        num_global_crops=num_global_crops,
        num_local_crops=draw(st.integers(1 if num_global_crops == 1 else 0, 4)),
        global_crop_size=draw(st.integers(8, 48)),
        local_crop_size=draw(st.integers(8, 48)),
        global_crop_scale=span(0.01, 1),
        local_crop_scale=span(0.01, 1),
        aspect_ratio=span(0.1, 10),
        flip_prob=draw(probability),
        jitter_prob=draw(probability),
        brightness=draw(st.floats(0, 3)),
        contrast=draw(st.floats(0, 3)),
        saturation=draw(st.floats(0, 3)),
        hue=draw(st.floats(0, 0.5)),
        gray_prob=draw(probability),
        global_blur_prob=tuple(draw(per_global)),
        local_blur_prob=draw(probability),
        blur_sigma=span(0, 8),
        global_solarize_prob=tuple(draw(per_global)),
        local_solarize_prob=draw(probability),
        solarize_threshold=draw(st.integers(0, 256)),
    )


@settings(max_examples=150, deadline=None)
@given(config=configs(), height=st.integers(1, 300), width=st.integers(1, 300), seed=st.integers(0, 2**63))
def test_any_config_and_any_image_give_whole_crops(
    config: CropsConfig, height: int, width: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = image.copy()
    crops = multi_crop(image, crop_rng(seed, 0, "a"), config)
    assert_shapes(crops, config)
    assert crop_bytes(config) == crops.global_crops.nbytes + crops.local_crops.nbytes
    np.testing.assert_array_equal(image, before)
    describe_crops(config)


def assert_shapes(crops: Crops, config: CropsConfig) -> None:
    sizes = (config.global_crop_size, config.local_crop_size)
    for array, number, size in zip(
        crops, (config.num_global_crops, config.num_local_crops), sizes, strict=True
    ):
        assert array.shape == (number, size, size, 3)
        assert array.dtype == np.uint8
        assert array.flags.c_contiguous


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (20, 3000), (2, 2)])
def test_extreme_shapes_have_crops_of_the_papers_size(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 77, np.uint8)
    assert_shapes(multi_crop(image, crop_rng(0, 0, "a"), CropsConfig()), CropsConfig())


def test_crops_come_in_the_order_of_their_parameters() -> None:
    image, config = drawn_pictures()[3], CropsConfig(global_crop_size=32, local_crop_size=16)
    crops = multi_crop(image, crop_rng(0, 0, "a"), config)
    params = sample_crops(crop_rng(0, 0, "a"), image.shape[1], image.shape[0], config)
    for crop, p in zip([*crops.global_crops, *crops.local_crops], params, strict=True):
        np.testing.assert_array_equal(crop, apply_crop(image, p, size=len(crop), solarize_threshold=128))


def test_the_configured_solarization_threshold_is_used() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    quiet = {"jitter_prob": 0, "gray_prob": 0, "num_local_crops": 0, "global_solarize_prob": (1, 1)}
    below = multi_crop(image, crop_rng(0, 0, "a"), CropsConfig(**quiet, solarize_threshold=101))
    at = multi_crop(image, crop_rng(0, 0, "a"), CropsConfig(**quiet, solarize_threshold=100))
    assert below.global_crops.mean() == 100
    assert at.global_crops.mean() == 155


def test_a_crop_of_the_whole_image_at_its_own_size_is_a_copy() -> None:
    image = drawn_pictures()[2]
    crop = apply_crop(image, PLAIN._replace(height=256, width=256), size=256)
    np.testing.assert_array_equal(crop, image)
    assert not np.shares_memory(crop, image)


def test_default_crops_of_one_image_take_522240_bytes() -> None:
    assert crop_bytes(CropsConfig()) == 522_240


# What people see: the printed table, and errors.


def test_the_table_shows_what_each_crop_gets() -> None:
    assert describe_crops(CropsConfig()).splitlines() == [
        "crop       size    scale        flip  jitter  gray  blur  solarize",
        "global 1   224 px  0.4 to 1     0.5   0.8     0.2   1     0",
        "global 2   224 px  0.4 to 1     0.5   0.8     0.2   0.1   0.2",
        "local 1-8  96 px   0.05 to 0.4  0.5   0.8     0.2   0.5   0",
        "jitter, in random order: brightness 0.4, contrast 0.4, saturation 0.2, hue 0.1",
        "aspect ratio 0.75 to 1.33, blur sigma 0.1 to 2 px, solarize from 128, 522,240 bytes an image",
    ]


def test_the_table_has_no_local_row_without_local_crops() -> None:
    assert "local" not in describe_crops(CropsConfig(num_local_crops=0))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"global_crop_scale": (0.5, 0.4)}, "0 < lowest <= highest"),
        ({"local_crop_scale": (0.0, 0.4)}, "0 < lowest <= highest"),
        ({"local_crop_scale": (0.1, 1.1)}, "at most 1"),
        ({"aspect_ratio": (0.5, math.inf)}, "0 < lowest <= highest"),
        ({"blur_sigma": (-1, 2)}, "0 <= lowest <= highest"),
        ({"pixel_std": (0.2, 0.2, 0)}, "above 0"),
        ({"flip_prob": 1.1}, "less than or equal to 1"),
        ({"global_blur_prob": (1.0, -0.1)}, "greater than or equal to 0"),
        ({"brightness": math.inf}, "finite"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"local_crop_size": 7}, "greater than or equal to 8"),
        ({"num_global_crops": 3}, "global_blur_prob=(1.0, 0.1) has 2 values for num_global_crops=3"),
        ({"global_solarize_prob": (0.0,)}, "global_solarize_prob=(0.0,) has 1 values for num_global_crops=2"),
        (
            {
                "num_global_crops": 1,
                "global_blur_prob": (1,),
                "global_solarize_prob": (0,),
                "num_local_crops": 0,
            },
            "no two crops to compare",
        ),
    ],
)
def test_a_wrong_setting_is_named(changes: dict, says: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CropsConfig(**changes)
    (only,) = raised.value.errors()
    assert says in only["msg"]
    assert "\n" not in only["msg"]


def test_threads_are_limited_when_asked_and_not_by_import() -> None:
    code = (
        "import torch, cv2, pipeline.crops as crops; before = torch.get_num_threads();"
        "crops.limit_threads(); print(before, torch.get_num_threads(), cv2.getNumThreads())"
    )
    assert run_python(code, OMP_NUM_THREADS="2").split() == ["2", "1", "1"]
