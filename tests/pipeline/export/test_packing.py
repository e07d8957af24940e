"""Packing: what a part holds, and which keys are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import jpeg, scene
from samples import parquet, write_all

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.export.packing import KIND, check_keys, shrink, write_part
from dinoray.pipeline.export.packing_plan import Plan
from dinoray.pipeline.export.parquet_parts import PartFooter, check_bad, collect
from dinoray.pipeline.storage.files import Directory


def account(out: Directory, plan: Plan, part: int) -> tuple[list[PartFooter], list[dict[str, Any]]]:
    return collect(out, {part: plan.rows(part)}, KIND, plan.identity)


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


def test_parts_hold_image_key_and_label_of_each_usable_image(source: Source, tmp_path: Path) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 2, 6), None)
    results = [write_part(None, source, part, out=out, plan=plan) for part in (0, 1)]
    assert sum(result.num_rows for result in results) == 4
    assert [result.num_rows + result.num_bad for result in results] == [2, 4]
    tables = [pq.read_table(tmp_path / "out" / f"part-0000{part}.parquet") for part in (0, 1)]
    keys = [key for part in (0, 1) for key in plan.images(part, source.manifest).tolist()]
    assert sorted(keys) == list(range(6))
    assert keys != list(range(6))  # they are shuffled
    expected = [source.key(image) for image in keys if image not in (1, 4)]
    quarantined = [
        x for table in tables for x in json.loads(table.schema.metadata[b"dinoray.packed"])["quarantined"]
    ]
    assert sorted((x["row"], x["key"], x["status"]) for x in quarantined) == [
        (1, "a/1.jpg", "corrupt"),
        (4, "b/1.jpg", "missing"),
    ]
    table = pa.concat_tables(tables)
    assert table["key"].to_pylist() == expected
    assert table.column_names == ["image", "key", "label"]
    assert [str(kind) for kind in table.schema.types] == ["binary", "string", "string"]
    assert table["label"].to_pylist() == [key[0] for key in expected]
    files = [(tmp_path / "images" / key).read_bytes() for key in expected]
    assert table["image"].to_pylist() == files
    notes = [json.loads(table.schema.metadata[b"dinoray.packed"]) for table in tables]
    assert (
        sum(note["bytes_in"] for note in notes)
        == sum(note["bytes_out"] for note in notes)
        == sum(map(len, files))
    )
    assert [note["num_shrunk"] for note in notes] == [0, 0]


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
    assert {record["row"]: record["status"] for record in bad} == {1: "corrupt", 4: "missing"}
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
    out = Directory(str(tmp_path / "out"))
    place = Plan("m", (0, 6), None).images(0, source.manifest).tolist().index(4)
    plan = Plan("m", tuple(sorted({0, place, place + 1, 6})), None)
    part = plan.edges.index(place)
    assert write_part(None, source, part, out=out, plan=plan) == (part, 0, 1)
    assert account(out, plan, part)[0][0].num_rows == 0
    others = [other for other in range(plan.num_parts) if other != part]
    for other in others:
        write_part(None, source, other, out=out, plan=plan)
    assert build_manifest(DataConfig(path=out.uri, key_column="key")).num_images == 4


def test_row_groups_have_the_same_number_of_rows_but_the_last_of_a_part(
    source: Source, tmp_path: Path
) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 6), None, rows_per_group=3)
    write_part(None, source, 0, out=out, plan=plan)
    manifest = build_manifest(DataConfig(path=out.uri, key_column="key"))
    assert manifest.table["num_rows"].to_pylist() == [3, 1]
    assert manifest.rows_per_group == 3
    assert (
        Manifest.from_bytes(manifest.to_bytes(), DataConfig(path=out.uri, key_column="key")).rows_per_group
        == 3
    )


def test_shards_that_others_wrote_from_packed_ones_count_as_theirs(source: Source, tmp_path: Path) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 6), None, rows_per_group=2)
    write_part(None, source, 0, out=out, plan=plan)
    part = tmp_path / "out" / "part-00000.parquet"
    pq.write_table(pq.read_table(part), part)  # one row group, whose shard keeps the note
    assert b"dinoray.packed" in pq.read_schema(part).metadata
    assert build_manifest(DataConfig(path=out.uri, key_column="key")).rows_per_group is None


def test_damage_in_a_packed_image_is_noticed_when_it_is_read(source: Source, tmp_path: Path) -> None:
    out, plan = Directory(str(tmp_path / "out")), Plan("m", (0, 6), None)
    write_part(None, source, 0, out=out, plan=plan)
    file = tmp_path / "out" / "part-00000.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    config = DataConfig(path=out.uri, key_column="key")
    assert any(f.data is None for f in Source(config, build_manifest(config)).fetch(range(4)))


def test_parts_of_other_settings_are_not_taken_for_ours(source: Source, tmp_path: Path) -> None:
    out = Directory(str(tmp_path / "out"))
    write_part(None, source, 0, out=out, plan=Plan("m", (0, 6), None))
    for other in (Plan("other", (0, 6), None), Plan("m", (0, 6), 9), Plan("m", (0, 5, 6), None)):
        with pytest.raises(DataError, match=r"part-00000\.parquet.*delete it and run again"):
            account(out, other, 0)


# Keys.


def rows_of(tmp_path: Path, keys: list[list[Any]], **config: Any) -> Source:
    shards = {
        f"{s}.parquet": parquet(
            {"image": [b"x"] * len(some), "name": some, "other": [f"{s} {i}" for i in range(len(some))]}
        )
        for s, some in enumerate(keys)
    }
    write_all(tmp_path, shards)
    data = DataConfig(path=str(tmp_path), **config)
    return Source(data, build_manifest(data))


def test_a_key_that_names_two_images_is_refused_by_name(tmp_path: Path) -> None:
    twice = rows_of(tmp_path, [["a", "b", "c"], ["d", "e", "b"]], key_column="name")
    with pytest.raises(ConfigError, match=r"'name' has 'b' in 2 rows, .*; choose another column, or none$"):
        check_keys(twice)
    check_keys(rows_of(tmp_path, [], key_column=None))
    check_keys(rows_of(tmp_path, [], key_column="other"))


def test_keys_of_any_type_and_none_at_all_are_compared_as_what_they_become(tmp_path: Path) -> None:
    check_keys(rows_of(tmp_path / "numbers", [[1, 2, 3], [4, None, None]], key_column="name"))
    check_keys(rows_of(tmp_path / "none", [["a", "a"]]))
    with pytest.raises(ConfigError, match="'4' in 2 rows"):
        check_keys(rows_of(tmp_path / "twice", [[1, 4, 3], [4]], key_column="name"))


def test_the_share_that_the_remedy_names_is_enough_for_any_number_of_bad_images() -> None:
    for num_images in (1, 3, 7, 100, 200, 768, 1000):
        for num_bad in range(1, num_images + 1):
            out = Directory("/out")
            with pytest.raises(DataError, match=r"set data\.max_bad_fraction=[\d.]+ ") as caught:
                check_bad(num_bad, num_images, limit=0, out=out, kind=KIND)
            told = re.search(r"set data\.max_bad_fraction=([\d.]+) ", str(caught.value))
            assert told is not None
            check_bad(num_bad, num_images, limit=float(told[1]), out=out, kind=KIND)
