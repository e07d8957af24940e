"""The manifest: what is listed, what is kept, in which order, and that it is listed once."""

import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faults import FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from samples import hostile_entries, needs_hostile, parquet, put_all, write_all
from servers import S3Server

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.listing.listing import Entry, EntryTable
from dinoray.pipeline.data.listing.names import role_of
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest, load_or_build
from dinoray.pipeline.storage.files import Directory


def keys_of(manifest: Manifest) -> list[str]:
    keys: list[str] = manifest.table["key"].to_pylist()
    return keys


@pytest.mark.parametrize(
    ("key", "role"),
    [
        ("a/b.jpg", "image"),
        ("a/B.JPEG", "image"),
        ("x.jfif", "image"),
        ("x.Tiff", "image"),
        ("x.avif", "image"),
        ("x.jp2", "image"),
        ("x.tar.png", "image"),
        ("trailing.jpg ", "image"),
        ("..two.jpg", "image"),
        ("_under.jpg", "image"),
        ("%41.gif", "image"),
        ("line\nfeed.webp", "image"),
        ("no-suffix", "unknown"),
        ("dots/../up", "unknown"),
        ("folder.jpg/marker/", "other"),
        ("._resource.jpg", "other"),
        (".DS_Store", "other"),
        ("Thumbs.db", "other"),
        ("x.jpg.crc", "other"),
        ("x.svg", "other"),
        ("README", "other"),
        ("_SUCCESS", "other"),
        ("part-0.parquet", "parquet"),
        ("_metadata.parquet", "other"),
    ],
)
def test_a_name_tells_what_an_object_is(key: str, role: str) -> None:
    assert role_of(key) == role


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, unique=True))
def test_arrow_sorts_keys_in_the_order_of_their_bytes(keys: list[str]) -> None:
    table = EntryTable()
    for key in keys:
        table.add(Entry(key, len(key), "tag"), None)
    assert len(table) == len(keys)
    assert table.table().sort_by("key")["key"].to_pylist() == sorted(keys, key=str.encode)


def test_a_table_longer_than_one_batch_keeps_every_row() -> None:
    table = EntryTable()
    for number in range(70_000):
        table.add(Entry(f"{number:06}", number, ""), str(number))
    assert table.table()["size"].to_pylist() == list(range(70_000))
    assert table.table()["label"][69_999].as_py() == "69999"


def test_a_folder_is_walked_sorted_and_filtered(tmp_path: Path) -> None:
    kept = {
        "a.jpg": b"1",
        "a/z.PNG": b"22",
        "a-b.jpg": b"333",
        "a/b/c": b"\x89PNG\r\n\x1a\n",
        "empty.jpg": b"",
        "..two.jpg": b"5",
    }
    dropped = {"notes.txt": b"", ".DS_Store": b"", "a/Thumbs.db": b"", "a/LICENSE": b""}
    write_all(tmp_path, kept | dropped)
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert keys_of(manifest) == ["..two.jpg", "a-b.jpg", "a.jpg", "a/b/c", "a/z.PNG", "empty.jpg"]
    assert manifest.table["size"].to_pylist() == [1, 3, 1, 8, 2, 0]
    assert manifest.num_images == 6
    assert manifest.num_ignored == 4
    assert manifest.group_sizes is None
    assert manifest.group_bytes is None
    assert manifest.uri("a/b/c") == f"{tmp_path}/a/b/c"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error_not_a_gap(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.jpg": b"1", "closed/b.jpg": b"1"})
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(DataError, match=r"closed: Permission denied"):
            build_manifest(DataConfig(path=str(tmp_path)))
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_nothing_to_train_on_says_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path}/absent: there is no such folder"):
        build_manifest(DataConfig(path=str(tmp_path / "absent")))
    write_all(tmp_path, {"a.txt": b"1", "b.svg": b"1"})
    with pytest.raises(
        DataError, match=rf"no images under {tmp_path}; ignored: 1 .svg, 1 .txt; check data.path$"
    ):
        build_manifest(DataConfig(path=str(tmp_path)))


def test_images_beside_parquet_shards_are_refused_with_both_counts(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.jpg": b"1", "b.jpg": b"1", "c.parquet": b"1"})
    with pytest.raises(ConfigError, match=r"2 images and 1 Parquet shards"):
        build_manifest(DataConfig(path=str(tmp_path)))


def test_a_label_is_the_name_of_the_parent_folder(tmp_path: Path) -> None:
    write_all(tmp_path, {"cat/1.jpg": b"1", "pets/dog/2.jpg": b"1", "3.jpg": b"1"})
    manifest = build_manifest(DataConfig(path=str(tmp_path), label_from_parent=True))
    labels = dict(zip(keys_of(manifest), manifest.table["label"].to_pylist(), strict=True))
    assert labels == {"cat/1.jpg": "cat", "pets/dog/2.jpg": "dog", "3.jpg": None}
    with pytest.raises(ConfigError, match=r"no image of .*/cat lies in a folder"):
        build_manifest(DataConfig(path=str(tmp_path / "cat"), label_from_parent=True))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"path": "gs://bucket/x"}, "gs://"),
        ({"path": ""}, "path"),
        ({"path": "x", "fetch_concurrency": 8}, "greater than or equal to 16"),
        ({"path": "x", "max_bad_fraction": 2}, "less than or equal to 1"),
        ({"path": "x", "bucket": "y"}, "Extra inputs"),
    ],
)
def test_a_wrong_value_in_the_config_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig(**values)


def test_an_option_for_the_other_kind_of_data_is_refused(tmp_path: Path) -> None:
    write_all(
        tmp_path, {"images/a.jpg": b"1", "shards/a.parquet": parquet({"image": [b"1"], "label": ["x"]})}
    )
    with pytest.raises(ConfigError, match=r"data.label_column='label' is for Parquet"):
        build_manifest(DataConfig(path=str(tmp_path / "images"), label_column="label"))
    with pytest.raises(ConfigError, match=r"set data.label_column"):
        build_manifest(DataConfig(path=str(tmp_path / "shards"), label_from_parent=True))


def test_a_row_group_is_a_row_of_the_manifest(tmp_path: Path) -> None:
    write_all(
        tmp_path,
        {
            "b.parquet": parquet({"image": [b"x" * 9] * 5, "label": range(5)}, row_group_size=2),
            "a.parquet": parquet({"image": [b"x" * 9] * 3, "label": range(3)}, row_group_size=3),
            "none.parquet": parquet({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}),
            "LICENSE-of-the-photos": b"free",
        },
    )
    manifest = build_manifest(DataConfig(path=str(tmp_path), label_column="label"))
    rows = manifest.table.select(["key", "row_group", "num_rows"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("a.parquet", 0, 3),
        ("b.parquet", 0, 2),
        ("b.parquet", 1, 2),
        ("b.parquet", 2, 1),
    ]
    assert manifest.kind == "parquet"
    assert manifest.num_images == 8
    assert manifest.num_ignored == 1
    assert manifest.group_sizes is not None
    assert manifest.group_sizes.tolist() == [3, 2, 2, 1]
    assert manifest.group_bytes is not None
    assert all(bytes_ >= 9 * rows for bytes_, rows in zip(manifest.group_bytes, [3, 2, 2, 1], strict=True))


def test_one_parquet_file_is_a_data_set_too(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.parquet": parquet({"image": [b"1"]}), "b.parquet": parquet({"image": [b"1"]})})
    manifest = build_manifest(DataConfig(path=str(tmp_path / "a.parquet")))
    assert keys_of(manifest) == ["a.parquet"]
    assert manifest.uri("a.parquet") == str(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"x" * 5000, "cut", "flipped"], ids=str)
def test_a_damaged_shard_is_left_out_and_named_unless_most_are(tmp_path: Path, damage: bytes | str) -> None:
    good = parquet({"image": [b"1" * 500]})
    damaged = good[: len(good) // 2] if damage == "cut" else good[:-60] + b"\xff" * 52 + good[-8:]
    bad = damage if isinstance(damage, bytes) else damaged
    write_all(tmp_path, {"good.parquet": good, "bad.parquet": bad})
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert keys_of(manifest) == ["good.parquet"]
    assert manifest.damaged == ("bad.parquet",)
    assert Manifest.from_bytes(manifest.to_bytes(), DataConfig(path=str(tmp_path))) == manifest

    write_all(tmp_path, {"worse.parquet": bad})
    says = rf"2 of 3 .* cannot be read, .*{tmp_path}/bad\.parquet is not a readable Parquet file.*remove it$"
    with pytest.raises(DataError, match=says):
        build_manifest(DataConfig(path=str(tmp_path)))
    (tmp_path / "worse.parquet").unlink()  # as it says
    assert build_manifest(DataConfig(path=str(tmp_path))).num_images == 1


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.parquet": parquet({"jpeg": [b"1"], "label": [1]})})
    with pytest.raises(ConfigError, match=r"a\.parquet has no column 'image'; it has 'jpeg', 'label'"):
        build_manifest(DataConfig(path=str(tmp_path), image_column="image"))
    with pytest.raises(ConfigError, match=r"has no column 'class'"):
        build_manifest(DataConfig(path=str(tmp_path), image_column="jpeg", label_column="class"))
    with pytest.raises(ConfigError, match=r"data.image_column='label' of .* holds int64"):
        build_manifest(DataConfig(path=str(tmp_path), image_column="label"))


def test_shards_without_a_row_are_no_data_set(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.parquet": parquet({"image": pa.array([], pa.binary())})})
    with pytest.raises(DataError, match=f"1 Parquet shards under {tmp_path} hold no rows"):
        build_manifest(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_a_manifest_survives_being_written_and_read(tmp_path: Path, kind: str) -> None:
    files = (
        {"x/é.jpg": b"12", "y/b.jpg": b"3"}
        if kind == "images"
        else {"a.parquet": parquet({"image": [b"1"] * 5})}
    )
    write_all(tmp_path, files)
    config = DataConfig(path=str(tmp_path), label_from_parent=kind == "images")
    manifest = build_manifest(config)
    assert manifest.kind == kind
    copy = Manifest.from_bytes(manifest.to_bytes(), config)
    assert copy == manifest
    assert copy.path == str(tmp_path)


def test_a_kept_manifest_is_refused_for_other_data(tmp_path: Path) -> None:
    write_all(tmp_path, {"data/x/a.jpg": b"1", "other/a.jpg": b"1"})
    config = DataConfig(path=f"{tmp_path}/data")
    run = Directory(str(tmp_path / "run"))
    load_or_build(config, run)
    run.write("config.yaml", b"")  # the run has begun
    load_or_build(DataConfig(path=f"{tmp_path}/data/", fetch_concurrency=64), run)  # the same data
    with pytest.raises(ConfigError, match=r"data.path='.*/other', but the manifest of this run .*/data'"):
        load_or_build(DataConfig(path=f"{tmp_path}/other"), run)
    with pytest.raises(ConfigError, match=r"data.label_from_parent=True"):
        load_or_build(DataConfig(path=f"{tmp_path}/data", label_from_parent=True), run)


def test_a_damaged_manifest_says_how_to_make_another(tmp_path: Path) -> None:
    write_all(tmp_path, {"data/a.jpg": b"1"})
    config = DataConfig(path=f"{tmp_path}/data")
    good = build_manifest(config).to_bytes()
    for data in (b"", good[:-20], parquet({"key": ["a"]})):
        with pytest.raises(DataError, match=r"the manifest is damaged .*; delete it to list"):
            Manifest.from_bytes(data, config)


@pytest.mark.s3
def test_all_pages_of_a_prefix_are_listed_once_and_sorted(
    proxy: FaultProxy, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    names = [f"train/{c}{number}.jpg" for number in range(340) for c in ("a/", "a-", "a.")]
    random.Random(0).shuffle(names)
    others = {"train2/x.jpg": b"1", "train.jpg": b"1", "train/notes.txt": b"1"}
    put_all(s3, bucket, dict.fromkeys(names, b"1") | others)
    proxy.fail("slow_down", pattern="list-type=2.*continuation-token")
    config = DataConfig(path=f"s3://{bucket}/train")
    run = Directory(str(tmp_path))
    manifest = load_or_build(config, run)
    assert keys_of(manifest) == sorted(names, key=str.encode)
    assert manifest.num_ignored == 1
    assert manifest.uri("train/a-1.jpg") == f"s3://{bucket}/train/a-1.jpg"
    assert proxy.count("list-type=2") == 3  # two pages, the second of them twice
    assert load_or_build(config, run) == manifest
    assert proxy.count("list-type=2") == 3


@pytest.mark.s3
def test_a_manifest_in_a_bucket_is_reused(proxy: FaultProxy, s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"data/cat/a.jpg": b"12"})
    config = DataConfig(path=f"s3://{bucket}/data/", label_from_parent=True)
    run = Directory(f"s3://{bucket}/runs/one")
    manifest = load_or_build(config, run)
    values = ("data/cat/a.jpg", 2, "c20ad4d76fe97759aa27a0c99bff6710", None, "cat")
    assert [tuple(row.values()) for row in manifest.table.to_pylist()] == [values]
    assert load_or_build(config, run) == manifest
    assert proxy.count("list-type=2.*prefix=data") == 1
    assert proxy.count("list-type=2") == 2  # that of parts of an interrupted listing, too


@pytest.mark.s3
def test_odd_keys_are_listed_as_they_are(s3: S3Server, bucket: str) -> None:
    odd = ["sp ace.jpg", "trail.jpg ", "%41.jpg", "a+b&c=.jpg", "q?#.jpg", "été.jpg", "e\u0301te\u0301.jpg"]
    odd += [
        "😀.jpg",
        "\u202ertl.jpg",
        "line\nfeed.jpg",
        "-dash.jpg",
        "k=v/x.jpg",
        "conflict",
        "conflict/x.jpg",
    ]
    put_all(s3, bucket, dict.fromkeys(odd, b"\xff\xd8\xff") | {"marker/": b"", ".DS_Store": b""})
    manifest = build_manifest(DataConfig(path=f"s3://{bucket}"))
    assert keys_of(manifest) == sorted(odd, key=str.encode)
    assert manifest.num_ignored == 2


@pytest.mark.s3
@needs_hostile
def test_a_hostile_bucket_gives_exactly_the_keys_that_look_like_images(s3: S3Server, bucket: str) -> None:
    # SeaweedFS refuses or renames these three keys, and shards are no images.
    refused = {"/leading-slash.jpg", "dots/../up.jpg", "names/back\\slash.jpg"}
    entries = [e for e in hostile_entries() if e.key not in refused and not e.key.endswith(".parquet")]
    bodies = {entry.key: entry.data for entry in entries}
    put_all(s3, bucket, bodies)
    manifest = build_manifest(DataConfig(path=f"s3://{bucket}"))
    unwanted = [entry for entry in entries if entry.expect.startswith("ignore (not an image key)")]
    ignored = {entry.key for entry in unwanted if not entry.key.endswith(".tif")}  # those may be decoded
    assert set(keys_of(manifest)) == set(bodies) - ignored
    assert manifest.num_ignored == len(ignored)


@pytest.mark.s3
def test_an_s3_path_may_name_one_object(s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"shards/a.parquet": parquet({"image": [b"1"] * 3}), "shards/b.parquet": b"bad"})
    manifest = build_manifest(DataConfig(path=f"s3://{bucket}/shards/a.parquet"))
    assert keys_of(manifest) == ["shards/a.parquet", "shards/a.parquet"]
    assert build_manifest(DataConfig(path=f"s3://{bucket}/shards")).damaged == ("shards/b.parquet",)
    with pytest.raises(DataError, match=rf"s3://{bucket}/shards/b\.parquet is not a readable Parquet file"):
        build_manifest(DataConfig(path=f"s3://{bucket}/shards/b.parquet"))


@pytest.mark.s3
@needs_hostile
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("truncated", DataError, "not a readable Parquet file"),
        ("bad-magic", DataError, "not a readable Parquet file"),
        ("empty", DataError, "not a readable Parquet file"),
        ("wrong-column", ConfigError, "has no column 'image'; it has"),
    ],
)
def test_a_hostile_shard_in_a_bucket_is_named(
    s3: S3Server, bucket: str, name: str, error: type[Exception], words: str
) -> None:
    data = next(entry.data for entry in hostile_entries() if entry.key == f"parquet/{name}.parquet")
    put_all(s3, bucket, {f"p/{name}.parquet": data})
    with pytest.raises(error, match=rf"s3://{bucket}/p/{name}\.parquet.*{words}"):
        build_manifest(DataConfig(path=f"s3://{bucket}/p", image_column="image"))


@pytest.mark.s3
def test_an_empty_prefix_and_a_missing_bucket_are_data_errors(s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {"a/x.txt": b"1"})
    with pytest.raises(DataError, match=f"no images under s3://{bucket}/a; ignored: 1 .txt; check data.path"):
        build_manifest(DataConfig(path=f"s3://{bucket}/a"))
    with pytest.raises(
        DataError, match=f"no images under s3://{bucket}/b; nothing is there; check data.path"
    ):
        build_manifest(DataConfig(path=f"s3://{bucket}/b"))
    with pytest.raises(DataError, match=r"s3://no-such-bucket/train.*NoSuchBucket"):
        build_manifest(DataConfig(path="s3://no-such-bucket/train"))


@pytest.mark.s3
def test_a_listing_that_is_forbidden_fails_after_one_request(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("forbid", times=99)
    with pytest.raises(DataError, match=rf"s3://{bucket}/train/: AccessDenied.*s3:ListBucket"):
        build_manifest(DataConfig(path=f"s3://{bucket}/train"))
    assert len(proxy.requests) == 1
