"""What is sampled for each crop: the paper's distributions, out of (seed, epoch, key) alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop

from pipeline.crop_params import OneCrop, sample
from pipeline.crops import crop_rng
from pipeline.crops_config import CropsConfig

OPERATIONS = ("brightness", "contrast", "saturation", "hue")


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
def draws() -> list[tuple[OneCrop, ...]]:
    """The parameters of 4000 images' ten crops, as the pipeline draws them: a generator per key."""
    return [sample(crop_rng(0, 0, f"key {n}"), 500, 375, CropsConfig()).crops for n in range(4000)]


@pytest.mark.parametrize(
    ("applied", "first_global", "second_global", "local"),
    [
        (lambda p: p.flip, 0.5, 0.5, 0.5),
        (lambda p: bool(p.jitter), 0.8, 0.8, 0.8),
        (lambda p: p.gray, 0.2, 0.2, 0.2),
        (lambda p: p.blur_sigma is not None, 1.0, 0.1, 0.5),
        (lambda p: p.solarize is not None, 0.0, 0.2, 0.0),
    ],
    ids=["flip", "jitter", "gray", "blur", "solarize"],
)
def test_each_crop_index_has_the_frequencies_of_the_paper(
    draws: list[tuple[OneCrop, ...]], applied, first_global: float, second_global: float, local: float
) -> None:
    for crop, probability in enumerate([first_global, second_global] + [local] * 8):
        low, high = binomial_interval(len(draws), probability)
        assert low <= sum(applied(image[crop]) for image in draws) <= high, f"crop {crop}"


def test_what_is_applied_is_independent_between_operations_and_crops(
    draws: list[tuple[OneCrop, ...]],
) -> None:
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
            for p in sample(crop_rng(0, 0, f"key {n}"), 500, 375, config).crops
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


def test_all_24_jitter_orders_are_equally_frequent(draws: list[tuple[OneCrop, ...]]) -> None:
    orders = [tuple(name for name, _ in p.jitter) for image in draws for p in image if p.jitter]
    counts = [orders.count(order) for order in itertools.permutations(OPERATIONS)]
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
    draws: list[tuple[OneCrop, ...]], low: float, high: float, pick
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
        [p[:4] for _ in range(200) for p in sample(rng, width, height, config).crops], dtype=float
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"global_crop_scale": (0.5, 0.4)}, "0 < lowest <= highest"),
        ({"local_crop_scale": (0.0, 0.4)}, "0 < lowest <= highest"),
        ({"local_crop_scale": (0.1, 1.1)}, "at most 1"),
        ({"aspect_ratio": (0.5, math.inf)}, "finite"),
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
    messages = [error["msg"] for error in raised.value.errors()]  # one for each type that may stand there
    assert any(says in message for message in messages)
    assert not any("\n" in message for message in messages)
