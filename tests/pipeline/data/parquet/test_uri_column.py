"""Parquet that names images by their addresses: each is an object of its own, here or in another bucket."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from image_files import jpeg, scene
from samples import parquet, put_all, write_all
from servers import S3Server
from sources import fetch_all, source_of

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.parquet.image_addresses import image_address
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.evaluation.labels import held_out

IMAGE = jpeg(scene(16, 16))
NAMES = [f"img/{label}/{number}.jpg" for label in "ab" for number in range(4)]
LABELS = ["x", "y"] * 4
PHOTOS = {name: IMAGE + name.encode() for name in NAMES}


def contents_of(source: Source) -> dict[str, bytes | None]:
    return {fetched.key: fetched.data for fetched in fetch_all(source)}


def notes_of(source: Source) -> str:
    return "; ".join(source.manifest.notes)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a/1.jpg", "/set/a/1.jpg"),
        ("./a/../1.jpg", "/set/1.jpg"),
        ("../1.jpg", "/1.jpg"),
        ("/x/1.jpg", "/x/1.jpg"),
        ("file:///x/1.jpg", "/x/1.jpg"),
        ("s3://b/1 ä%20.jpg", "s3://b/1 ä%20.jpg"),
        ("s3a://b/1.jpg", "s3://b/1.jpg"),
        ("http://x/1.jpg", "http://x/1.jpg"),
        ("a:b/1.jpg", "/set/a:b/1.jpg"),
        ("", None),
        (None, None),
    ],
)
def test_an_address_is_made_whole_by_the_folder_of_its_shard(text: str | None, address: str | None) -> None:
    assert image_address(text, "/set") == address


def test_relative_addresses_in_a_bucket_stay_in_it() -> None:
    assert image_address("../i/1.jpg", "s3://b/set/t") == "s3://b/set/i/1.jpg"
    assert image_address("i//1.jpg", "s3://b/set") == "s3://b/set/i//1.jpg"


def test_a_column_of_paths_lists_the_images_that_it_names(tmp_path: Path) -> None:
    columns = {"file_name": [*NAMES, None, NAMES[0]], "label": [*LABELS, "x", "x"]}
    write_all(tmp_path, {**PHOTOS, "unnamed.jpg": IMAGE, "metadata.parquet": parquet(columns)})
    source = source_of(str(tmp_path), uri_column="file_name")
    assert (source.manifest.kind, contents_of(source)) == ("images", PHOTOS)
    assert source.manifest.num_ignored == 1
    assert [fetched.label for fetched in fetch_all(source)] == LABELS
    assert source.config.label_column == "label"
    assert "without an address that can be read: 1; rows that name an image again: 1" in notes_of(source)
    assert source.manifest.table["size"].null_count == 0  # the listing has them
    voters = held_out(source, max_train_images=100, max_val_images=100)
    assert voters is not None
    assert [side.num_images for side in voters] == [6, 2]
    folders = source_of(str(tmp_path), uri_column="file_name", label_from_parent=True, label_column=None)
    assert [fetched.label for fetched in fetch_all(folders)] == ["a"] * 4 + ["b"] * 4
    again = Manifest.from_bytes(source.manifest.to_bytes(), DataConfig(path=str(tmp_path)))
    assert (again, again.settle(DataConfig(path=str(tmp_path))).uri_column) == (source.manifest, "file_name")


def test_images_elsewhere_are_read_and_missing_ones_counted(tmp_path: Path) -> None:
    addresses = [f"{tmp_path}/far/{name}" for name in NAMES] + [f"{tmp_path}/far/gone.jpg"]
    write_all(tmp_path, {f"far/{name}": data for name, data in PHOTOS.items()})
    write_all(tmp_path, {"set/x.parquet": parquet({"url": addresses}, row_group_size=4)})
    source = source_of(str(tmp_path / "set"), uri_column="url", fetch_buffer_bytes=1)
    statuses = [fetched.status for fetched in fetch_all(source)]
    assert (statuses.count(Status.OK), statuses.count(Status.MISSING)) == (8, 1)
    assert {key.rpartition("far/")[2] for key in contents_of(source)} == {*NAMES, "gone.jpg"}
    assert source.manifest.object_sizes.tolist() == [1 << 20] * 9


@pytest.mark.parametrize("kind", [{"bytes": pa.binary(), "path": pa.string()}, {"path": pa.string()}])
def test_hugging_face_images_without_bytes_are_read_by_their_paths(
    tmp_path: Path, kind: dict[str, pa.DataType]
) -> None:
    cells: list[Any] = [{"path": f"../{name}"} for name in NAMES]
    shard = parquet({"image": pa.array(cells, pa.struct(kind)), "label": LABELS}, row_group_size=3)
    write_all(tmp_path, {**PHOTOS, "data/train-00000-of-00001.parquet": shard})
    source = source_of(str(tmp_path / "data"))
    assert source.config.uri_column == "image.path"
    assert sorted(map(str, contents_of(source).values())) == sorted(map(str, PHOTOS.values()))
    assert [fetched.label for fetched in fetch_all(source)] == LABELS


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "http": (
        {"url": ["http://x/1.jpg"]},
        {},
        ConfigError,
        "'http://x/1.jpg' or the like in most rows; it must hold",
    ),
    "keys of an account": (
        {"url": ["s3://AK:SK@b/1.jpg"]},
        {},
        ConfigError,
        "must hold addresses s3://bucket/key",
    ),
    "nothing": ({"url": [None, ""]}, {}, ConfigError, "holds no address"),
    "gone": (
        {"url": ["1.jpg", "2.jpg"]},
        {},
        DataError,
        "names images that are not there (PATH/1.jpg and all others",
    ),
    "no such column": ({"uri": ["1.jpg"]}, {}, ConfigError, "no column 'url'; it has 'uri'"),
    "lists": ({"url": [["1.jpg"]]}, {}, ConfigError, "'url' of PATH/x.parquet holds list<"),
    "keys too": (
        {"url": ["1.jpg"], "id": [1]},
        {"key_column": "id"},
        ConfigError,
        "leave data.key_column out",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_names_no_images_is_named_with_a_remedy(tmp_path: Path, mistake: str) -> None:
    columns, options, kind, words = WRONG[mistake]
    write_all(tmp_path, {"x.parquet": parquet(columns)})
    with pytest.raises(kind) as error:
        source_of(str(tmp_path), uri_column="url", **options)
    assert words.replace("PATH", str(tmp_path)) in str(error.value)


def test_addresses_are_for_parquet(tmp_path: Path) -> None:
    write_all(tmp_path, PHOTOS)
    with pytest.raises(ConfigError, match=r"data\.uri_column='url' is for Parquet, .* unset it"):
        source_of(str(tmp_path), uri_column="url")


@pytest.mark.s3
def test_images_in_other_buckets_are_read_and_lost_buckets_left_out(
    s3: S3Server, bucket: str, next_bucket: Any
) -> None:
    other = next_bucket()
    put_all(s3, bucket, PHOTOS)
    put_all(s3, other, {"far/1 ä.jpg": IMAGE})
    addresses = [
        *NAMES,
        f"s3://{other}/far/1 ä.jpg",
        f"s3a://{other}/gone.jpg",
        "s3://no-such-bucket-here/x.jpg",
    ]
    put_all(s3, bucket, {"x.parquet": parquet({"url": addresses})})
    source = source_of(f"s3://{bucket}", uri_column="url")
    found = {fetched.key: fetched for fetched in fetch_all(source)}
    assert found.keys() == {*NAMES, f"s3://{other}/far/1 ä.jpg", f"s3://{other}/gone.jpg"}
    assert found[f"s3://{other}/far/1 ä.jpg"].data == IMAGE
    assert found[f"s3://{other}/gone.jpg"].status == Status.MISSING
    assert {key: one.data for key, one in found.items() if key in PHOTOS} == PHOTOS
    assert "in buckets that cannot be read (no-such-bucket-here): 1" in notes_of(source)
