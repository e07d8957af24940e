"""Packed sets: row groups are taken whole, so that no two readers share one."""

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from faults import FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from image_files import jpeg, scene
from numpy.typing import NDArray
from samples import parquet, write_all
from servers import S3Server

from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.export.packing import write_part
from dinoray.pipeline.export.packing_plan import make_plan
from dinoray.pipeline.storage.files import Directory

ROWS = 4
packed_sizes = st.lists(st.sampled_from([ROWS, ROWS, ROWS, 1, 2, 3, 0]), min_size=1, max_size=30).filter(any)
seeds = st.integers(0, 2**63)


def whole(sizes: list[int], *, seed: int = 0, rows: int = ROWS) -> Order:
    return Order(sum(sizes), seed=seed, group_sizes=np.array(sizes), rows_per_group=rows)


def epoch_of(order: Order, epoch: int) -> NDArray[np.int64]:
    n = order.num_images
    return order.locate(np.arange(epoch * n, (epoch + 1) * n))[1]


def groups_of(sizes: list[int], images: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(sizes)), sizes)[images]


@given(sizes=packed_sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_an_epoch_shows_each_image_once(sizes: list[int], seed: int, epoch: int) -> None:
    assert sorted(epoch_of(whole(sizes, seed=seed), epoch).tolist()) == list(range(sum(sizes)))


@given(sizes=packed_sizes, seed=seeds, data=st.data())
def test_skipping_equals_walking(sizes: list[int], seed: int, data: st.DataObject) -> None:
    order, n = whole(sizes, seed=seed), sum(sizes)
    positions = data.draw(st.lists(st.integers(0, 3 * n - 1), min_size=1, max_size=10))
    walked = np.concatenate([epoch_of(order, epoch) for epoch in range(3)])
    assert order.locate(positions)[1].tolist() == walked[positions].tolist()
    assert pickle.loads(pickle.dumps(order)).locate(positions)[1].tolist() == walked[positions].tolist()


@given(sizes=packed_sizes, seed=seeds, epoch=st.integers(0, 20))
def test_between_two_multiples_lies_one_group(sizes: list[int], seed: int, epoch: int) -> None:
    order, n, num_whole = whole(sizes, seed=seed), sum(sizes), sizes.count(ROWS)
    images = epoch_of(order, epoch)
    first = -epoch * n % ROWS if num_whole else 0
    for begin in range(first, first + (num_whole - bool(first)) * ROWS, ROWS):
        assert len(set(groups_of(sizes, images[begin : begin + ROWS]).tolist())) == 1
    short = [size for size in sizes if 0 < size < ROWS]
    assert set(groups_of(sizes, images[n - sum(short) :]).tolist()) == {
        i for i, s in enumerate(sizes) if 0 < s < ROWS
    }


def test_epochs_and_seeds_each_give_another_order() -> None:
    orders = {
        tuple(epoch_of(whole([ROWS] * 40 + [2, 3, 1], seed=seed), epoch).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_neighbouring_groups_are_no_neighbours_in_the_list() -> None:
    sizes = [ROWS] * 1000
    groups = groups_of(sizes, epoch_of(whole(sizes), 1))[::ROWS]
    gaps = np.abs(np.diff(groups))
    assert np.count_nonzero(gaps == 1) < 10  # two are expected
    assert 280 < gaps.mean() < 390  # a third of 1000


def test_the_order_of_whole_groups_is_the_one_that_runs_were_started_with() -> None:
    # Whoever changes this list changes which images a run sees after it is resumed.
    images = whole([3, 3, 2, 3, 3], seed=1, rows=3).locate(np.arange(28))[1].tolist()
    assert images == [
        8,
        9,
        10,
        3,
        4,
        5,
        11,
        12,
        13,
        0,
        1,
        2,
        6,
        7,
        11,
        3,
        4,
        5,
        0,
        1,
        2,
        8,
        9,
        10,
        12,
        13,
        6,
        7,
    ]


def test_larger_groups_than_the_set_is_packed_in_are_refused() -> None:
    with pytest.raises(ValueError, match="group_sizes has 5, more than rows_per_group=4"):
        whole([4, 5])


@pytest.mark.parametrize("num_actors", [1, 2, 4, 16, 64])
@pytest.mark.parametrize(("world_size", "batch_size", "first_step"), [(1, 64, 0), (2, 128, 0), (4, 512, 77)])
def test_each_group_is_read_once_an_epoch_with_any_number_of_actors(
    num_actors: int, world_size: int, batch_size: int, first_step: int
) -> None:
    """Whichever actor takes which block, and from whichever step the run resumes."""
    sizes = ([16] * 70 + [5]) * 60  # parts end with a short row group
    order, n = whole(sizes, rows=16), sum(sizes)
    steps = range(first_step, first_step + 2 * n // batch_size)
    layout = lay_out(steps, world_size=world_size, global_batch_size=batch_size, image_bytes=400_000)
    actors, reads = np.random.default_rng(0), set()
    for number in range(layout.num_blocks):
        actor = int(actors.integers(num_actors))
        _, images = order.locate(layout.block(number))
        # A block's rows of a group are read at once, and no actor keeps groups from block to block.
        reads |= {(number, actor, group) for group in groups_of(sizes, images).tolist()}
    num_images = len(steps) * batch_size
    bytes_read = sum(sizes[group] for _, _, group in reads)
    assert bytes_read / num_images <= 1.02


@pytest.mark.parametrize("num_actors", [1, 2, 4])
@pytest.mark.s3
def test_a_packed_set_is_read_once_by_any_number_of_actors(
    tmp_path: Path, s3: S3Server, bucket: str, proxy: FaultProxy, num_actors: int
) -> None:
    """Counted at the store, beside the same images in others' row groups of 100."""
    count, picture = 640, jpeg(scene(120, 80))
    files = {f"{i:03d}.jpg": picture + random.Random(i).randbytes(20_000) for i in range(count)}
    write_all(tmp_path / "images", files)
    config = DataConfig(path=str(tmp_path / "images"))
    source, out = Source(config, build_manifest(config)), Directory(f"s3://{bucket}/packed")
    plan = make_plan(source.manifest, digest="m", max_pixels=None, rows_per_file=None)
    for part in range(plan.num_parts):
        write_part(None, source, part, out=out, plan=plan)
    rows = {"image": [files[key] for key in sorted(files)], "key": sorted(files)}
    Directory(f"s3://{bucket}/theirs").write("all.parquet", parquet(rows, row_group_size=100))
    read = {name: _bytes_read(f"s3://{bucket}/{name}", proxy, num_actors) for name in ("packed", "theirs")}
    used = sum(map(len, files.values()))
    assert read["packed"] <= 1.1 * used
    assert (read["theirs"] > 1.5 * used) is (num_actors > 1)


def _bytes_read(path: str, proxy: FaultProxy, num_actors: int) -> int:
    """What the store sends while actors take the blocks of an epoch in turn."""
    config = DataConfig(path=path)
    manifest = build_manifest(config)
    actors = [Source(config, manifest) for _ in range(num_actors)]
    order = actors[0].order(seed=3)
    layout = lay_out(range(10), world_size=2, global_batch_size=64, image_bytes=1_600_000)
    before = proxy.bytes_answered
    for number in range(layout.num_blocks):
        _, images = order.locate(layout.block(number))
        assert all(fetched.data for fetched in actors[number % num_actors].fetch(images.tolist()))
    return proxy.bytes_answered - before
