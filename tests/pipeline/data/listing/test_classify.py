"""Roles, labels and parts of whole batches are what one entry after the other gives."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.data.listing import classify
from dinoray.pipeline.data.listing.classify import EMBEDDINGS, PACKED, Classifier
from dinoray.pipeline.data.listing.folder_labels import (
    AUTO,
    automatic_label,
    folder_label,
    has_label_pair,
    part_of,
)
from dinoray.pipeline.data.listing.listing import Listing
from dinoray.pipeline.data.listing.names import role_of
from dinoray.pipeline.data.listing.sorting import is_sorted
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.storage.pages import Objects

names = st.one_of(
    st.sampled_from(
        ["train-1.jpg", "ſcan.JPG", "x.j2K", ".jpg", "..two.jpg", "._x.jpg", "_x.jpg", "a.jpg ", "x\n.png"]
    ),
    st.sampled_from(
        [
            "config.yaml",
            "study.json",
            "trial.json",
            "embed.json",
            "pack.json",
            "x.parquet",
            "x.TAR",
            "README",
            "b",
        ]
    ),
    st.sampled_from(
        ["val-1.tar.gz", "Test-x", "é.jpeg", "a.jpg\n", "a.jpg.crc", "", "x.gİf", "TESTING-9.GIF"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=4).map(lambda text: f"{text}.jpg"),
    st.text("./-_ 0aJjPpGgK\n", max_size=6),
)
folders = st.sampled_from(
    ["", "a/", "a/b/", "2023/01/", "label=x%20y/", "//", "DCIM/100CANON/", "_about/", "r/_about/", "train/é/"]
)
entries = st.lists(st.builds(str.__add__, folders, names).filter(bool), unique=True, max_size=30)


def one_by_one(
    keys: Iterable[str], prefix: str, labels: bool | str
) -> tuple[dict[str, Any], dict[str, Any], set[Any]]:
    """The rules, applied to one entry after the other."""
    found: dict[str, Any] = {"image": {}, "unknown": {}, "parquet": {}, "tar": {}, "other": {}}
    marks: dict[str, set[str]] = defaultdict(set)
    parts: set[Any] = set()
    for key in keys:
        *above, name = key[len(prefix) :].split("/")
        if any(re.fullmatch(r"\.[^.].*", folder, re.DOTALL) for folder in above):
            continue  # hidden
        role = role_of(key)
        if name in ("config.yaml", "study.json", "environment.json", "manifest.parquet", "trial.json"):
            marks["/".join(above)].add(name)
        elif above and f"{above[-1]}/{name}" in (EMBEDDINGS, PACKED):
            marks["/".join(above[:-1])].add(f"{above[-1]}/{name}")
        label = folder_label(above) if labels else None
        if labels == AUTO:
            label = (
                automatic_label(above) if role not in ("parquet", "tar") or has_label_pair(above) else None
            )
        found[role][key] = None if role == "other" else label
        parts |= (
            set()
            if role == "other"
            else {part_of(above, name if role in ("parquet", "tar") or not above else "")}
        )
    return found, dict(marks), parts


def listed(keys: list[str]) -> pa.RecordBatch:
    etags, classes = [f"tag {key}" for key in keys], [f"class {key}" for key in keys]
    return Objects(keys, [len(key) for key in keys], etags, classes).to_arrow()


@given(entries, st.sampled_from([True, False, "auto"]), st.sampled_from(["", "in/é/"]), st.integers(1, 5))
def test_batches_give_what_one_entry_after_the_other_gives(
    rest: list[str], labels: Any, prefix: str, size: int
) -> None:
    keys = [prefix + key for key in rest]
    found = Classifier(prefix, labels)
    found.add(listed(keys[place : place + size]) for place in range(0, len(keys), size))
    tables, marks, parts = one_by_one(keys, prefix, labels)
    assert (found.marks, found.parts) == (marks, parts)
    for table, expected in zip(found.tables(), tables.values(), strict=True):
        rows = {row["key"]: row for row in table.to_pylist()}
        assert {key: row["label"] for key, row in rows.items()} == expected
        assert table.num_rows == len(rows)
        for key, row in rows.items():
            expected_row = (len(key), f"tag {key}", f"class {key}")
            assert (row["size"], row["etag"], row["storage_class"]) == expected_row


def test_most_images_need_no_look_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "role_of", lambda key: pytest.fail(key))
    found = Classifier("", "auto")
    found.add(iter([listed(["a/b.jpg", "c.JPEG", "_d/..e/f-1.tar.tiff"])]))
    assert [table.num_rows for table in found.tables()] == [3, 0, 0, 0, 0]


def test_a_batch_is_joined_with_the_next_ones_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "_ROWS", 4)
    batches = [listed([f"{number}{n}.jpg" for n in range(3)]) for number in range(5)]
    assert [batch.num_rows for batch in classify._joined(batches)] == [6, 6, 3]


@given(st.lists(st.lists(st.text(max_size=3), max_size=4), max_size=4))
def test_keys_in_order_are_found_to_be(chunks: list[list[str]]) -> None:
    keys = [key.encode(errors="replace").decode() for chunk in chunks for key in chunk]
    clean = [[key.encode(errors="replace").decode() for key in chunk] for chunk in chunks]
    array = pa.chunked_array(clean, pa.large_string())
    assert is_sorted(array) == (keys == sorted(keys, key=str.encode))


def test_a_manifest_is_the_same_whatever_order_the_store_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sorted(f"d/{'ab'[n % 2]}/{n:03}{'.jpg' if n % 5 else '.jpg:x'}" for n in range(50))
    config, tables = DataConfig(path=str(tmp_path)), []
    for order in (keys, keys[::-1], keys[::2] + keys[1::2]):
        batches = [listed(order[place : place + 7]) for place in range(0, 50, 7)]
        listing = Listing("s3://bucket", "d/", iter(batches))
        monkeypatch.setattr(
            "dinoray.pipeline.data.listing.contents.list_entries", lambda *_, found=listing, **__: found
        )
        tables.append(build_manifest(config).table)
    assert tables[0]["key"].to_pylist() == keys
    assert tables[0] == tables[1] == tables[2]
    assert tables[0]["key"].num_chunks == 1


def test_a_manifest_of_many_row_groups_is_one_table(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(b"1")
    config = DataConfig(path=str(tmp_path))
    one = build_manifest(config)
    table = pq.read_table(pa.BufferReader(one.to_bytes()))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2)
    again = Manifest.from_bytes(sink.getvalue().to_pybytes(), config)
    assert again == one
    assert [column.num_chunks for column in again.table.columns] == [1] * 5


def test_thousands_of_class_folders_cost_no_pass_over_the_keys_each(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"d/train/{n:04}/x.jpg" for n in range(9)] + [
        f"d/c{n:04}/{m}.jpg" for n in range(2000) for m in "abc"
    ]
    found = Listing("s3://bucket", "d/", iter([listed(keys)]))
    monkeypatch.setattr("dinoray.pipeline.data.listing.contents.list_entries", lambda *_, **__: found)
    looked_for: list[str] = []
    starts_with = pc.starts_with
    monkeypatch.setattr(
        pc, "starts_with", lambda keys, name: looked_for.append(name) or starts_with(keys, name)
    )
    assert build_manifest(DataConfig(path="s3://bucket/d")).num_images == len(keys)
    assert looked_for == ["d/train/"]
