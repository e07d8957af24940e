"""What a plan and a run expect to be read: counted here block by block, in the slow way."""

import numpy as np
import pyarrow as pa
import pytest

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.partition import lay_out
from dinoray.pipeline.data.reading.reads import count_reads, read_by_blocks

BATCH = {"train_workers": 2, "global_batch_size": 128, "image_bytes": 400_000, "most_actors": 4}


def grouped(sizes: list[int]) -> Manifest:
    rows = [{"num_rows": size, "num_bytes": 1000 * size} for size in sizes]
    return Manifest(pa.Table.from_pylist(rows), "parquet", "/", 0, {})


def test_an_object_is_read_once_for_its_image() -> None:
    manifest = Manifest(pa.table({"size": pa.array([10, 20, 60], pa.int64())}), "images", "/", 0, {})
    assert count_reads(manifest, Order(3, seed=0), **BATCH) == (1.0, 30.0, 1.0)


def test_row_groups_of_windows_are_read_once_by_readers() -> None:
    sizes = [100] * 40
    order = Order(4000, seed=5, group_sizes=np.array(sizes), window_groups=8)
    found = count_reads(grouped(sizes), order, **BATCH)
    # Of 4000 images 3968 are in whole batches; all 40 row groups are read for them.
    assert found.images_per_request == 3968 / 40
    assert found.bytes_per_image == pytest.approx(4_000_000 / 3968)
    assert found.times_read == pytest.approx(4000 / 3968)


@pytest.mark.parametrize("window_groups", [1, 8, 20])
def test_without_readers_each_block_would_read_the_row_groups_of_its_rows(window_groups: int) -> None:
    sizes = [100] * 40
    order = Order(4000, seed=5, group_sizes=np.array(sizes), window_groups=window_groups)
    layout = lay_out(range(4000 // 128), world_size=2, global_batch_size=128, image_bytes=400_000)
    read = []
    for block in range(layout.num_blocks):
        read += sorted({image // 100 for image in order.locate(layout.block(block))[1].tolist()})
    assert read_by_blocks(order, layout, np.array(sizes)).tolist() == read


def test_whole_groups_are_read_once() -> None:
    sizes = [16] * 1000
    order = Order(16_000, seed=5, group_sizes=np.array(sizes), rows_per_group=16)
    assert count_reads(grouped(sizes), order, **BATCH) == (16.0, 1000.0, 1.0)
