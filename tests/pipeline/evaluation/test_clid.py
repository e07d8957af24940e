"""Cluster learnability and intrinsic dimension against known manifolds and slow twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dinoray.models.errors import DataError
from dinoray.pipeline.evaluation import clid
from dinoray.pipeline.evaluation.clid import cluster_learnability, intrinsic_dim, learnability_and_dimension

Rows = NDArray[np.float64]


def noise(*shape: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(size=shape)


def slow_dimension(rows: Rows) -> float:
    """TwoNN one image at a time: the regression of Facco et al. by numpy's least squares."""
    ratios = []
    for i, row in enumerate(rows):
        distances = sorted(float(np.linalg.norm(row - other)) for j, other in enumerate(rows) if j != i)
        ratios.append(distances[1] / distances[0])
    ratios.sort()
    kept = math.floor(0.9 * len(ratios))
    x = [[math.log(mu)] for mu in ratios[:kept]]
    y = [-math.log(1 - (i + 1) / len(ratios)) for i in range(kept)]
    return float(np.linalg.lstsq(np.array(x), np.array(y), rcond=None)[0][0])


def slow_learnability(rows: Rows, clusters: list[int]) -> float:
    """The vote of one nearest neighbour, one query at a time."""
    unit = [row / np.linalg.norm(row) for row in rows]
    hits = []
    for query in range(1, len(rows), 2):
        nearest = max(range(0, len(rows), 2), key=lambda one: float(unit[one] @ unit[query]))
        hits.append(clusters[nearest] == clusters[query])
    return sum(hits) / len(hits)


@given(n=st.integers(5, 40), d=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_dimension_is_that_of_the_written_out_regression(n: int, d: int, seed: int) -> None:
    rows = noise(n, d, seed=seed).astype(np.float32)
    distances = np.sort(np.linalg.norm(rows[:, None] - rows, axis=2), axis=1)
    assume(distances[:, 1].min() > 1e-3 * np.median(distances[:, 2]))  # copies are a test of their own, below
    assert intrinsic_dim(torch.from_numpy(rows)) == pytest.approx(
        slow_dimension(rows.astype(float)), rel=1e-4
    )


@pytest.mark.parametrize("d", [1, 2, 5])
def test_the_dimension_is_that_of_the_manifold_not_of_the_space(d: int) -> None:
    embedded = noise(2000, d) @ noise(d, 40, seed=1) + 7
    assert intrinsic_dim(torch.from_numpy(embedded)) == pytest.approx(d, rel=0.1)


def test_copies_of_images_do_not_change_the_dimension() -> None:
    rows = torch.from_numpy(noise(400, 3)).float()
    copies = torch.cat([rows, rows[:100] + 1e-7])
    assert intrinsic_dim(copies) == pytest.approx(intrinsic_dim(rows), rel=0.2)
    assert intrinsic_dim(torch.ones(50, 8)) == 0.0


@given(n=st.integers(5, 40), d=st.integers(2, 6), seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_learnability_is_the_vote_of_one_neighbour(n: int, d: int, seed: int) -> None:
    rows = noise(n, d, seed=seed).astype(np.float32)
    x = torch.nn.functional.normalize(torch.from_numpy(rows), dim=-1)
    clusters = clid._kmeans(x, round(math.sqrt(n)), seed=0).tolist()
    assert cluster_learnability(torch.from_numpy(rows)) == pytest.approx(slow_learnability(rows, clusters))


def test_groups_are_learnable_and_noise_is_less_so() -> None:
    centres = np.eye(20, 64)
    groups = np.repeat(centres, 20, axis=0) + 0.01 * noise(400, 64)  # as many groups as clusters
    assert cluster_learnability(torch.from_numpy(groups)) > 0.95
    assert cluster_learnability(torch.from_numpy(noise(400, 64))) < 0.6


def test_clusters_are_a_fixed_point_of_kmeans() -> None:
    x = torch.nn.functional.normalize(torch.from_numpy(noise(300, 4)).float(), dim=-1)
    clusters = clid._kmeans(x, 6, seed=0)
    means = torch.stack([x[clusters == one].mean(dim=0) for one in range(6)])
    assert torch.equal((x @ torch.nn.functional.normalize(means, dim=-1).T).argmax(dim=1), clusters)


def test_equal_features_are_learnable_and_have_no_dimension() -> None:
    found = learnability_and_dimension(np.ones((30, 8), np.float32))
    assert found == {"cluster_learnability": 1.0, "intrinsic_dim": 0.0}


def test_many_images_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noise(101, 3)
    monkeypatch.setattr(clid, "MAX_IMAGES", 40)
    assert learnability_and_dimension(rows)["intrinsic_dim"] == intrinsic_dim(torch.from_numpy(rows[::3]))


def test_features_that_are_not_finite_are_named_as_such() -> None:
    rows = noise(9, 3)
    rows[2, 1] = np.nan
    with pytest.raises(DataError, match="not all finite"):
        learnability_and_dimension(rows)
