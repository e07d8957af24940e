"""The order of images: a permutation of each epoch, at any position for the same price."""

import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import group_loads

from dinoray.pipeline.data.order import Order, permute

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**63)
group_lists = st.lists(st.integers(0, 9), min_size=1, max_size=25).filter(any)


def epoch_of(order: Order, epoch: int) -> list[int]:
    """The images of one epoch, in order."""
    n = order.num_images
    return order.locate(np.arange(epoch * n, (epoch + 1) * n))[1].tolist()


def grouped(group_sizes: list[int], *, seed: int, window_groups: int) -> Order:
    return Order(
        sum(group_sizes), seed=seed, group_sizes=np.array(group_sizes, np.int64), window_groups=window_groups
    )


def group_of_each_image(group_sizes: list[int]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(group_sizes)), group_sizes)


@given(size=sizes, seed=seeds)
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size=size, seed=seed).tolist()) == list(range(size))


@given(size=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_an_epoch_shows_each_image_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_of(Order(size, seed=seed), epoch)) == list(range(size))


@given(size=sizes, seed=seeds, positions=st.lists(st.integers(0, 600), min_size=1, max_size=10))
def test_a_position_reached_by_skipping_is_the_one_reached_by_walking(
    size: int, seed: int, positions: list[int]
) -> None:
    order = Order(size, seed=seed)
    epochs, images = order.locate(positions)
    assert epochs.tolist() == [position // size for position in positions]
    assert images.tolist() == [epoch_of(order, position // size)[position % size] for position in positions]


@given(group_sizes=group_lists, seed=seeds, window_groups=st.integers(1, 30), epoch=st.integers(0, 1000))
def test_row_groups_are_shown_whole_once_an_epoch_and_each_is_loaded_once(
    group_sizes: list[int], seed: int, window_groups: int, epoch: int
) -> None:
    images = epoch_of(grouped(group_sizes, seed=seed, window_groups=window_groups), epoch)
    assert sorted(images) == list(range(sum(group_sizes)))
    groups = group_of_each_image(group_sizes)[images].tolist()
    assert group_loads(groups, capacity=window_groups) == sum(size > 0 for size in group_sizes)


@given(group_sizes=group_lists, seed=seeds, window_groups=st.integers(1, 30), data=st.data())
def test_skipping_among_row_groups_equals_walking(
    group_sizes: list[int], seed: int, window_groups: int, data: st.DataObject
) -> None:
    order, n = grouped(group_sizes, seed=seed, window_groups=window_groups), sum(group_sizes)
    positions = data.draw(st.lists(st.integers(0, 3 * n - 1), min_size=1, max_size=10))
    walked = [image for epoch in range(3) for image in epoch_of(order, epoch)]
    assert order.locate(positions)[1].tolist() == [walked[p] for p in positions]


def test_rows_of_several_groups_are_mixed_within_a_window() -> None:
    sizes = [50] * 8
    groups = group_of_each_image(sizes)[epoch_of(grouped(sizes, seed=3, window_groups=4), 0)]
    for window in (groups[:200], groups[200:]):
        assert len(set(window.tolist())) == 4
        assert np.count_nonzero(np.diff(window)) > 100  # about three changes in four neighbours


def test_which_groups_share_a_window_changes_with_the_epoch() -> None:
    sizes = [5] * 12
    order = grouped(sizes, seed=0, window_groups=3)
    first = [frozenset(group_of_each_image(sizes)[epoch_of(order, e)[:15]].tolist()) for e in range(5)]
    assert len(set(first)) > 1


def test_epochs_and_seeds_each_give_another_order() -> None:
    orders = {tuple(epoch_of(Order(100, seed=seed), epoch)) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_each_image_comes_first_equally_often() -> None:
    counts = Counter(int(Order(10, seed=seed).locate([0])[1][0]) for seed in range(2000))
    assert set(counts) == set(range(10))
    assert all(140 <= count <= 260 for count in counts.values())  # 200 each, give or take four deviations


def test_neighbours_in_the_order_are_no_neighbours_in_the_list() -> None:
    gaps = np.abs(np.diff(epoch_of(Order(1000, seed=0), 0)))
    assert np.count_nonzero(gaps == 1) < 10  # two are expected
    assert 280 < gaps.mean() < 390  # a third of 1000


# Whoever changes these two lists changes which images every run sees after it is resumed: a run that was
# started before would then skip some images and repeat others. That takes a new checkpoint format.


def test_the_order_is_the_one_that_runs_were_started_with() -> None:
    assert permute(np.arange(10), size=10, seed=0).tolist() == [7, 2, 8, 9, 3, 0, 6, 4, 5, 1]
    assert Order(7, seed=1).locate(np.arange(14))[1].tolist() == [6, 2, 3, 0, 1, 4, 5, 3, 1, 4, 6, 0, 2, 5]


def test_the_order_among_row_groups_is_the_one_that_runs_were_started_with() -> None:
    images = grouped([3, 2, 4], seed=1, window_groups=2).locate(np.arange(18))[1].tolist()
    assert images == [8, 6, 4, 3, 5, 7, 0, 1, 2, 8, 5, 7, 4, 6, 3, 2, 1, 0]


def test_a_billion_images_cost_a_few_megabytes() -> None:
    tracemalloc.start()
    order = Order(10**9, seed=0)
    positions = np.array([0, 1, 10**9 - 1, 10**9, 5 * 10**12])
    epochs, images = order.locate(positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epochs.tolist() == [0, 0, 0, 1, 5000]
    assert len(set(images.tolist())) == 5
    assert ((images >= 0) & (images < 10**9)).all()
    assert peak < 10_000_000


@given(size=st.integers(1, 40), seed=seeds, data=st.data())
def test_a_stand_in_is_the_next_image_of_the_same_epoch(size: int, seed: int, data: st.DataObject) -> None:
    order = Order(size, seed=seed)
    position = data.draw(st.integers(0, 3 * size - 1))
    epoch, rank = divmod(position, size)
    images = epoch_of(order, epoch)
    tried = [order.substitute(position, attempt) for attempt in range(size)]
    assert tried == images[rank:] + images[:rank]


def test_a_stand_in_among_row_groups_is_the_next_one_too() -> None:
    order = grouped([3, 2, 4], seed=1, window_groups=2)
    images = epoch_of(order, 1)
    assert [order.substitute(9 + 8, attempt) for attempt in (1, 2)] == images[:2]


def test_the_shape_of_the_positions_is_kept() -> None:
    epochs, images = Order(10, seed=0).locate(np.arange(6).reshape(2, 3))
    assert epochs.shape == images.shape == (2, 3)
    assert (epochs.dtype, images.dtype) == (np.int64, np.int64)
    assert images.ravel().tolist() == epoch_of(Order(10, seed=0), 0)[:6]
    assert Order(10, seed=0).locate([])[1].tolist() == []


def test_an_order_sent_to_another_process_is_the_same() -> None:
    order = grouped([3, 2, 4], seed=1, window_groups=2)
    assert epoch_of(pickle.loads(pickle.dumps(order)), 4) == epoch_of(order, 4)


def test_one_image_is_an_order() -> None:
    assert Order(1, seed=5).locate([0, 1, 2])[1].tolist() == [0, 0, 0]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_images=0 must be at least 1"):
        Order(0, seed=0)
    with pytest.raises(ValueError, match="group_sizes sum to 5, not num_images=6"):
        Order(6, seed=0, group_sizes=np.array([2, 3]))
    with pytest.raises(ValueError, match="index=10 must be below size=10"):
        permute([3, 10], size=10, seed=0)
