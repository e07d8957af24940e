"""Probes against closed forms, slow twins, and classifiers trained one by one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from dinoray.models.errors import DataError
from dinoray.pipeline.evaluation.config import ProbeConfig
from dinoray.pipeline.evaluation.knn import knn_vote
from dinoray.pipeline.evaluation.probes import (
    collapsed_dims,
    feature_std,
    lidar,
    linear_probe,
    rankme,
    train_heads,
)

Rows = NDArray[np.float64]


def noise(*shape: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(size=shape)


def entropy_rank(values: Rows, epsilon: float) -> float:
    p = [v / sum(values) + epsilon for v in values]
    return math.exp(-sum(x * math.log(x) for x in p))


# RankMe


def test_orthonormal_features_have_as_many_ranks_as_there_are() -> None:
    assert rankme(np.eye(5, 8)) == pytest.approx(5, rel=1e-4)
    assert rankme(np.repeat(np.eye(5, 8), 7, axis=0)) == pytest.approx(5, rel=1e-4)


def test_features_on_a_line_have_rank_one() -> None:
    assert rankme(np.outer(np.arange(1, 50), [1.0, -2.0, 3.0])) == pytest.approx(1, abs=1e-4)


def test_the_rank_is_that_of_a_known_spectrum() -> None:
    # Shares 3/4 and 1/4: the entropy is ln 4 - 3/4 ln 3.
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_features_are_not_centred_before_the_rank() -> None:
    assert rankme(100 + noise(200, 4)) < 1.2
    assert rankme(noise(200, 4)) > 3.9


@given(
    n=st.integers(2, 12),
    d=st.integers(1, 12),
    scale=st.sampled_from([1e-3, 1, 1e3]),
    seed=st.integers(0, 999),
)
def test_the_rank_is_that_of_the_written_out_formula_at_any_scale(
    n: int, d: int, scale: float, seed: int
) -> None:
    rows = noise(n, d, seed=seed)
    gram = rows @ rows.T if n < d else rows.T @ rows
    sigma = np.sqrt(np.clip(np.linalg.eigvalsh(gram), 0, None))
    assert rankme(scale * rows) == pytest.approx(entropy_rank(sigma, 1e-7), rel=1e-5)


def test_features_that_are_all_zero_have_rank_one() -> None:
    assert rankme(np.zeros((9, 4), np.float32)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("probe", [rankme, feature_std, collapsed_dims])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_named_as_such(probe, value: float) -> None:
    rows = noise(5, 3)
    rows[2, 1] = value
    with pytest.raises(DataError, match="not all finite"):
        probe(rows)


# LiDAR


def written_out_lidar(views: Rows, delta: float) -> float:
    """The definition, one vector at a time, with the inverse square root of Sw."""
    n, q, d = views.shape
    means = [sum(image) / q for image in views]
    mean = sum(means) / n
    between = sum(np.outer(m - mean, m - mean) for m in means) / (n - 1)
    within = sum(np.outer(v - m, v - m) for image, m in zip(views, means, strict=True) for v in image)
    values, vectors = np.linalg.eigh(within / (n * (q - 1)) + delta * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return entropy_rank(np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None), 1e-8)


@given(
    n=st.integers(2, 8),
    q=st.integers(2, 5),
    d=st.integers(1, 9),
    delta=st.sampled_from([1e-4, 1e-2]),
    seed=st.integers(0, 999),
)
def test_lidar_is_the_written_out_definition(n: int, q: int, d: int, delta: float, seed: int) -> None:
    views = noise(n, 1, d, seed=seed) + 0.5 * noise(n, q, d, seed=seed + 1)
    assert lidar(views, delta=delta) == pytest.approx(written_out_lidar(views, delta), rel=1e-5)


def test_images_at_the_corners_of_a_simplex_have_one_rank_less_than_there_are() -> None:
    views = np.repeat(np.eye(6, 10)[:, None], 3, axis=1)
    assert lidar(views) == pytest.approx(5, rel=1e-4)


def test_what_differs_more_between_views_than_between_images_does_not_count() -> None:
    # Two dimensions in which four images differ alike; in the second, views of each differ far more.
    images = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], float)
    quiet = 0.1 * images  # four views, which differ as much in both
    loud = quiet * [1, 1000]
    assert lidar(images[:, None] + quiet) == pytest.approx(2, rel=1e-4)
    assert lidar(images[:, None] + loud) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 5, 3), (5, 1, 3), (0, 10, 0)])
def test_too_few_images_or_views_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        DataError, match=r"two readable images and two views .*; add images, or leave lidar out"
    ):
        lidar(np.zeros(shape))
    lidar(np.zeros((2, 2, shape[2])))


# Feature std


def test_features_along_all_axes_have_the_std_of_a_sphere() -> None:
    axes = np.concatenate([np.eye(16), -np.eye(16)])
    assert feature_std(axes) == pytest.approx(1 / 4)
    assert feature_std(axes * np.arange(1, 33)[:, None]) == pytest.approx(1 / 4)  # lengths do not count
    assert feature_std(noise(20_000, 64).astype(np.float32)) == pytest.approx(1 / 8, rel=1e-2)


def test_features_that_are_all_alike_have_no_std() -> None:
    assert feature_std(np.tile([3.0, 4.0], (10, 1))) == pytest.approx(0, abs=1e-7)
    assert collapsed_dims(np.tile([3.0, 4.0], (10, 1))) == 1


def test_dimensions_without_spread_are_counted() -> None:
    rows = noise(500, 8)
    rows[:, :2] = 0
    assert collapsed_dims(rows) == 0.25


# k-NN


@given(
    ks=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    num_voters=st.integers(1, 20),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_all_numbers_of_neighbours_at_once_vote_as_each_alone(
    ks: list[int], num_voters: int, temperature: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    similarity = torch.from_numpy(rng.uniform(-1, 1, (7, num_voters)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 3, num_voters))
    together = knn_vote(similarity, labels, ks=ks, temperature=temperature, num_classes=3)
    for k, guesses in zip(ks, together, strict=True):
        alone = knn_vote(similarity, labels, ks=[k], temperature=temperature, num_classes=3)
        assert guesses.tolist() == alone[0].tolist()


# Linear probe


def clusters(n: int, *, seed: int, num_classes: int = 3, spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """Features in 5 dimensions around one centre per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (n,), generator=generator)
    return torch.eye(num_classes, 5)[labels] + spread * torch.randn(n, 5, generator=generator), labels


def one_by_one(x: Tensor, y: Tensor, lr: float, config: ProbeConfig) -> tuple[Tensor, Tensor]:
    """A single classifier, trained by torch's own layer, loss, optimiser and schedule."""
    n, batch_size = len(x), min(config.linear_batch_size, len(x))
    generator = torch.Generator().manual_seed(config.seed)
    layer = nn.Linear(x.shape[1], 3)
    layer.weight.data = 0.01 * torch.randn(x.shape[1], 1, 3, generator=generator)[:, 0].T
    layer.bias.data.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr * batch_size / 256, momentum=0.9)
    total = config.linear_epochs * math.ceil(n / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _ in range(config.linear_epochs):
        for rows in torch.randperm(n, generator=generator).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return layer.weight.data.T, layer.bias.data


@pytest.mark.parametrize("batch_size", [16, 1000])
def test_each_learning_rate_ends_as_if_trained_alone(batch_size: int) -> None:
    x, y = clusters(50, seed=0)
    config = ProbeConfig(linear_lrs=(0.01, 0.3, 2.0), linear_epochs=4, linear_batch_size=batch_size, seed=5)
    weights, biases = train_heads(x, y, num_classes=3, config=config)
    assert (weights.shape, biases.shape) == ((5, 3, 3), (3, 3))
    for i, lr in enumerate(config.linear_lrs):
        weight, bias = one_by_one(x, y, lr, config)
        torch.testing.assert_close(weights[:, i], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(biases[i], bias, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights[:, 0], weights[:, 1], atol=1e-2)


def test_separable_classes_are_told_apart() -> None:
    config = ProbeConfig(linear_epochs=20, linear_batch_size=16)
    scores = linear_probe(*clusters(200, seed=0), *clusters(100, seed=1), num_classes=3, config=config)
    assert scores.val[scores.best] == 1
    assert scores.holdout[scores.best] == 1


def test_random_labels_are_guessed_by_chance() -> None:
    x, y = torch.from_numpy(noise(400, 8)).float(), torch.arange(400) % 4
    val = torch.from_numpy(noise(4000, 8, seed=1)).float()
    config = ProbeConfig(linear_epochs=10)
    scores = linear_probe(x, y, val, torch.arange(4000) % 4, num_classes=4, config=config)
    assert abs(scores.val[scores.best] - 0.25) < 0.05


def test_the_held_out_images_choose_and_not_the_classified_ones() -> None:
    val, labels = clusters(100, seed=1)
    config = ProbeConfig(linear_lrs=(1e-9, 1.0), linear_epochs=20, linear_batch_size=16)
    wrong = (labels + 1) % 3
    scores = linear_probe(*clusters(200, seed=0), val, wrong, num_classes=3, config=config)
    assert scores.best == 1
    assert scores.val[1] == 0 < scores.val[0]


def test_held_out_images_are_not_learnt_from() -> None:
    # Noise with random labels in many dimensions: what is learnt from is known by heart, the rest is not.
    x, y = torch.from_numpy(noise(200, 400)).float(), torch.from_numpy(noise(200, 1))[:, 0].gt(0).long()
    config = ProbeConfig(linear_lrs=(1.0,), linear_epochs=50, linear_holdout=0.5)
    scores = linear_probe(x, y, x, y, num_classes=2, config=config)
    assert 0.3 < scores.holdout[0] < 0.7
    assert scores.val[0] == pytest.approx((1 + scores.holdout[0]) / 2)  # half of val is what was learnt from


def test_a_probe_is_a_function_of_its_seed() -> None:
    sides = *clusters(90, seed=0, spread=0.8), *clusters(90, seed=1, spread=0.8)
    first, again = (
        linear_probe(*sides, num_classes=3, config=ProbeConfig(linear_epochs=3)) for _ in range(2)
    )
    other = linear_probe(*sides, num_classes=3, config=ProbeConfig(linear_epochs=3, seed=1))
    assert first == again != other


def test_a_classifier_that_overflowed_has_no_right_answers() -> None:
    sides = *clusters(60, seed=0), *clusters(60, seed=1)
    config = ProbeConfig(linear_lrs=(0.5, 1e39), linear_epochs=20)
    scores = linear_probe(*sides, num_classes=3, config=config)
    assert (scores.val[1], scores.holdout[1], scores.best) == (0, 0, 0)


def test_one_training_image_is_too_few() -> None:
    x, y = clusters(1, seed=0)
    with pytest.raises(DataError, match=r"two labelled training images .*; add images, or leave linear out"):
        linear_probe(x, y, x, y, num_classes=3, config=ProbeConfig())
    x, y = clusters(2, seed=0)
    linear_probe(x, y, x, y, num_classes=3, config=ProbeConfig(linear_epochs=1))


@pytest.mark.parametrize("lrs", [(), (0,), (0.1, -1)])
def test_learning_rates_that_cannot_train_are_refused(lrs: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="linear_lrs"):
        ProbeConfig(linear_lrs=lrs)
