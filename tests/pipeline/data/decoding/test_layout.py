"""Which positions go where: every one once, in the right rank's blocks, in the order of the steps."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.partition import (
    BLOCK_BYTES,
    Layout,
    batch_size_per_worker,
    block_bytes_for,
    check_accumulation,
    check_streams,
    dividing_workers,
    lay_out,
    num_microbatches,
    steps_per_block,
)

layouts = st.builds(
    lambda first_step, num_steps, world_size, batch_size_per_worker, steps_per_block: Layout(
        first_step=first_step,
        last_step=first_step + num_steps,
        world_size=world_size,
        batch_size_per_worker=batch_size_per_worker,
        steps_per_block=steps_per_block,
    ),
    first_step=st.integers(0, 50),
    num_steps=st.integers(1, 30),
    world_size=st.integers(1, 5),
    batch_size_per_worker=st.integers(1, 4),
    steps_per_block=st.integers(1, 9),
)


def stream_of(layout: Layout, rank: int, num_streams: int = 1) -> list[int]:
    """What a rank receives: blocks alternate over the ranks of its stream, of which there is one."""
    (stream,) = [stream for stream in layout.divided(num_streams) if rank in stream.ranks]
    place, in_turn = stream.ranks.index(rank), len(stream.ranks)
    blocks = [stream.block(i).tolist() for i in range(stream.num_blocks) if i % in_turn == place]
    return [position for block in blocks for position in block]


class Span(NamedTuple):
    """Positions of consecutive steps."""

    first: int
    last: int


def span(layout: Layout) -> Span:
    per_step = layout.world_size * layout.batch_size_per_worker
    return Span(layout.first_step * per_step, layout.last_step * per_step)


@given(layouts)
def test_each_position_is_in_one_block_once(layout: Layout) -> None:
    everything = [p for i in range(layout.num_blocks) for p in layout.block(i).tolist()]
    assert sorted(everything) == list(range(*span(layout)))


@given(layouts)
def test_each_rank_receives_its_slice_of_every_step_in_order(layout: Layout) -> None:
    size = layout.batch_size_per_worker
    for rank in range(layout.world_size):
        received = np.array(stream_of(layout, rank)).reshape(-1, size)
        assert len(received) == layout.last_step - layout.first_step
        for step, batch in enumerate(received.tolist(), start=layout.first_step):
            first = step * layout.world_size * size + rank * size
            assert batch == list(range(first, first + size))
            assert batch == layout.positions(step, rank).tolist()


@given(layouts, st.integers(0, 30))
def test_after_any_step_what_was_seen_is_a_prefix_of_the_stream(layout: Layout, num_steps: int) -> None:
    num_steps = min(num_steps, layout.last_step - layout.first_step)
    rows = num_steps * layout.batch_size_per_worker
    seen = [p for rank in range(layout.world_size) for p in stream_of(layout, rank)[:rows]]
    start = span(layout).first
    assert sorted(seen) == list(range(start, start + rows * layout.world_size))


@given(layouts, st.integers(0, 30), st.integers(1, 9))
def test_a_resumed_stream_is_the_rest_whatever_its_blocks(
    layout: Layout, num_steps: int, steps_per_block: int
) -> None:
    num_steps = min(num_steps, layout.last_step - layout.first_step - 1)
    rest = Layout(
        first_step=layout.first_step + num_steps,
        last_step=layout.last_step,
        world_size=layout.world_size,
        batch_size_per_worker=layout.batch_size_per_worker,
        steps_per_block=steps_per_block,
    )
    for rank in range(layout.world_size):
        assert stream_of(rest, rank) == stream_of(layout, rank)[num_steps * layout.batch_size_per_worker :]


@given(layouts)
def test_a_step_shows_the_same_images_to_any_number_of_ranks(layout: Layout) -> None:
    per_step = layout.world_size * layout.batch_size_per_worker
    alone = Layout(
        first_step=layout.first_step,
        last_step=layout.last_step,
        world_size=1,
        batch_size_per_worker=per_step,
        steps_per_block=layout.steps_per_block,
    )
    step = layout.last_step - 1
    together = np.concatenate([layout.positions(step, rank) for rank in range(layout.world_size)])
    assert together.tolist() == alone.positions(step, 0).tolist()


def test_blocks_by_hand() -> None:
    # Steps 1, 2, 3 of two ranks by two images; blocks of two steps, so the last turn holds one.
    layout = Layout(first_step=1, last_step=4, world_size=2, batch_size_per_worker=2, steps_per_block=2)
    assert layout.num_blocks == 4
    blocks = [layout.block(i).tolist() for i in range(4)]
    assert blocks == [[4, 5, 8, 9], [6, 7, 10, 11], [12, 13], [14, 15]]


@given(layouts, st.integers(1, 5))
def test_streams_have_the_blocks_of_one_stream_each_once(layout: Layout, num_streams: int) -> None:
    num_streams = min(num_streams, layout.world_size)
    blocks = [
        stream.block(i).tolist() for stream in layout.divided(num_streams) for i in range(stream.num_blocks)
    ]
    assert sorted(blocks) == sorted(layout.block(i).tolist() for i in range(layout.num_blocks))


@given(layouts, st.integers(1, 5), st.integers(1, 5), st.integers(0, 30))
def test_a_rank_receives_the_same_from_any_number_of_streams_also_after_a_resume_with_another(
    layout: Layout, num_before: int, num_after: int, num_steps: int
) -> None:
    num_before, num_after = min(num_before, layout.world_size), min(num_after, layout.world_size)
    resumed = replace(layout, first_step=min(layout.first_step + num_steps, layout.last_step))
    rows = (resumed.first_step - layout.first_step) * layout.batch_size_per_worker
    for rank in range(layout.world_size):
        received = stream_of(layout, rank, num_before)[:rows] + stream_of(resumed, rank, num_after)
        assert received == stream_of(layout, rank)


@given(layouts, st.integers(1, 5))
def test_each_rank_has_one_stream_and_all_streams_have_about_equally_many(
    layout: Layout, num_streams: int
) -> None:
    num_streams = min(num_streams, layout.world_size)
    streams = layout.divided(num_streams)
    assert sorted(rank for stream in streams for rank in stream.ranks) == list(range(layout.world_size))
    sizes = [len(stream.ranks) for stream in streams]
    assert min(sizes) >= 1
    assert max(sizes) <= min(sizes) + 1
    assert {stream.stop for stream in streams} == {layout.stop}


def test_blocks_of_two_streams_by_hand() -> None:
    # Ranks 0 and 2, and rank 1, of three with one image each: step 4 has positions 12, 13 and 14.
    layout = Layout(first_step=4, last_step=6, world_size=3, batch_size_per_worker=1, steps_per_block=1)
    blocks = [[stream.block(i).tolist() for i in range(stream.num_blocks)] for stream in layout.divided(2)]
    assert blocks == [[[12], [14], [15], [17]], [[13], [16]]]


@pytest.mark.parametrize(("train_workers", "most_actors"), [(4, None), (8, 4), (4, 4)])
def test_four_streams_are_allowed_for_as_many_workers_and_actors(
    train_workers: int, most_actors: int | None
) -> None:
    check_streams(4, train_workers=train_workers, most_actors=most_actors)


@given(layouts)
def test_there_are_equally_many_blocks_for_each_rank(layout: Layout) -> None:
    assert layout.num_blocks % layout.world_size == 0
    turns = layout.num_blocks // layout.world_size
    steps = layout.last_step - layout.first_step
    assert (turns - 1) * layout.steps_per_block < steps <= turns * layout.steps_per_block


@pytest.mark.parametrize(
    ("batch_size_per_worker", "image_bytes", "steps"),
    [
        (64, 522_240, 3),  # 100 MiB hold 200 images of ten crops: three steps of 64
        (32, 522_240, 6),
        (200, 522_240, 1),
        (201, 522_240, 1),  # one step at least, however large
        (64, 30_000, 4),  # small crops: 256 images are enough
        (1, 30_000, 256),
        (1, 200 << 20, 1),
    ],
)
def test_a_block_holds_as_many_steps_as_fit(batch_size_per_worker: int, image_bytes: int, steps: int) -> None:
    assert steps_per_block(batch_size_per_worker, image_bytes) == steps


@given(st.integers(1, 5000), st.integers(1, 1 << 28))
def test_a_block_is_within_both_limits_or_one_step(batch_size_per_worker: int, image_bytes: int) -> None:
    steps = steps_per_block(batch_size_per_worker, image_bytes)
    rows = steps * batch_size_per_worker
    assert steps >= 1
    assert steps == 1 or (rows <= 256 and rows * image_bytes <= 100 << 20)
    more = rows + batch_size_per_worker
    assert more > 256 or more * image_bytes > 100 << 20


@pytest.mark.parametrize(
    ("global_batch_size", "train_workers", "share"), [(512, 8, 64), (7, 7, 1), (6, 1, 6)]
)
def test_the_global_batch_is_shared_equally(global_batch_size: int, train_workers: int, share: int) -> None:
    assert batch_size_per_worker(global_batch_size, train_workers) == share


@pytest.mark.parametrize(
    ("global_batch_size", "train_workers", "remedy"), [(100, 8, "try 96 or 104"), (3, 8, "try 8")]
)
def test_a_batch_that_does_not_divide_is_answered_with_the_nearest_that_do(
    global_batch_size: int, train_workers: int, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        batch_size_per_worker(global_batch_size, train_workers)
    assert str(caught.value) == (
        f"train.global_batch_size={global_batch_size} must be divisible by "
        f"resources.train_workers={train_workers}; {remedy}"
    )


@given(st.integers(1, 200), st.integers(1, 8), st.none() | st.integers(1, 300))
def test_microbatches_are_equal_and_no_larger_than_they_may_be(
    parts: int, accumulate_steps: int, most_images: int | None
) -> None:
    batch_size = parts * accumulate_steps
    number = num_microbatches(batch_size, accumulate_steps, most_images)
    assert batch_size % number == 0
    assert number % accumulate_steps == 0
    assert most_images is None or batch_size // number <= most_images
    fewer = [n for n in range(accumulate_steps, number, accumulate_steps) if batch_size % n == 0]
    assert all(batch_size // n > (most_images or batch_size) for n in fewer)


@given(st.integers(1, 96), st.integers(1, 4), st.integers(1, 12), st.integers(0, 12))
def test_numbers_of_workers_are_those_that_a_run_of_just_so_many_could_have(
    batch: int, accumulate_steps: int, least: int, more: int
) -> None:
    def fits(workers: int) -> bool:
        try:
            check_accumulation(batch_size_per_worker(batch, workers), accumulate_steps)
        except ConfigError:
            return False
        return True

    numbers = range(least, least + more + 1)
    assert dividing_workers(batch, accumulate_steps, least, least + more) == [n for n in numbers if fits(n)]


@pytest.mark.parametrize(
    ("store_bytes", "expected"),
    [(None, BLOCK_BYTES), (10**11, BLOCK_BYTES), (600 * 10**6, 50 * 10**6), (12, 1)],
)
def test_a_small_store_has_room_for_twelve_blocks(store_bytes: int | None, expected: int) -> None:
    assert block_bytes_for(store_bytes) == expected


def test_a_block_has_at_least_one_step_however_small_the_store_is() -> None:
    layout = lay_out(range(9), world_size=1, global_batch_size=8, image_bytes=500_000, block_bytes=1)
    assert layout.rows_per_block == 8
