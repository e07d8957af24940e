"""What is sampled for each crop: the paper's distributions, out of (seed, epoch, key) alone."""

import itertools
import math
import zlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.augment.later_draws import NUM_STAINS, QUARTER_TURN, STAINS, VERTICAL_FLIP
from dinoray.pipeline.augment.multicrop import crop_rng
from dinoray.pipeline.augment.params import (
    BRIGHTNESS,
    CONTRAST,
    FACTORS,
    FLIP,
    GRAY,
    HEIGHT,
    HUE,
    OPERATIONS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    WIDTH,
    OneCrop,
    sample,
    sample_image,
)  # fmt: skip


@lru_cache
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


def tables(config: CropsConfig, images: int) -> np.ndarray:
    """The parameters of many images' crops as the pipeline draws them: float64 [images, V, columns]."""
    return np.stack([sample_image(0, 0, f"key {n}", 500, 375, config).table for n in range(images)])


@pytest.fixture(scope="module")
def draws() -> np.ndarray:
    """The parameters of 40,000 images with the default settings."""
    return tables(CropsConfig(), 40_000)


APPLIED = {
    "flip": lambda t: t[..., FLIP] == 1,
    "vertical flip": lambda t: t[..., VERTICAL_FLIP] == 1,
    "quarter turn": lambda t: t[..., QUARTER_TURN] == 1,
    "jitter": lambda t: t[..., OPERATIONS] > 0,
    "gray": lambda t: t[..., GRAY] == 1,
    "blur": lambda t: t[..., SIGMA] >= 0,
    "solarize": lambda t: t[..., SOLARIZE] < 256,
}


def assert_frequencies(tables: np.ndarray, operation: str, probabilities: list[float]) -> None:
    """Hold how often each crop gets an operation to these probabilities."""
    counts = APPLIED[operation](tables).sum(axis=0)
    assert len(counts) == len(probabilities)
    for crop, (count, probability) in enumerate(zip(counts, probabilities, strict=True)):
        low, high = binomial_interval(len(tables), probability)
        assert low <= count <= high, f"{operation} of crop {crop}"


@pytest.mark.parametrize(
    ("operation", "first_global", "second_global", "local"),
    [
        ("flip", 0.5, 0.5, 0.5),
        ("jitter", 0.8, 0.8, 0.8),
        ("gray", 0.2, 0.2, 0.2),
        ("blur", 1.0, 0.1, 0.5),
        ("solarize", 0.0, 0.2, 0.0),
    ],
)
def test_each_crop_index_has_the_frequencies_of_the_paper(
    draws: np.ndarray, operation: str, first_global: float, second_global: float, local: float
) -> None:
    assert_frequencies(draws, operation, [first_global, second_global] + [local] * 8)


def test_what_is_applied_is_independent_between_operations_and_crops(draws: np.ndarray) -> None:
    columns = np.concatenate(
        [APPLIED[name](draws[:, 1:]) for name in ("flip", "jitter", "gray", "blur")], axis=1
    )
    assert columns.shape == (40_000, 36)
    assert largest_correlation(columns) < 5.5 / math.sqrt(len(draws))  # 630 pairs: p = 2e-5


def test_how_much_is_independent_between_operations_and_crops() -> None:
    config = CropsConfig(
        jitter_prob=1, gray_prob=0.5, global_blur_prob=(1, 1), local_blur_prob=1, num_local_crops=2
    )
    drawn = tables(config, 40_000)
    # The factors by operation, whatever their order.
    factors = np.take_along_axis(
        drawn[..., FACTORS:GRAY], drawn[..., OPERATIONS:FACTORS].argsort(axis=-1), axis=-1
    )
    areas = drawn[..., HEIGHT] * drawn[..., WIDTH]
    columns = [areas, *(drawn[..., c] for c in (FLIP, GRAY, SIGMA)), *np.moveaxis(factors, -1, 0)]
    assert largest_correlation(np.concatenate(columns, axis=1)) < 5.5 / math.sqrt(len(drawn))


ALL_ON = {"vertical_flip_prob": 0.5, "quarter_turn_prob": 0.5, "hed_jitter": 0.2}


def test_later_draws_are_independent_of_the_earlier_ones_and_change_none() -> None:
    drawn = tables(CropsConfig(**ALL_ON, num_local_crops=2), 20_000)
    plain = tables(CropsConfig(num_local_crops=2), 2_000)
    np.testing.assert_array_equal(drawn[:2_000, :, :VERTICAL_FLIP], plain[..., :VERTICAL_FLIP])
    assert not plain[..., VERTICAL_FLIP:].any()
    assert_uniform(drawn[..., STAINS : STAINS + NUM_STAINS].ravel(), 0.8, 1.2)
    assert_uniform(drawn[..., STAINS + NUM_STAINS :].ravel(), -0.2, 0.2)
    areas = drawn[..., HEIGHT] * drawn[..., WIDTH]
    columns = [
        areas,
        *(drawn[..., c] for c in (FLIP, GRAY, SIGMA)),
        *np.moveaxis(drawn[..., VERTICAL_FLIP:], -1, 0),
    ]
    assert largest_correlation(np.concatenate(columns, axis=1)) < 5.5 / math.sqrt(len(drawn))


def test_crops_without_them_are_those_of_runs_before_them() -> None:
    drawn = [sample_image(1, 2, str(n), 30 * n + 1, 500, CropsConfig()).table for n in range(100)]
    assert zlib.crc32(np.stack(drawn)[..., :VERTICAL_FLIP].copy()) == 2649122453


def largest_correlation(columns: np.ndarray) -> float:
    """Largest absolute correlation between two columns of a table of draws."""
    correlation = np.corrcoef(np.array(columns, dtype=float), rowvar=False)
    np.fill_diagonal(correlation, 0)
    return float(np.abs(correlation).max())


def test_all_24_jitter_orders_are_equally_frequent(draws: np.ndarray) -> None:
    orders = draws[..., OPERATIONS:FACTORS].reshape(-1, 4)
    orders = orders[orders[:, 0] > 0].astype(int) @ [1000, 100, 10, 1]
    counts = [(orders == int("".join(order))).sum() for order in itertools.permutations("1234")]
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
    ("operation", "low", "high"),
    [(BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.8, 1.2), (HUE, -0.1, 0.1)],
)
def test_factors_are_uniform_over_their_range(
    draws: np.ndarray, operation: int, low: float, high: float
) -> None:
    values = draws[..., FACTORS:GRAY][draws[..., OPERATIONS:FACTORS] == operation]
    assert len(values) > 300_000
    assert_uniform(values, low, high)


def test_sigmas_are_uniform_over_their_range(draws: np.ndarray) -> None:
    assert_uniform(draws[..., SIGMA][draws[..., SIGMA] >= 0], 0.1, 2.0)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Hold draws to a uniform distribution, by Kolmogorov and Smirnov's distance."""
    assert low <= values.min() < values.max() <= high
    share = (np.sort(values) - low) / (high - low)
    places = np.arange(len(share)) / len(share)
    assert np.abs(share - places).max() < 2.2 / math.sqrt(len(values))  # p = 1e-4


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (2048, 1536), (500, 200)])
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int, scale: tuple[float, float]) -> None:
    config = CropsConfig(num_local_crops=98, local_crop_scale=scale, global_crop_scale=scale)
    rng = crop_rng(1, 0, f"{width} x {height} {scale}")
    ours = np.concatenate([sample(rng, width, height, config).table[:, :4] for _ in range(400)])
    empty = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        params = [RandomResizedCrop.get_params(empty, list(scale), [3 / 4, 4 / 3]) for _ in range(8000)]
    theirs = np.array([(top, left, h, w) for top, left, h, w in params], dtype=float)
    gate = 2.2 * math.sqrt(1 / len(ours) + 1 / len(theirs))  # p = 1e-4: there are 56 comparisons
    for name, marginal in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "aspect": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "right margin": lambda b: width - b[:, 1] - b[:, 3],
        "centre x": lambda b: b[:, 1] + b[:, 3] / 2,
        "centre y": lambda b: b[:, 0] + b[:, 2] / 2,
    }.items():
        assert ks_distance(marginal(ours), marginal(theirs)) < gate, name


# One value for global and one for local crops, one value per crop.


@pytest.mark.parametrize(
    ("operation", "changes", "probabilities"),
    [
        ("flip", {"flip_prob": (0.5, 0.1)}, [0.5, 0.5, 0.1, 0.1, 0.1]),
        ("vertical flip", {"vertical_flip_prob": 0.3}, [0.3] * 5),
        ("quarter turn", {"quarter_turn_prob": 0.5}, [0.5] * 5),
        ("quarter turn", {}, [0] * 5),
        ("jitter", {"jitter_prob": (0.3, 0.9)}, [0.3, 0.3, 0.9, 0.9, 0.9]),
        ("gray", {"gray_prob": (0, 1)}, [0, 0, 1, 1, 1]),
        ("blur", {"local_blur_prob": (0.1, 0, 0.7)}, [1, 0.1, 0.1, 0, 0.7]),
        ("solarize", {"local_solarize_prob": (0.1, 0, 0.7)}, [0, 0.2, 0.1, 0, 0.7]),
        ("solarize", {"local_solarize_prob": 0.4}, [0, 0.2, 0.4, 0.4, 0.4]),
        ("blur", {"blur_polarity": "dinov2"}, [0, 0.9, 0.5, 0.5, 0.5]),
        ("blur", {"blur_polarity": "dinov2", "local_blur_prob": (1, 0.2, 0)}, [0, 0.9, 0, 0.8, 1]),
    ],
)
def test_each_crop_has_the_frequency_of_its_group_or_its_own(
    operation: str, changes: dict, probabilities: list[float]
) -> None:
    assert_frequencies(tables(CropsConfig(num_local_crops=3, **changes), 10_000), operation, probabilities)


def test_strengths_and_ranges_may_differ_between_global_and_local_crops() -> None:
    strengths = {
        "brightness": (0.1, 0.9),
        "contrast": (0.2, 0.8),
        "saturation": (0.3, 0.7),
        "hue": (0.4, 0.05),
    }
    drawn = tables(
        CropsConfig(
            **strengths,
            global_crop_scale=(0.2, 0.3),
            local_crop_scale=(0.2, 0.3),
            aspect_ratio=((0.5, 0.6), (1.5, 1.6)),
            blur_sigma=((0.1, 1.0), (3.0, 4.0)),
            solarize_threshold=(100, 200),
            global_solarize_prob=(1, 1),
            local_solarize_prob=1,
        ),
        2000,
    )
    for group, crops in enumerate([drawn[:, :2], drawn[:, 2:]]):
        aspects = crops[..., WIDTH] / crops[..., HEIGHT]
        low, high = ((0.5, 0.6), (1.5, 1.6))[group]
        assert low - 0.02 < aspects.min() < low + 0.02
        assert high - 0.02 < aspects.max() < high + 0.02
        sigmas = crops[..., SIGMA][crops[..., SIGMA] >= 0]
        assert_uniform(sigmas, *((0.1, 1.0), (3.0, 4.0))[group])
        assert np.unique(crops[..., SOLARIZE]) == (100, 200)[group]
        for operation, (name, values) in enumerate(strengths.items(), start=1):
            factors = crops[..., FACTORS:GRAY][crops[..., OPERATIONS:FACTORS] == operation]
            middle = 0 if name == "hue" else 1
            assert_uniform(factors, middle - values[group], middle + values[group])


@settings(deadline=None)
@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    low=st.floats(1e-6, 1),
    aspect=st.floats(0.1, 10),
    seed=st.integers(0, 2**32),
)
def test_boxes_lie_inside_the_image(width: int, height: int, low: float, aspect: float, seed: int) -> None:
    config = CropsConfig(local_crop_scale=(low, 1.0), aspect_ratio=(aspect, aspect * 1.5))
    for p in sample(crop_rng(seed, 0, ""), width, height, config).crops:
        assert 0 <= p.top < p.top + p.height <= height
        assert 0 <= p.left < p.left + p.width <= width


def test_the_random_stream_is_pinned() -> None:
    # A change here changes every run's crops: old checkpoints then do not resume into the same stream.
    pinned = [0.17031509534790334, 0.19580551373428112, 0.21776242951233193]
    assert crop_rng(0, 0, "train/a.jpg").random(3).tolist() == pinned
    first, second, *_ = sample(crop_rng(0, 0, "train/a.jpg"), 500, 375, CropsConfig()).crops
    assert first[:5] == (84, 134, 290, 325, True)
    assert second[:5] == (29, 92, 304, 282, False)


@pytest.mark.parametrize("other", [(1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (10, 0, "a"), (0, 0, "0/a")])
def test_another_seed_epoch_or_key_gives_other_crops(other: tuple[int, int, str]) -> None:
    config = CropsConfig()
    these = sample(crop_rng(0, 0, "a"), 500, 375, config).crops
    those = sample(crop_rng(*other), 500, 375, config).crops
    assert not set(these) & set(those)


def test_crops_of_one_image_differ() -> None:
    assert len(set(sample(crop_rng(0, 0, "a"), 500, 375, CropsConfig()).crops)) == 10


def test_keys_that_are_not_valid_text_have_crops_too() -> None:
    assert crop_rng(0, 0, "caf\udce9.jpg").random() != crop_rng(0, 0, "caf\udce8.jpg").random()


def test_fewer_local_crops_leave_the_others_as_they_were() -> None:
    def drawn(**changes) -> tuple[OneCrop, ...]:
        return sample(crop_rng(0, 0, "a"), 500, 375, CropsConfig(**changes)).crops

    assert drawn(num_local_crops=2) == drawn()[:4]


def test_a_changed_probability_leaves_every_other_draw_as_it_was() -> None:
    def drawn(**changes) -> tuple[OneCrop, ...]:
        return sample(crop_rng(0, 0, "a"), 500, 375, CropsConfig(**changes)).crops

    always = drawn(jitter_prob=1.0)
    assert tuple(p._replace(jitter=()) for p in always) == drawn(jitter_prob=0.0)
    assert all(p.jitter in (q.jitter, ()) for p, q in zip(drawn(), always, strict=True))
