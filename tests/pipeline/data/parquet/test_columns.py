"""Columns of Parquet that others write: found by name, read as bytes or text whatever Arrow wraps them in."""

import datetime as dt
import io
import json
import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import parquet

from dinoray.pipeline.data.parquet.columns import (
    MisfitShard,
    as_text,
    byte_columns,
    class_names,
    image_leaf,
    text_leaf,
    unwrapped,
)

CELLS = [b"one", None, b"three"]
NESTED = [{"in": {"image": {"bytes": cell, "path": "p"}}, "label": 1} for cell in CELLS]
UUIDS = [uuid.UUID(int=5).bytes, None]

IMAGES: dict[str, tuple[Any, str]] = {
    "binary": (pa.array(CELLS), "image"),
    "large": (pa.array(CELLS, pa.large_binary()), "image"),
    "a view": (pa.array(CELLS, pa.binary_view()), "image"),
    "a dictionary": (pa.array(CELLS).dictionary_encode(), "image"),
    "an extension": (
        pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "jpeg", "own"), pa.array(CELLS)),
        "image",
    ),
    "a struct": (pa.array([{"bytes": cell, "path": "p"} for cell in CELLS]), "image"),
    "a struct of a view": (
        pa.array([{"bytes": cell} for cell in CELLS], pa.struct({"bytes": pa.binary_view()})),
        "image",
    ),
    "structs in structs": (pa.array(NESTED), "image.in.image"),
    "their field": (pa.array(NESTED), "image.in.image.bytes"),
}


def reread(column: pa.Array, name: str = "image") -> pa.Table:
    return pq.read_table(io.BytesIO(parquet({"unused": [0] * len(column), name: column}, row_group_size=9)))


@pytest.mark.parametrize("kind", IMAGES)
def test_image_bytes_are_read_from_any_wrapping(kind: str) -> None:
    column, name = IMAGES[kind]
    table = reread(column)
    leaf = image_leaf(table.schema, name, "x.parquet")
    assert leaf.of(table.to_batches()[0]).to_pylist() == CELLS
    assert byte_columns(table.schema) == [name.removesuffix(".bytes")]


def test_images_of_one_width_are_found_and_digests_are_not() -> None:
    width = 80
    images = pa.array([bytes(width)] * 2, pa.binary(width))
    schema = reread(images).schema
    assert byte_columns(schema) == ["image"]
    assert byte_columns(reread(pa.array([bytes(64)], pa.binary(64))).schema) == []


def test_a_name_with_a_dot_is_a_column_before_it_is_a_field() -> None:
    columns = {"image.bytes": [b"column"], "image": [{"bytes": b"field"}]}
    table = pq.read_table(io.BytesIO(parquet(columns)))
    batch = table.to_batches()[0]
    assert image_leaf(table.schema, "image.bytes", "x").of(batch).to_pylist() == [b"column"]
    assert image_leaf(table.schema, "image", "x").of(batch).to_pylist() == [b"field"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["a", None]), ["a", None]),
        (pa.array(["a"], pa.large_string()), ["a"]),
        (pa.array(["a"], pa.string_view()), ["a"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([7, None]), ["7", None]),
        (pa.array([7]).dictionary_encode(), ["7"]),
        (pa.array([True]), ["true"]),
        (pa.array([1.0, float("nan"), 2.5]), ["1", None, "2.5"]),
        (pa.array([Decimal("1.50")]), ["1.50"]),
        (pa.array([Decimal(3)], pa.decimal256(50, 0)), ["3"]),
        (pa.array([dt.date(2020, 1, 2)]), ["2020-01-02"]),
        (pa.array([dt.datetime(2020, 1, 2)], pa.timestamp("s")), ["2020-01-02 00:00:00"]),
        (pa.array([dt.datetime(2020, 1, 2)], pa.timestamp("s", "No/Where")), ["2020-01-02 00:00:00"]),
        (pa.nulls(2), [None, None]),
        (pa.array(UUIDS, pa.uuid()), [uuid.UUID(int=5).hex, None]),
        (pa.array(UUIDS, pa.binary(16)), [uuid.UUID(int=5).hex, None]),
        (pa.array([b"cat", b"\xff\x00", b"a\x00", None]), ["cat", "ff00", "6100", None]),
        (pa.array([b"cat"], pa.binary_view()), ["cat"]),
        (pa.array([(1, 2, 3)], pa.month_day_nano_interval()), [str(pa.MonthDayNano([1, 2, 3]))]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_keys_and_labels_of_any_type_are_text(values: pa.Array, expected: list[str | None]) -> None:
    assert as_text(unwrapped(values)).to_pylist() == expected


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=8), max_size=20, unique=True))
def test_bytes_stay_different_as_text_of_one_length(values: list[bytes]) -> None:
    texts = as_text(pa.array(values, pa.binary())).to_pylist()
    for value, text in zip(values, texts, strict=True):
        assert text in (value.hex(), value.decode(errors="replace"))
    by_length: dict[int, list[str]] = {}
    for value, text in zip(values, texts, strict=True):
        by_length.setdefault(len(value), []).append(text)
    assert all(len(set(texts)) == len(texts) for texts in by_length.values())


def test_a_class_is_named_by_the_list_of_hugging_face() -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "odd": {"_type": "ClassLabel"}}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({"label": pa.int64(), "odd": pa.int64()}, metadata=note)
    assert class_names(schema, "label") == ["cat", "dog"]
    assert class_names(schema, "odd") is None
    assert as_text(pa.array([1, 0, None, -1, 2]), ["cat", "dog"]).to_pylist() == [
        "dog",
        "cat",
        None,
        None,
        None,
    ]


LISTS, TEXTS, TWICE = pa.list_(pa.binary()), pa.string(), pa.binary()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([("image", LISTS)], ["list<item: binary>", "write one encoded image per row"]),
        ([("image", TEXTS)], ["holds string", "data.uri_column=image"]),
        ([("image", pa.struct({"path": TEXTS}))], ["struct<path: string>", "data.uri_column=image.path"]),
        ([("image", pa.int64())], ["holds int64", "set data.image_column to such a column"]),
        ([("other", TWICE)], ["no column 'image'", "'other'"]),
        ([("image", TWICE), ("image", TWICE)], ["2 columns 'image'", "choose another column"]),
    ],
)
def test_a_column_that_holds_no_images_is_named_with_its_type(
    fields: list[tuple[str, pa.DataType]], words: list[str]
) -> None:
    with pytest.raises(MisfitShard) as error:
        image_leaf(pa.schema(fields), "image", "x.parquet")
    for word in [*words, "x.parquet"]:
        assert word in str(error.value)


def test_a_key_of_lists_is_refused_by_its_type() -> None:
    with pytest.raises(MisfitShard, match=r"'key' of x holds list<.*>, but a key or label is one value"):
        text_leaf(pa.schema([("key", LISTS)]), "key", "x")
