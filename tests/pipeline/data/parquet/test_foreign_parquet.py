"""Parquet written by others: whatever its names, types, codecs and neighbours, read as it is or named with a remedy."""

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import jpeg, scene
from paths import SHARED
from pyarrow.parquet import encryption
from samples import parquet, put_all, write_all
from servers import S3Server
from sources import fetch_all, source_of

from dinoray.models.errors import ConfigError, DataError, ResourceError
from dinoray.pipeline.data.parquet.parquet import read_footer, row_groups
from dinoray.pipeline.data.parquet.parquet_faults import CorruptShard, UnsupportedShard
from dinoray.pipeline.data.parquet.parquet_rows import read_row_group
from dinoray.pipeline.data.reading.source import Source, Status

IMAGE = jpeg(scene(16, 16))
CELLS = [IMAGE + bytes([i]) for i in range(6)]
SHARD = parquet({"image": CELLS})
HF_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
CASES = SHARED / "cases"


def cells_of(source: Source) -> list[bytes | None]:
    return sorted((fetched.data for fetched in fetch_all(source)), key=lambda data: data or b"")


def labels_of(source: Source) -> list[str | None]:
    return [fetched.label for fetched in fetch_all(source)]


def notes_of(source: Source) -> str:
    return "; ".join(source.manifest.notes)


# names of files

NAMES = ["a/0.pq", "b/1.parq", "c/2.parquet.gz", "d/3.snappy.parquet", "e/20260101_000000_00001_abcde_0f3c"]


def test_parquet_is_known_by_its_content(tmp_path: Path) -> None:
    write_all(tmp_path, dict.fromkeys(NAMES, SHARD))
    write_all(tmp_path, {"_SUCCESS": b"", "_metadata": SHARD, "_common_metadata": SHARD, "e/.x.crc": b"crc"})
    source = source_of(str(tmp_path))
    assert (source.manifest.kind, source.num_images, source.manifest.num_ignored) == ("parquet", 30, 4)
    assert cells_of(source_of(str(tmp_path / "e"))) == CELLS


@pytest.mark.s3
def test_parquet_in_a_bucket_is_known_by_its_content(s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {f"table/{number:02}": SHARD for number in range(9)})
    put_all(
        s3,
        bucket,
        {"dots/image.bytes": parquet({"image.bytes": CELLS}), "photos/a": IMAGE, "photos/b": IMAGE},
    )
    source = source_of(f"s3://{bucket}/table")
    assert (source.manifest.kind, cells_of(source)) == ("parquet", sorted(CELLS * 9))
    assert cells_of(source_of(f"s3://{bucket}/dots")) == CELLS  # an unknown suffix, alone
    assert source_of(f"s3://{bucket}/photos").manifest.kind == "images"


def test_images_without_a_suffix_stay_images(tmp_path: Path) -> None:
    write_all(tmp_path, {f"{number}": IMAGE for number in range(7)} | {"7": SHARD})
    source = source_of(str(tmp_path))
    assert (source.manifest.kind, source.num_images) == ("images", 7)
    assert [(one.kind, one.number) for one in source.manifest.ignored] == [("", 1)]


def test_logs_of_tables_are_no_shards_and_their_deletes_are_mentioned(tmp_path: Path) -> None:
    log = parquet({"add": ["x"]})
    write_all(
        tmp_path, {"a.parquet": SHARD, "_delta_log/1.checkpoint.parquet": log, "_delta_log/1.json": b"{}"}
    )
    write_all(tmp_path, {"_change_data/c.parquet": SHARD, "_temporary/0/t.parquet": SHARD})
    source = source_of(str(tmp_path))
    assert cells_of(source) == CELLS
    assert "the log of the Delta table is not read: rows that it has deleted" in notes_of(source)
    assert source.manifest.num_ignored == 4


# columns


def test_row_groups_of_a_name_with_a_dot_count_their_bytes(tmp_path: Path) -> None:
    cells = [random.Random(i).randbytes(2000) for i in range(24)]
    for name in ("image", "image.bytes"):
        write_all(
            tmp_path / name, {"x.parquet": parquet({name: cells}, row_group_size=4, write_statistics=False)}
        )
    plain, dotted = (source_of(str(tmp_path / name)) for name in ("image", "image.bytes"))
    assert dotted.config.image_column == "image.bytes"
    assert dotted.manifest.group_bytes.tolist() == plain.manifest.group_bytes.tolist()
    assert all(8000 <= size < 9000 for size in dotted.manifest.group_bytes)
    window = source_of(str(tmp_path / "image.bytes"), row_group_cache_bytes=20_000).order(0).window(0)
    assert window is not None
    assert len(window.groups) == 2


def test_columns_that_are_there_twice_are_of_no_account_elsewhere(tmp_path: Path) -> None:
    names = ["image", "label", "label", "class"]
    table = pa.table(
        [pa.array(CELLS), *[pa.array(["x", "y"] * 3)] * 2, pa.array(["a", "b"] * 3)], names=names
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert labels_of(source_of(str(tmp_path))) == ["a", "b"] * 3
    with pytest.raises(
        ConfigError, match="2 columns 'label', and which is meant cannot be told; choose another"
    ):
        source_of(str(tmp_path), label_column="label")


@pytest.mark.parametrize("kind", [pa.uuid(), pa.binary(16)])
def test_binary_keys_are_hexadecimal(tmp_path: Path, kind: pa.DataType) -> None:
    keys = pa.array([bytes(15) + bytes([i]) for i in range(6)], kind)
    write_all(tmp_path, {"x.parquet": parquet({"image": CELLS, "key": keys})})
    fetched = fetch_all(source_of(str(tmp_path), key_column="key"))
    assert [one.key for one in fetched] == [f"{i:032x}" for i in range(6)]


def test_shards_whose_columns_differ_in_type_are_read_together(tmp_path: Path) -> None:
    labels = pa.array(["a", "b"] * 3)
    columns: list[tuple[Any, Any]] = [
        (pa.array(CELLS), labels),
        (pa.array(CELLS, pa.large_binary()), labels.dictionary_encode()),
        (pa.array(CELLS).dictionary_encode(), labels.cast(pa.large_string())),
        (pa.array([{"bytes": cell, "path": ""} for cell in CELLS]), labels.cast(pa.binary())),
    ]
    files = {f"{n}.parquet": parquet({"image": i, "label": label}) for n, (i, label) in enumerate(columns)}
    write_all(tmp_path, files)
    source = source_of(str(tmp_path))
    assert labels_of(source) == ["a", "b"] * 12
    assert cells_of(source) == sorted(CELLS * 4)


def test_shards_without_the_columns_of_most_are_left_out_and_named(tmp_path: Path) -> None:
    labelled = parquet({"image": CELLS, "label": ["a", "b"] * 3})
    write_all(tmp_path, {"b.parquet": labelled, "c.parquet": labelled, "d.parquet": labelled})
    write_all(tmp_path, {"a.parquet": parquet({"url": ["x"]}), "e.parquet": SHARD})
    source = source_of(str(tmp_path))
    assert (source.num_images, labels_of(source)[-6:]) == (24, [None] * 6)  # a label that was only detected
    assert "1 Parquet file with other columns left out: a.parquet (" in notes_of(source)
    named = source_of(str(tmp_path), label_column="label")
    assert named.num_images == 18
    assert "2 Parquet files with other columns left out: a.parquet, e.parquet (" in notes_of(named)
    with pytest.raises(ConfigError, match="no column 'nothing'"):
        source_of(str(tmp_path), label_column="nothing")


def test_labels_in_the_names_of_folders_are_a_column(tmp_path: Path) -> None:
    folders = ["kind=a%20cat", "kind=dog", "kind=__HIVE_DEFAULT_PARTITION__"]
    write_all(tmp_path, {f"{folder}/part-0.parquet": SHARD for folder in folders} | {"_SUCCESS": b""})
    source = source_of(str(tmp_path), label_column="kind", label_from_parent=False)
    assert sorted(map(str, labels_of(source))) == ["None"] * 6 + ["a cat"] * 6 + ["dog"] * 6
    assert source.manifest.table["num_unlabelled"].to_pylist().count(0) == 6


def test_classes_that_hugging_face_numbers_have_their_names(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "y": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    images = pa.array(
        [{"bytes": cell, "path": None} for cell in CELLS], pa.struct({"bytes": "binary", "path": "string"})
    )
    table = pa.table({"image": images, "y": [0, 1, -1, 0, 1, 0]}).replace_schema_metadata(note)
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=3)
    source = source_of(str(tmp_path))
    assert labels_of(source) == ["cat", "dog", None, "cat", "dog", "cat"] * 2
    assert source.manifest.table["num_unlabelled"].to_pylist() == [None, 0] * 2


@pytest.mark.parametrize("codec", ["snappy", "gzip", "brotli", "lz4", "zstd", "none"])
def test_each_codec_of_pyarrow_is_read(tmp_path: Path, codec: str) -> None:
    write_all(tmp_path, {"x.parquet": parquet({"image": CELLS}, compression=codec, data_page_version="2.0")})
    assert cells_of(source_of(str(tmp_path))) == CELLS


def test_empty_files_and_row_groups_are_passed_over(tmp_path: Path) -> None:
    sink, schema = io.BytesIO(), pa.schema({"image": pa.binary()})
    with pq.ParquetWriter(sink, schema) as writer:
        for cells in ([], CELLS[:3], [], CELLS[3:]):
            writer.write_table(pa.table({"image": pa.array(cells, pa.binary())}, schema=schema))
    write_all(
        tmp_path, {"b.parquet": sink.getvalue(), "a.parquet": parquet({"image": pa.array([], pa.binary())})}
    )
    assert cells_of(source_of(str(tmp_path))) == CELLS


def test_metadata_beside_images_is_no_data_set_of_its_own(tmp_path: Path) -> None:
    tables = {
        "0.parquet": parquet({"url": ["x"]}),
        "1.parquet": parquet({"hash": [b"\0" * 32], "thumb": [b"\1"]}),
    }
    write_all(tmp_path, {f"0/{n}.jpg": IMAGE for n in range(4)} | tables)
    source = source_of(str(tmp_path))
    assert (source.manifest.kind, source.num_images, source.manifest.num_ignored) == ("images", 4, 2)
    write_all(tmp_path, {"2.parquet": parquet({"jpeg_data": CELLS})})
    with pytest.raises(ConfigError, match="4 images and 3 Parquet shards"):
        source_of(str(tmp_path))


# files that cannot be read


class _Keys(encryption.KmsClient):
    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        return key_bytes.hex()

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        return bytes.fromhex(wrapped_key)


def encrypted(*, plaintext_footer: bool) -> bytes:
    factory, connection = encryption.CryptoFactory(lambda _: _Keys()), encryption.KmsConnectionConfig()
    config = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["image"]}, plaintext_footer=plaintext_footer
    )
    properties = factory.file_encryption_properties(connection, config)
    return parquet({"image": CELLS}, encryption_properties=properties)


def with_codec_lzo() -> bytes:
    """A file whose footer names a codec that pyarrow is not built with: LZO in the place of snappy."""
    data = parquet({"image": CELLS}, compression="snappy", use_dictionary=False, row_group_size=9)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    place = data.index(b"image\x15\x02", footer) + len("image\x15")
    return data[:place] + b"\x06" + data[place + 1 :]


BAD = {
    "encrypted": (encrypted(plaintext_footer=False), "is encrypted; decrypt it"),
    "with encrypted columns": (encrypted(plaintext_footer=True), "is encrypted; decrypt it"),
    "gzipped": (gzip.compress(SHARD), "is compressed as a whole by gzip; decompress it"),
    "of LZO": (with_codec_lzo(), "is compressed by LZO, which pyarrow"),
    "damaged": (SHARD[:40], "is not a readable Parquet file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_shard_that_cannot_be_read_is_left_out_and_its_reason_named(tmp_path: Path, kind: str) -> None:
    data, reason = BAD[kind]
    write_all(tmp_path, {"a.parquet": data})
    with pytest.raises(DataError) as error:
        source_of(str(tmp_path))
    assert reason in str(error.value)
    assert ("not a readable Parquet file" in str(error.value)) is (kind == "damaged")
    write_all(tmp_path, {"b.parquet": SHARD, "c.parquet": SHARD})
    source = source_of(str(tmp_path))
    assert (cells_of(source), source.manifest.damaged) == (sorted(CELLS * 2), ("a.parquet",))


def test_damaged_rows_of_the_first_shard_do_not_end_the_listing(tmp_path: Path) -> None:
    columns = {"one": CELLS, "two": CELLS}  # rows are read to choose between these
    data = bytearray(parquet(columns, write_page_checksum=True, compression="none", use_dictionary=False))
    for place in range(4, 400):
        data[place] ^= 0x55
    write_all(
        tmp_path, {"a.parquet": bytes(data), "b.parquet": parquet(columns), "c.parquet": parquet(columns)}
    )
    source = source_of(str(tmp_path))
    assert (source.num_images, source.manifest.damaged) == (12, ("a.parquet",))


FOOTER = len(SHARD) - 8 - int.from_bytes(SHARD[-8:-4], "little")


@settings(max_examples=40)
@given(place=st.integers(0, FOOTER - 1), value=st.integers(0, 255), cut=st.integers(0, len(SHARD)))
def test_damage_of_rows_and_lost_ends_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.parquet"
    data = bytearray(SHARD)
    data[place] = value
    path.write_bytes(bytes(data)[: cut or None])
    try:
        footer = read_footer(str(path), path.stat().st_size)
        for group in row_groups(footer, image_column="image", other_columns=[]):
            read_row_group(
                str(path), path.stat().st_size, group.row_group, image_column="image", other_columns=[]
            )
    except (CorruptShard, ConfigError, ResourceError):
        pass


def test_what_pyarrow_cannot_do_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(tmp_path, {"x.parquet": SHARD})
    source, tries = source_of(str(tmp_path)), []

    def refuse(*_: Any, **__: Any) -> Any:
        tries.append(1)
        raise pa.ArrowNotImplementedError("not yet")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    [fetched] = source.fetch([0])
    assert (fetched.status, len(tries)) == (Status.CORRUPT, 1)
    assert "cannot read (not yet); write it again" in fetched.reason
    assert issubclass(UnsupportedShard, CorruptShard)


# the collection of cases


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared sample data is not here")
@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("binary-view-column/data/view", {}),
        ("binary-view-column/data/dict", {}),
        ("binary-view-column/data/opaque", {}),
        ("column-name-with-a-dot/data", {}),
        ("key-column-uuid/data", {"key_column": "key"}),
        ("hive-partitioned-labels/data", {"label_column": "label", "label_from_parent": False}),
        ("images-beside-parquet-metadata/data", {}),
        *[(f"parquet-by-another-name/data/{name}", {}) for name in "abcd"],
    ],
)
def test_each_case_is_read_whole(folder: str, options: dict[str, Any]) -> None:
    source = source_of(str(CASES / folder), **options)
    assert [fetched.status for fetched in fetch_all(source)] == [Status.OK] * 24
    if "label_column" in options:
        assert np.unique(labels_of(source), return_counts=True)[1].tolist() == [12, 12]
    if "key_column" in options:
        assert [fetched.key for fetched in fetch_all(source)] == [f"{i:032x}" for i in range(24)]
