"""Readers that all actors share: which row groups a window has, who keeps them, and how often they are read."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.data.order import Order, Window
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.data.reading.reads import count_reads, read_by_readers
from dinoray.pipeline.data.reading.sharing import (
    Sharing,
    StreamsApart,
    WindowCache,
    groups_ahead,
    share_reading,
)

group_lists = st.lists(st.integers(0, 9), min_size=1, max_size=25).filter(any)
seeds = st.integers(0, 2**63)


class Held(NamedTuple):
    nbytes: int


def order_of(sizes: list[int], *, seed: int = 0, window_groups: int = 3) -> Order:
    return Order(sum(sizes), seed=seed, group_sizes=np.array(sizes, np.int64), window_groups=window_groups)


def manifest_of(sizes: list[int], *, row_bytes: int = 110_000) -> Manifest:
    rows = [{"num_rows": size, "num_bytes": row_bytes * size} for size in sizes]
    return Manifest(pa.Table.from_pylist(rows), "parquet", "/", 0, {})


@given(sizes=group_lists, seed=seeds, window_groups=st.integers(1, 30), data=st.data())
def test_a_window_has_the_row_groups_of_its_positions_and_these_are_in_no_other_of_the_epoch(
    sizes: list[int], seed: int, window_groups: int, data: st.DataObject
) -> None:
    order, n = order_of(sizes, seed=seed, window_groups=window_groups), sum(sizes)
    of_image = np.repeat(np.arange(len(sizes)), sizes)
    position = data.draw(st.integers(0, 4 * n - 1))
    window = order.window(position)
    assert window is not None
    assert window.first <= position < window.stop
    assert len(window.groups) <= window_groups
    inside = order.locate(np.arange(window.first, window.stop))[1]
    used = {group for group in window.groups.tolist() if sizes[group]}
    assert set(of_image[inside].tolist()) == used
    assert sorted(inside.tolist()) == [image for image in range(n) if of_image[image] in used]
    # Windows follow one another from the beginning of an epoch to its end.
    begin = position // n * n
    walked, at = [], begin
    while at < begin + n:
        here = order.window(at)
        assert here is not None
        walked, at = [*walked, here.first], here.stop
    assert window.first in walked
    assert at == begin + n


def test_orders_without_windows_need_no_readers() -> None:
    manifest = manifest_of([4] * 9)
    packed = Order(36, seed=0, group_sizes=np.array([4] * 9), rows_per_group=4)
    for order in (Order(36, seed=0), packed):
        assert order.window(0) is None
        assert groups_ahead(order, 0, 36) is None
        found = share_reading(manifest, order, most_actors=4, cpus_per_actor=1, rows_per_block=8)
        assert found is None


def test_the_next_window_is_read_ahead_unless_the_run_ends_before() -> None:
    order = order_of([5] * 7)
    now, after, first_of_next_epoch = order.window(0), order.window(15), order.window(35)
    assert now is not None
    assert after is not None
    assert first_of_next_epoch is not None
    ahead = groups_ahead(order, 3, 100)
    assert ahead is not None
    assert (ahead.first, ahead.groups.tolist()) == (0, [*now.groups, *after.groups])
    assert groups_ahead(order, 3, 15) is None
    assert groups_ahead(order, 3, 16) is not None
    last = groups_ahead(order, 34, 100)
    assert last is not None
    assert last.groups.tolist()[-3:] == first_of_next_epoch.groups.tolist()


def test_what_has_been_given_is_dropped_first_then_what_was_begun_first() -> None:
    cache: WindowCache[Held] = WindowCache(4, np.array([2] * 8))
    assert cache.begin(Window(0, 4, np.arange(4)))
    for group in (3, 0, 1, 2):
        cache.put(group, Held(1))
    assert not cache.begin(Window(0, 4, np.arange(4)))
    cache.give(np.array([2, 4, 5]))  # one row of group 1, both of group 2
    cache.put(4, Held(1))
    assert [group for group in range(5) if cache.get(group)] == [0, 1, 3, 4]
    cache.give(np.array([2]))  # again: a block that is made twice
    assert cache.begin(Window(4, 8, np.array([3, 0, 5])))
    cache.put(5, Held(1))  # group 1 was begun before groups 3 and 0, which are in use again
    assert [group for group in range(6) if cache.get(group)] == [0, 3, 4, 5]


@pytest.mark.parametrize("num_actors", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize(
    ("sizes", "row_bytes", "train_workers", "batch_size"),
    [
        ([150] * 700, 110_000, 2, 512),
        ([20] * 5000, 110_000, 8, 1024),
        ([1000] * 200, 6_000, 1, 64),
        ([0, 1, 40, 250, 90] * 150, 110_000, 4, 256),
    ],
)
def test_each_byte_is_read_once_with_any_number_of_actors(
    sizes: list[int], row_bytes: int, train_workers: int, batch_size: int, num_actors: int
) -> None:
    """At least ten row groups are in a window of 256 MiB; blocks ask in disorder, some of them late."""
    window_groups = (256 << 20) // (max(sizes) * row_bytes)
    assert window_groups >= 9
    order = order_of(sizes, window_groups=window_groups)
    found = count_reads(
        manifest_of(sizes, row_bytes=row_bytes),
        order,
        train_workers=train_workers,
        global_batch_size=batch_size,
        image_bytes=522_240,
        most_actors=num_actors,
    )
    assert 0.95 <= found.times_read <= 1.1


@given(groups=st.lists(st.integers(0, 10**6), min_size=1), num_readers=st.integers(1, 9))
def test_each_row_group_has_one_reader(groups: list[int], num_readers: int) -> None:
    readers = Sharing(num_readers, 1).reader_of(np.array(groups))
    assert ((readers >= 0) & (readers < num_readers)).all()


def test_readers_keep_three_windows_and_what_actors_ask_for_at_once() -> None:
    sizes, window = [100] * 1000, 24 * 100 * 110_000
    order = order_of(sizes, window_groups=24)
    kept = {}
    for actors, cpus in ((1, 1.0), (2, 1.0), (2, 16.0), (64, 1.0)):
        found = share_reading(
            manifest_of(sizes), order, most_actors=actors, cpus_per_actor=cpus, rows_per_block=200
        )
        assert found is not None
        kept[actors, cpus] = (found.num_readers, round(found.cache_bytes * found.num_readers / window, 1))
    assert kept == {(1, 1.0): (1, 3.2), (2, 1.0): (1, 3.3), (2, 16.0): (4, 4.8), (64, 1.0): (8, 17.9)}
    small = share_reading(
        manifest_of([10] * 3), order_of([10] * 3), most_actors=64, cpus_per_actor=1, rows_per_block=200
    )
    assert small == (3, 3 * 10 * 110_000)  # no more readers than row groups, which each may keep


def test_a_stream_is_at_most_two_windows_ahead_of_the_slowest() -> None:
    apart = StreamsApart(3)

    def begin(stream: int, window: int) -> bool:
        may = apart.may_begin(stream, window)
        if may:
            apart.begin(stream, window)
        return may

    assert [begin(0, window) for window in (0, 100, 200)] == [True, True, False]
    assert begin(1, 0)
    assert not begin(0, 200)  # the third has begun none
    assert begin(2, 0)
    assert [begin(0, window) for window in (200, 300, 100)] == [True, False, True]
    assert begin(1, 100)
    assert begin(2, 200)  # as the slowest is at 100
    assert begin(0, 300)
    assert not begin(0, 400)


@pytest.mark.parametrize("num_streams", [2, 4])
@pytest.mark.parametrize("num_actors", [4, 16, 64])
@pytest.mark.parametrize(("rows", "row_bytes"), [(150, 110_000), (20, 110_000), (1000, 6_000)])
def test_each_byte_is_read_once_by_streams_that_are_as_far_apart_as_they_may_be(
    rows: int, row_bytes: int, num_actors: int, num_streams: int
) -> None:
    """The slowest stream asks only when no other may go on."""
    sizes = np.full(60_000 // rows, rows)
    order = order_of(sizes.tolist(), window_groups=(256 << 20) // (rows * row_bytes))
    layout = lay_out(range(110), world_size=4, global_batch_size=512, image_bytes=522_240)
    manifest = manifest_of(sizes.tolist(), row_bytes=row_bytes)
    sharing = share_reading(
        manifest,
        order,
        most_actors=num_actors,
        cpus_per_actor=1,
        rows_per_block=layout.rows_per_block,
        num_streams=num_streams,
    )
    assert sharing is not None
    assert manifest.group_bytes is not None

    def blocks() -> Iterator[NDArray[np.int64]]:
        streams, apart = layout.divided(num_streams), StreamsApart(num_streams)
        waiting = [deque(map(stream.block, range(stream.num_blocks))) for stream in streams]
        while any(waiting):
            for stream, queue in reversed([*enumerate(waiting)]):
                ahead = groups_ahead(order, int(queue[0][-1]), layout.stop) if queue else None
                if queue and (ahead is None or apart.may_begin(stream, ahead.first)):
                    if ahead is not None:
                        apart.begin(stream, ahead.first)
                    yield queue.popleft()
                    break

    read = read_by_readers(order, blocks(), layout.stop, sizes, manifest.group_bytes, sharing)
    images = layout.stop
    assert manifest.group_bytes[read].sum() / (images * row_bytes) <= 1.1
