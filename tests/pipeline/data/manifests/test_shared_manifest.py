"""The manifest in Ray's store: all actors of a node read one copy, whatever its size. Checked by bytes, without Ray."""

import io
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.reading.source import Source

ROWS = 50_000
_SETTINGS: dict[str, Any] = {"path": "s3://bucket/data", "image_column": "image"} | dict.fromkeys(
    ("key_column", "label_column")
)


def manifest_of(kind: str) -> Manifest:
    """Keys and ETags as S3 has them; of Parquet, shards of ten row groups."""
    index = np.arange(ROWS) // (1 if kind == "images" else 10)
    suffix = "jpeg" if kind == "images" else "parquet"
    columns = {
        "key": pa.array(
            [f"data/n{number // 1300:08}/{number:010}.{suffix}" for number in index], pa.large_string()
        ),
        "size": pa.array(index + 1, pa.int64()),
        "etag": pa.array([f"{number:032x}" for number in index], pa.string()),
    }
    if kind == "images":
        columns |= {name: pa.nulls(ROWS, pa.string()) for name in ("storage_class", "label")}
        return Manifest(
            pa.table(columns), "images", "s3://bucket", 0, {**_SETTINGS, "label_from_parent": False}
        )
    columns["row_group"] = pa.array(np.arange(ROWS) % 10, pa.int32())
    for name, value in (("num_rows", 100), ("num_bytes", 10**7), ("num_unlabelled", 0)):
        columns[name] = pa.array(np.full(ROWS, value), pa.int64())
    return Manifest(pa.table(columns), "parquet", "s3://bucket", 0, {**_SETTINGS, "label_from_parent": False})


def buffers_of(array: pa.Array) -> list[pa.Buffer]:
    texts = buffers_of(array.dictionary) if pa.types.is_dictionary(array.type) else []
    return [buffer for buffer in array.buffers() if buffer is not None] + texts


def pickled(value: object) -> tuple[bytes, list[bytes]]:
    """As Ray pickles: (what each process unpickles, what lies once in the store)."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return data, [bytes(buffer.raw()) for buffer in buffers]


@pytest.mark.parametrize(("kind", "most_bytes"), [("images", 110), ("parquet", 70)])
def test_each_process_maps_the_table_and_copies_none_of_it(kind: str, most_bytes: int) -> None:
    manifest = manifest_of(kind)
    data, shared = pickled(Source(DataConfig(path="s3://bucket/data"), manifest))
    assert len(data) < 5000
    assert sum(map(len, shared)) < most_bytes * ROWS  # 1 M images: 0.1 GB
    allocated = pa.total_allocated_bytes()
    source: Source = pickle.loads(data, buffers=shared)
    assert [source.key(number) for number in (0, ROWS - 1)] == [
        Source(DataConfig(path="s3://bucket/data"), manifest).key(number) for number in (0, ROWS - 1)
    ]
    assert source.manifest.table.equals(manifest.table)
    places = {pa.py_buffer(buffer).address for buffer in shared}
    columns = source.manifest.table.columns
    used = {buffer.address for column in columns for buffer in buffers_of(column.chunk(0))}
    assert used <= places
    assert pa.total_allocated_bytes() - allocated < 8 * ROWS / 4


def test_a_file_holds_what_its_table_does() -> None:
    manifest = manifest_of("parquet")
    data = manifest.to_bytes()
    config = DataConfig(path="s3://bucket/data", label_from_parent=False, image_column="image")
    assert Manifest.from_bytes(data, config) == manifest
    plain = pq.read_table(io.BytesIO(data))
    assert plain["key"].type == pa.large_string()  # as any program reads it
    assert plain.to_pylist() == manifest.table.to_pylist()
    assert manifest.objects.num_rows == ROWS / 10
    assert manifest.objects["key"].to_pylist() == list(dict.fromkeys(plain["key"].to_pylist()))


def test_an_order_of_row_groups_shares_their_sizes() -> None:
    source = Source(DataConfig(path="s3://bucket/data"), manifest_of("parquet"))
    data, shared = pickled(source.order(seed=0))
    assert len(data) < 5000
    assert sum(map(len, shared)) == 8 * ROWS  # 1 M row groups: 8 MB
    order = pickle.loads(data, buffers=shared)
    positions = np.arange(0, source.num_images, 997)
    np.testing.assert_array_equal(order.locate(positions), source.order(seed=0).locate(positions))
