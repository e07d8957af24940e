"""Parquet shards on a disk: the row of an index, cells that are images or none, damage, and the row group cache."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fresh_python import run_python
from hypothesis import given
from hypothesis import strategies as st
from samples import hostile_entries, needs_hostile, parquet, write_all
from sources import fetch_all, source_of

from dinoray.pipeline.data.reading.source import Fetched, Status
from dinoray.pipeline.data.recently_used import RecentlyUsed


@given(
    shards=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4),
    cache_bytes=st.sampled_from([0, 300, 1 << 20]),
    data=st.data(),
)
def test_an_index_finds_its_row_whatever_the_row_groups(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], cache_bytes: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    rows: list[tuple[str, bytes]] = []
    for number, groups in enumerate(shards):
        cells = [f"image {number}.{row}".encode() for row in range(sum(groups))]
        write_all(folder, {f"{number}.parquet": parquet({"image": cells}, row_group_size=groups[0])})
        rows += [(f"{number}.parquet#{row}", cell) for row, cell in enumerate(cells)]
    source = source_of(str(folder), row_group_cache_bytes=cache_bytes)
    asked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30))
    assert source.num_images == len(rows)
    assert [source.key(index) for index in asked] == [rows[index][0] for index in asked]
    assert [(f.key, f.data) for f in source.fetch(asked)] == [rows[index] for index in asked]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 12)), max_size=40),
    st.integers(0, 200),
)
def test_the_row_group_cache_forgets_what_was_unused_for_longest(
    steps: list[tuple[bool, int, int]], max_bytes: int
) -> None:
    tables = {
        (group, rows): pa.table({"x": pa.array([group] * rows, pa.int64())}) for _, group, rows in steps
    }
    cache, model = RecentlyUsed[int, pa.Table](max_bytes), OrderedDict[int, pa.Table]()
    for is_put, group, rows in steps:
        if is_put:
            cache.put(group, tables[group, rows])
            model.pop(group, None)
            model[group] = tables[group, rows]
            while sum(table.nbytes for table in model.values()) > max_bytes and len(model) > 1:
                del model[next(iter(model))]
        else:
            assert cache.get(group) is model.get(group)
            if group in model:
                model.move_to_end(group)
        assert cache.num_bytes == sum(table.nbytes for table in model.values())
        assert cache.num_bytes <= max_bytes or len(model) == 1


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_shard_on_a_disk_that_changed_is_corrupt_where_it_no_longer_fits(
    tmp_path: Path, num_rows: int
) -> None:
    write_all(tmp_path, {"x.parquet": parquet({"image": [b"old"] * 10}, row_group_size=5)})
    source = source_of(str(tmp_path))
    write_all(tmp_path, {"x.parquet": parquet({"image": [b"new"] * num_rows}, row_group_size=num_rows)})
    assert {f.status for f in fetch_all(source)} == {Status.CORRUPT}


def test_null_and_empty_cells_are_corrupt_and_labels_are_text(tmp_path: Path) -> None:
    columns = {
        "image": [b"one", None, b"", b"four"],
        "id": ["k1", "k2", None, "k4"],
        "class": [7, 8, 9, None],
    }
    write_all(tmp_path, {"x.parquet": parquet(columns)})
    fetched = fetch_all(source_of(str(tmp_path), key_column="id", label_column="class"))
    assert fetched == [
        Fetched("k1", b"one", "7", Status.OK, ""),
        Fetched("k2", None, "8", Status.CORRUPT, "null"),
        Fetched("x.parquet#2", None, "9", Status.CORRUPT, "0 bytes"),
        Fetched("k4", b"four", None, Status.OK, ""),
    ]


def test_a_struct_of_bytes_and_path_is_an_image_column_too(tmp_path: Path) -> None:
    cells = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    labels = pa.array(["x", "y", "x"]).dictionary_encode()
    write_all(tmp_path, {"x.parquet": parquet({"image": pa.array(cells, kind), "label": labels})})
    fetched = fetch_all(source_of(str(tmp_path), label_column="label"))
    assert [(f.data, f.label, f.status) for f in fetched] == [
        (b"one", "x", Status.OK),
        (None, "y", Status.CORRUPT),
        (None, "x", Status.CORRUPT),
    ]


def test_a_flipped_byte_in_a_shard_with_checksums_is_found(tmp_path: Path) -> None:
    data = bytearray(
        parquet({"image": [bytes(5000)]}, write_page_checksum=True, compression="none", use_dictionary=False)
    )
    write_all(tmp_path, {"x.parquet": bytes(data)})
    source = source_of(str(tmp_path))
    data[2500] ^= 1
    write_all(tmp_path, {"x.parquet": bytes(data)})
    [fetched] = source.fetch([0])
    assert (fetched.status, fetched.data) == (Status.CORRUPT, None)


@needs_hostile
def test_hostile_shards_give_their_good_rows_and_count_the_others(tmp_path: Path) -> None:
    write_all(tmp_path, {e.key: e.data for e in hostile_entries() if e.key.startswith("parquet/")})
    nulls = fetch_all(source_of(str(tmp_path / "parquet/null-images.parquet")))
    assert sorted(f.status.name for f in nulls) == ["CORRUPT", "CORRUPT", "OK"]
    mixed = fetch_all(source_of(str(tmp_path / "parquet/mixed-good-bad.parquet")))
    assert len(mixed) == 6


MILLION = """
import numpy as np, psutil, pyarrow as pa
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.order import Order
from dinoray.pipeline.data.reading.source import Source

n = 1_000_000
columns = {
    "key": pa.array(np.repeat([f"p/{i:05d}.parquet" for i in range(n // 100)], 100), pa.large_string()),
    "size": pa.array(np.full(n, 500_000_000)),
    "etag": pa.array(np.repeat([f"{i:032x}" for i in range(n // 100)], 100)),
    "row_group": pa.array((np.arange(n) % 100).astype(np.int32)),
    "num_rows": pa.array(np.arange(n) % 3 + 99),
    "num_bytes": pa.array(np.full(n, 5_000_000)),
    "num_unlabelled": pa.array(np.zeros(n, np.int64)),
}
columns_of_images = {"image_column": "image", "key_column": None, "label_column": None, "label_from_parent": False}
manifest = Manifest(pa.table(columns), "parquet", "s3://b", 0, {"path": "s3://b/p", **columns_of_images})
before = psutil.Process().memory_info().rss
source = Source(DataConfig(path="s3://b/p", **columns_of_images), manifest)
order = Order(source.num_images, seed=0, group_sizes=manifest.group_sizes, window_groups=64)
order.locate(range(192))
print(source.num_images, source.key(12_345_678), (psutil.Process().memory_info().rss - before) // 1_000_000)
"""


def test_a_million_row_groups_take_little_memory_in_each_actor() -> None:
    num_images, key, megabytes = run_python(MILLION).split()
    assert int(num_images) == sum(i % 3 + 99 for i in range(1_000_000))
    sizes = [i % 3 + 99 for i in range(200_000)]
    starts = np.cumsum(sizes) - sizes
    group = int(np.searchsorted(starts, 12_345_678, side="right")) - 1
    assert key == f"p/{group // 100:05d}.parquet#{12_345_678 - starts[group // 100 * 100]}"
    assert int(megabytes) < 150  # as Python objects they took 589
