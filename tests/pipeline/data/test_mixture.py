"""Sources mixed by weight: exact shares, each source in its own order, and any position at the same price."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.data.mixture import BLOCK, PERIOD, Mixture
from dinoray.pipeline.data.order import Order

weights = st.lists(st.floats(0.001, 100), min_size=1, max_size=5)
seeds = st.integers(0, 2**63)


@given(weights, seeds, st.integers(0, 10**6))
def test_each_block_has_the_share_of_each_source_to_within_one(
    weights: list[float], seed: int, block: int
) -> None:
    sources, _ = Mixture(weights, seed=seed).locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
    counts = np.bincount(sources, minlength=len(weights))
    assert np.abs(counts - np.array(weights) / sum(weights) * BLOCK).max() < 1 + 1e-3


@given(weights, seeds, st.integers(0, 3 * PERIOD), st.integers(1, 3 * BLOCK))
def test_each_source_goes_on_by_one_at_any_position(
    weights: list[float], seed: int, first: int, number: int
) -> None:
    mixture = Mixture(weights, seed=seed)
    sources, own = mixture.locate(np.arange(first, first + number))
    latest: dict[int, int] = {}
    for source, position in zip(sources.tolist(), own.tolist(), strict=True):
        assert position == latest.get(source, position - 1) + 1
        latest[source] = position


@given(weights, seeds)
def test_a_walk_from_the_start_counts_what_locate_says(weights: list[float], seed: int) -> None:
    mixture = Mixture(weights, seed=seed)
    sources, own = mixture.locate(np.arange(3 * BLOCK))
    counts: Counter[int] = Counter()
    for source, position in zip(sources.tolist(), own.tolist(), strict=True):
        assert position == counts[source]
        counts[source] += 1
    some = np.array([700, 3, 255, 256, 3])
    assert [part.tolist() for part in mixture.locate(some)] == [sources[some].tolist(), own[some].tolist()]


def test_a_period_has_each_share_exactly_and_the_next_goes_on() -> None:
    mixture = Mixture([1, 2, 5], seed=3)
    sources, own = mixture.locate(np.arange(2 * PERIOD))
    assert (
        np.bincount(sources[:PERIOD]).tolist()
        == mixture.shares.tolist()
        == [PERIOD // 8, PERIOD // 4, 5 * PERIOD // 8]
    )
    for source in range(3):
        assert np.array_equal(own[sources == source], np.arange(2 * mixture.shares[source]))


def test_no_image_comes_twice_in_an_epoch_of_its_source() -> None:
    mixture, orders = Mixture([1, 3], seed=1), (Order(30, seed=1), Order(70, seed=1))
    sources, own = mixture.locate(np.arange(600))
    seen = Counter(
        (source, int(epoch), int(image))
        for source, order in enumerate(orders)
        for epoch, image in zip(*order.locate(own[sources == source]), strict=True)
    )
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("wrong", [[], [0, 1], [1, -1], [1, float("nan")], [1, 1e-12]])
def test_weights_that_give_a_source_nothing_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="weights="):
        Mixture(wrong, seed=0)
