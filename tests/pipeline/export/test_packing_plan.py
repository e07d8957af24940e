"""Packing: in which order images are packed, and where parts and row groups are cut."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.data.manifest import Manifest
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
