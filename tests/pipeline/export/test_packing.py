"""Packing: where parts are cut, what a part holds, and which keys are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_files import jpeg, scene
from samples import parquet, write_all

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.export.packing import (
    KIND,
    PART_BYTES,
    PART_ROWS,
    ROW_GROUP_BYTES,
    Plan,
    check_keys,
    cut_parts,
    shrink,
    write_part,
)
from dinoray.pipeline.export.parquet_parts import PartFooter, collect
from dinoray.pipeline.storage.files import Directory


def account(out: Directory, plan: Plan, part: int) -> tuple[list[PartFooter], list[dict[str, Any]]]:
    return collect(out, {part: plan.rows(part)}, KIND, plan.identity)


# Parts.


def listed(sizes: list[int]) -> Manifest:
    """A manifest of image objects of these sizes."""
    return Manifest(pa.table({"size": pa.array(sizes, pa.int64())}), "images", "/", 0, {})


def grouped(groups: list[tuple[int, int]]) -> Manifest:
    """A manifest of row groups, (rows, bytes) each."""
    return Manifest(
        pa.Table.from_pylist([{"num_rows": rows, "num_bytes": size} for rows, size in groups]),
        "parquet",
        "/",
        0,
        {},
    )


def cut(manifest: Manifest, max_pixels: int | None = None, rows_per_file: int | None = None) -> list[int]:
    return list(cut_parts(manifest, max_pixels=max_pixels, rows_per_file=rows_per_file))


def test_parts_hold_what_they_may_and_no_more() -> None:
    size = PART_BYTES // 400
    assert cut(listed([size] * 100_000)) == [*range(0, 100_000, 400), 100_000]
    # Two to one: the larger ones are fewer to a part.
    assert np.diff(cut(listed([2 * size] * 50_000 + [size] * 50_000))).tolist() == [200] * 250 + [400] * 125


def test_few_images_make_few_parts_and_tiny_ones_are_bounded_by_their_number() -> None:
    assert cut(listed([5000] * 200)) == [0, 200]
    assert cut(listed([5000] * 1024)) == [0, 256, 512, 768, 1024]
    assert cut(listed([0] * 10 * PART_ROWS * 64))[1] == PART_ROWS
    assert cut(listed([7])) == [0, 1]


def test_what_will_be_shrunk_counts_as_what_it_will_be() -> None:
    photos = listed([3_000_000] * 100_000)
    assert cut(photos)[1] == PART_BYTES // 3_000_000
    assert cut(photos, max_pixels=270_000)[1] == PART_BYTES // 135_000
    assert cut(listed([20_000] * 100_000), max_pixels=270_000) == cut(listed([20_000] * 100_000))


def test_an_image_larger_than_a_part_is_one() -> None:
    sizes = [10] * 3000 + [3 * PART_BYTES] * 2 + [10] * 3000
    edges = cut(listed(sizes))
    assert {3001, 3002} <= set(edges)


def test_row_groups_are_whole_unless_they_are_larger_than_a_part() -> None:
    quarter = PART_BYTES // 4
    assert cut(grouped([(100, quarter)] * 1000)) == [*range(0, 100_000, 400), 100_000]
    assert cut(grouped([(100, 3 * quarter)] * 1000)) == [*range(0, 100_000, 100), 100_000]
    assert cut(grouped([(100, 4 * PART_BYTES)] * 300)) == [*range(0, 30_000, 25), 30_000]


@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 2 * PART_BYTES)), min_size=1, max_size=30),
    st.sampled_from([None, 1, 10**6]),
    st.sampled_from([None, 1, 77]),
)
def test_parts_hold_every_row_once(
    groups: list[tuple[int, int]], max_pixels: int | None, rows_per_file: int | None
) -> None:
    edges = cut(grouped(groups), max_pixels, rows_per_file)
    assert edges[0] == 0
    assert edges[-1] == sum(rows for rows, _ in groups)
    assert all(np.diff(edges) > 0)


# What a part holds.


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Six images, of which row 1 cannot be decoded and row 4 is gone."""
    files = {f"{label}/{i}.jpg": jpeg(scene(300 + 100 * i, 200)) for label in ("a", "b") for i in range(3)}
    write_all(tmp_path / "images", files | {"a/1.jpg": b"no picture"})
    config = DataConfig(path=str(tmp_path / "images"), label_from_parent=True)
    source = Source(config, build_manifest(config))
    (tmp_path / "images/b/1.jpg").unlink()
    return source


def test_a_part_holds_image_key_and_label_of_each_usable_image(source: Source, tmp_path: Path) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 2, 6), None)
    assert write_part(None, source, 0, out=out, plan=plan) == (0, 2, 0)  # nothing is decoded
    assert write_part(None, source, 1, out=out, plan=plan) == (1, 3, 1)
    table = pq.read_table(tmp_path / "out" / "part-00001.parquet")
    assert table.column_names == ["image", "key", "label"]
    assert [str(kind) for kind in table.schema.types] == ["binary", "string", "string"]
    assert table["key"].to_pylist() == ["a/2.jpg", "b/0.jpg", "b/2.jpg"]
    assert table["label"].to_pylist() == ["a", "b", "b"]
    files = [(tmp_path / "images" / key).read_bytes() for key in table["key"].to_pylist()]
    assert table["image"].to_pylist() == files
    note = json.loads(table.schema.metadata[b"dinoray.packed"])
    assert [(x["row"], x["key"], x["status"]) for x in note["quarantined"]] == [(4, "b/1.jpg", "missing")]
    assert note["bytes_in"] == note["bytes_out"] == sum(map(len, files))
    assert note["num_shrunk"] == 0


def test_a_shrunk_part_counts_what_was_shrunk_and_names_what_is_no_image(
    source: Source, tmp_path: Path
) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 6), 400 * 200)
    assert write_part(None, source, 0, out=out, plan=plan) == (0, 4, 2)
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    expected = []
    for key in table["key"].to_pylist():
        data = (tmp_path / "images" / key).read_bytes()
        expected.append(shrink(data, max_pixels=400 * 200))
        assert (expected[-1] == data) is (key[2] != "2")  # those of 500 x 200 alone are larger
    assert table["image"].to_pylist() == expected
    footers, bad = account(out, plan, 0)
    assert [record["status"] for record in bad] == ["corrupt", "missing"]
    note = footers[0].note
    assert (note["num_shrunk"], note["bytes_out"]) == (2, sum(map(len, expected)))
    assert note["bytes_in"] > note["bytes_out"]


def test_the_same_images_make_the_same_bytes(source: Source, tmp_path: Path) -> None:
    plan = Plan("m", (0, 6), 400 * 200)
    for name in ("one", "two"):
        write_part(None, source, 0, out=Directory(str(tmp_path / name)), plan=plan)
    one, two = (tmp_path / name / "part-00000.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_part_without_a_usable_image_is_written_too(source: Source, tmp_path: Path) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 4, 5, 6), None)
    assert write_part(None, source, 1, out=out, plan=plan) == (1, 0, 1)
    write_part(None, source, 2, out=out, plan=plan)
    assert account(out, plan, 1)[0][0].num_rows == 0
    assert build_manifest(DataConfig(path=out.uri, key_column="key")).num_images == 1


def test_row_groups_stay_small_beside_what_a_reader_caches(tmp_path: Path) -> None:
    sizes = [900_000] * 9 + [3 * ROW_GROUP_BYTES] + [900_000] * 3
    write_all(tmp_path / "images", {f"{i:02d}.jpg": bytes([i]) * size for i, size in enumerate(sizes)})
    config = DataConfig(path=str(tmp_path / "images"))
    source, out = Source(config, build_manifest(config)), Directory(str(tmp_path / "out"))
    plan = Plan("m", (0, len(sizes)), None)
    write_part(None, source, 0, out=out, plan=plan)
    groups = build_manifest(DataConfig(path=out.uri, key_column="key")).table
    assert groups["num_rows"].to_pylist() == [4, 4, 1, 1, 3]
    assert DataConfig(path="x").row_group_cache_bytes / 32 >= ROW_GROUP_BYTES


def test_damage_in_a_packed_image_is_noticed_when_it_is_read(source: Source, tmp_path: Path) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 6), None)
    write_part(None, source, 0, out=out, plan=plan)
    file = tmp_path / "out" / "part-00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    config = DataConfig(path=out.uri, key_column="key")
    assert any(f.data is None for f in Source(config, build_manifest(config)).fetch(range(5)))


def test_parts_of_other_settings_are_not_taken_for_ours(source: Source, tmp_path: Path) -> None:
    out = Directory(str(tmp_path / "out"))
    write_part(None, source, 0, out=out, plan=Plan("m", (0, 6), None))
    for other in (Plan("other", (0, 6), None), Plan("m", (0, 6), 9), Plan("m", (0, 5, 6), None)):
        with pytest.raises(DataError, match=r"part-00000\.parquet.*delete it and run again"):
            account(out, other, 0)


# Keys.


def rows_of(tmp_path: Path, keys: list[list[Any]], **config: Any) -> Source:
    shards = {
        f"{s}.parquet": parquet({"image": [b"x"] * len(some), "name": some}) for s, some in enumerate(keys)
    }
    write_all(tmp_path, shards)
    data = DataConfig(path=str(tmp_path), **config)
    return Source(data, build_manifest(data))


def test_a_key_that_names_two_images_is_refused_by_name(tmp_path: Path) -> None:
    twice = rows_of(tmp_path, [["a", "b", "c"], ["d", "e", "b"]], key_column="name")
    with pytest.raises(ConfigError, match=r"data\.key_column='name' has 'b' in 2 rows"):
        check_keys(twice)


def test_keys_of_any_type_and_none_at_all_are_compared_as_what_they_become(tmp_path: Path) -> None:
    check_keys(rows_of(tmp_path / "numbers", [[1, 2, 3], [4, None, None]], key_column="name"))
    check_keys(rows_of(tmp_path / "none", [["a", "a"]]))
    with pytest.raises(ConfigError, match="'4' in 2 rows"):
        check_keys(rows_of(tmp_path / "twice", [[1, 4, 3], [4]], key_column="name"))
