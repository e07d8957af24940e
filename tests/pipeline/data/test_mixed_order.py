"""The order of a mix: each source in its own order, row groups in windows, and any position at the same price."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoray.pipeline.data.mixture import BLOCK, MixedOrder, Mixture
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.data.reading.reads import read_by_readers
from dinoray.pipeline.data.reading.sharing import Sharing, groups_ahead

few = settings(max_examples=20)
seeds = st.integers(0, 2**31)
weights = st.lists(st.floats(0.01, 10), min_size=3, max_size=3)

OBJECTS, GROUPS, SMALL = 50, [7, 5, 6, 9, 3, 8], [4, 4, 4]
"""Image objects, row groups, and row groups of a small source."""
SIZES = np.array([OBJECTS, *GROUPS, *SMALL])
"""Of all groups, those of a source after those of another; image objects are one."""


def mixed(weights: list[float], *, seed: int = 0) -> MixedOrder:
    def windows(sizes: list[int], number: int) -> Order:
        return Order(sum(sizes), seed=number, group_sizes=np.array(sizes), window_groups=2)

    orders = [Order(OBJECTS, seed=0), windows(GROUPS, 1), windows(SMALL, 2)]
    return MixedOrder(orders, weights, [1, len(GROUPS), len(SMALL)], seed=seed)


@few
@given(weights=weights, seed=seeds, number=st.integers(0, 5000))
def test_images_before_a_position_and_the_position_after_them_agree(
    weights: list[float], seed: int, number: int
) -> None:
    mixture = Mixture(weights, seed=seed)
    counts = mixture.before(number)
    assert sum(counts) == number
    walked = np.bincount(mixture.locate(np.arange(number))[0], minlength=3)
    assert counts == walked.tolist()
    after = [mixture.after(source, count) for source, count in enumerate(counts)]
    assert max(after, default=0) == number  # the last image is of one of them
    for source, position in enumerate(after):
        assert mixture.before(position)[source] == counts[source]
        assert position == 0 or mixture.before(position - 1)[source] == counts[source] - 1


@few
@given(weights=weights, seed=seeds)
def test_each_pass_of_each_source_has_each_of_its_images_once(weights: list[float], seed: int) -> None:
    order = mixed(weights, seed=seed)
    passes, images = order.locate(np.arange(3 * BLOCK))
    numbers = np.searchsorted([OBJECTS, OBJECTS + sum(GROUPS)], images, side="right")
    for source, size in enumerate((OBJECTS, sum(GROUPS), sum(SMALL))):
        mine = numbers == source
        for one in range(int(mine.sum()) // size):
            assert len(np.unique(images[mine & (passes == one)])) == size
        assert abs(mine.sum() - len(images) * weights[source] / sum(weights)) < 3 * (1 + 1e-3)


@few
@given(weights=weights, seed=seeds, first=st.integers(0, 10**9))
def test_a_resume_at_any_position_has_the_rest_of_the_order(
    weights: list[float], seed: int, first: int
) -> None:
    order = mixed(weights, seed=seed)
    again = pickle.loads(pickle.dumps(order))
    whole, rest = order.locate(np.arange(first, first + 80)), again.locate(np.arange(first + 30, first + 80))
    for all_of_it, tail in zip(whole, rest, strict=True):
        np.testing.assert_array_equal(all_of_it[30:], tail)
    assert order.locate([]) is not None


def test_the_most_passes_are_those_of_the_source_with_the_least_images_for_its_weight() -> None:
    assert mixed([1, 1, 2]).most_passes == pytest.approx(
        0.5 * (OBJECTS + sum(GROUPS) + sum(SMALL)) / sum(SMALL)
    )


def test_another_seed_is_another_order() -> None:
    orders = {tuple(mixed([1, 1, 1], seed=seed).locate(np.arange(60))[1].tolist()) for seed in range(5)}
    assert len(orders) == 5


@few
@given(weights=weights, position=st.integers(0, 2000), attempt=st.integers(1, 5))
def test_a_substitute_is_another_image_of_the_same_source(
    weights: list[float], position: int, attempt: int
) -> None:
    order, ends = mixed(weights), [OBJECTS, OBJECTS + sum(GROUPS)]
    image = int(order.locate([position])[1][0])
    other = order.substitute(position, attempt)
    assert other != image
    assert np.searchsorted(ends, other, side="right") == np.searchsorted(ends, image, side="right")


@few
@given(weights=weights, seed=seeds, position=st.integers(0, 3000))
def test_a_window_has_the_row_groups_of_its_positions_and_the_next_begins_at_its_end(
    weights: list[float], seed: int, position: int
) -> None:
    order = mixed(weights, seed=seed)
    window = order.window(position)
    assert window is not None
    assert window.first <= position < window.stop
    groups = np.searchsorted(
        np.cumsum(SIZES), order.locate(np.arange(window.first, window.stop))[1], side="right"
    )
    assert set(groups.tolist()) - {0} <= set(window.groups.tolist())
    assert len(window.groups) <= 4  # two of each source that has row groups
    after = order.window(window.stop)
    assert after is not None
    assert after.first == window.stop


@few
@given(weights=weights, seed=seeds, readers=st.integers(1, 3))
def test_readers_read_each_row_group_once_in_a_pass_of_its_source(
    weights: list[float], seed: int, readers: int
) -> None:
    """Blocks come in their order; a cache has room for the windows in use and the next."""
    order, steps = mixed(weights, seed=seed), 60
    layout = lay_out(range(steps), world_size=2, global_batch_size=8, image_bytes=10, block_bytes=80)
    group_bytes = np.where(np.arange(len(SIZES)) == 0, 0, SIZES)
    blocks = [layout.block(number) for number in range(layout.num_blocks)]
    sharing = Sharing(readers, 2 * 2 * (max(GROUPS) + max(SMALL)) + max(GROUPS))
    read = read_by_readers(order, blocks, layout.stop, SIZES, group_bytes, sharing)
    of_groups = read[read > 0]
    passes, images = order.locate(np.arange(layout.stop))
    needed = {(p, g) for p, g in zip(passes, np.searchsorted(np.cumsum(SIZES), images, "right"), strict=True)}
    needed = {(p, g) for p, g in needed if g}
    # What is read ahead may not be needed before the end.
    assert len(of_groups) <= len(needed) + 4
    assert {int(g) for _, g in needed} <= set(of_groups.tolist())


def test_without_row_groups_there_are_no_windows() -> None:
    order = MixedOrder([Order(5, seed=0), Order(9, seed=1)], [1, 2], [1, 1], seed=0)
    assert order.window(0) is None
    assert groups_ahead(order, 0, 100) is None
