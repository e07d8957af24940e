"""Packing: in which order images are packed, and where parts and row groups are cut."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.export.packing_plan import (
    MOST_ROWS_PER_GROUP,
    PART_BYTES,
    PART_ROWS,
    ROW_GROUP_BYTES,
    Plan,
    make_plan,
)


def listed(sizes: list[int]) -> Manifest:
    """A manifest of image objects of these sizes."""
    return Manifest(pa.table({"size": pa.array(sizes, pa.int64())}), "images", "/", 0, {})


def grouped(groups: list[tuple[int, int]]) -> Manifest:
    """A manifest of row groups, (rows, bytes) each."""
    table = pa.Table.from_pylist([{"num_rows": rows, "num_bytes": size} for rows, size in groups])
    return Manifest(table, "parquet", "/", 0, {})


def plan_of(manifest: Manifest, max_pixels: int | None = None, rows_per_file: int | None = None) -> Plan:
    return make_plan(manifest, digest="m", max_pixels=max_pixels, rows_per_file=rows_per_file)


def cut(manifest: Manifest, max_pixels: int | None = None, rows_per_file: int | None = None) -> list[int]:
    return list(plan_of(manifest, max_pixels, rows_per_file).edges)


def order_of(manifest: Manifest, plan: Plan) -> list[int]:
    return [image for part in range(plan.num_parts) for image in plan.images(part, manifest).tolist()]


def test_parts_hold_what_they_may_and_no_more() -> None:
    size = PART_BYTES // 400
    assert cut(listed([size] * 100_000)) == [*range(0, 100_000, 400), 100_000]
    # Large and small ones are shuffled, so parts have about as many images.
    rows = np.diff(cut(listed([2 * size] * 50_000 + [size] * 50_000)))[:-1]
    assert 230 < rows.min() <= rows.max() < 300


def test_few_images_make_few_parts_and_tiny_ones_are_bounded_by_their_number() -> None:
    assert cut(listed([5000] * 200)) == [0, 200]
    assert cut(listed([5000] * 1024)) == [0, 256, 512, 768, 1024]
    assert cut(listed([0] * PART_ROWS * 65))[1] == PART_ROWS
    assert cut(listed([7])) == [0, 1]


def test_what_will_be_shrunk_counts_as_what_it_will_be() -> None:
    photos = listed([3_000_000] * 100_000)
    assert cut(photos)[1] == PART_BYTES // 3_000_000 // 4 * 4
    assert cut(photos, max_pixels=270_000)[1] == PART_BYTES // 135_000 // 16 * 16
    assert cut(listed([20_000] * 100_000), max_pixels=270_000) == cut(listed([20_000] * 100_000))


def test_an_image_larger_than_a_part_is_one() -> None:
    manifest = listed([10] * 3000 + [3 * PART_BYTES] * 2 + [10] * 3000)
    plan = plan_of(manifest)
    assert [np.sum(plan.images(part, manifest) // 3000 == 1) for part in range(plan.num_parts)]
    large = [
        part for part in range(plan.num_parts) if {3000, 3001} & set(plan.images(part, manifest).tolist())
    ]
    assert all(len(plan.rows(part)) == 1 for part in large)
    assert len(large) == 2


def test_row_groups_are_whole_unless_they_are_larger_than_a_part() -> None:
    quarter = PART_BYTES // 4
    assert cut(grouped([(100, quarter)] * 1000)) == [*range(0, 100_000, 400), 100_000]
    assert cut(grouped([(100, 3 * quarter)] * 1000)) == [*range(0, 100_000, 100), 100_000]
    assert cut(grouped([(100, 4 * PART_BYTES)] * 300)) == [*range(0, 30_000, 25), 30_000]


def test_a_row_group_of_the_source_is_read_by_one_part() -> None:
    manifest = grouped([(100, PART_BYTES // 200)] * 500)
    plan = plan_of(manifest)
    parts = [set((plan.images(part, manifest) // 100).tolist()) for part in range(plan.num_parts)]
    assert plan.num_parts > 50
    assert max(Counter(group for groups in parts for group in groups).values()) == 1
    assert min(map(len, parts[:-1])) > 1  # and a part mixes several


def test_row_groups_of_large_images_have_fewer_rows() -> None:
    assert plan_of(listed([100_000] * 1000)).rows_per_group == MOST_ROWS_PER_GROUP
    assert plan_of(listed([ROW_GROUP_BYTES // 4] * 1000)).rows_per_group == 4
    assert plan_of(listed([ROW_GROUP_BYTES // 4] * 1000), max_pixels=270_000).rows_per_group == 16
    assert plan_of(listed([ROW_GROUP_BYTES * 2] * 10)).rows_per_group == 1


def test_a_set_sorted_by_class_is_packed_shuffled() -> None:
    manifest = listed([100_000] * 100_000)  # 1000 classes of 100 images each
    packed = np.array(order_of(manifest, plan_of(manifest)))
    batches = [len(set((packed[i : i + 1024] // 100).tolist())) for i in range(0, 90_000, 1024)]
    assert 600 < np.mean(batches) < 680  # 641 of independent draws
    assert abs(np.corrcoef(packed, np.arange(100_000))[0, 1]) < 0.01


@pytest.mark.parametrize(("rows", "once", "twice"), [(100, 560, 630), (1000, 250, 600)])
def test_a_sorted_set_of_parquet_is_shuffled_by_a_second_pass(rows: int, once: int, twice: int) -> None:
    """1,000 classes of 400 images of 100 kB, class by class, in row groups of `rows`."""
    num_images = 400_000
    manifest = grouped([(rows, rows * 100_000)] * (num_images // rows))
    first = plan_of(manifest)
    assert not first.mixes_all(manifest)
    packed = np.array(order_of(manifest, first)) // 400
    assert classes_in_a_batch(packed) < once  # what fits a part
    sizes = [
        min(16, part.stop - row) for part in map(first.rows, range(first.num_parts)) for row in part[::16]
    ]
    again = grouped([(size, size * 100_000) for size in sizes])
    second = first.again(again, digest="n", rows_per_file=None)
    assert classes_in_a_batch(packed[order_of(again, second)]) > twice  # 641 of independent draws


def classes_in_a_batch(labels: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> float:
    """How many a batch of 1,024 has, on average, of a run that takes row groups of 16 in any order."""
    groups = labels[: len(labels) // 16 * 16].reshape(-1, 16)
    groups = groups[np.random.default_rng(0).permutation(len(groups))]
    batches = groups[: len(groups) // 64 * 64].reshape(-1, 1024)
    return float(np.mean([len(set(batch.tolist())) for batch in batches]))


def test_one_pass_is_enough_for_objects_for_packed_sets_and_for_what_fits_a_part() -> None:
    objects, few = listed([100_000] * 5000), grouped([(100, 10_000_000)] * 2)
    large, small = grouped([(100, 10_000_000)] * 5000), grouped([(16, 1_600_000)] * 50_000)
    packed = replace(large, rows_per_group=16)
    plans = [plan_of(manifest).mixes_all(manifest) for manifest in (objects, few, packed, small, large)]
    assert plans == [True, True, True, True, False]
    labels = np.array(order_of(small, plan_of(small))) // 800
    assert classes_in_a_batch(labels) > 600  # in parts of so many small row groups


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2 * PART_BYTES)), min_size=1, max_size=30),
    st.sampled_from([None, 1, 10**6]),
    st.sampled_from([None, 1, 7]),
)
def test_parts_hold_every_row_once(
    groups: list[tuple[int, int]], max_pixels: int | None, rows_per_file: int | None
) -> None:
    for manifest in (grouped(groups), listed([size for _, size in groups])):
        plan = plan_of(manifest, max_pixels, rows_per_file)
        assert all(np.diff(plan.edges) > 0)
        assert sorted(order_of(manifest, plan)) == list(range(manifest.num_images))
