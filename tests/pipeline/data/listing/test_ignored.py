"""What is left out, counted by kind: the line that all commands print, in the manifest and in the error."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT
from samples import parquet, put_all, write_all
from tars import tar_of

from dinoray.jobs.runs.data_lines import data_lines
from dinoray.models.errors import DataError
from dinoray.pipeline.data.listing import names
from dinoray.pipeline.data.listing.ignored import OTHER_KINDS, Ignored, count_keys, ignored_line
from dinoray.pipeline.data.listing.names import kinds_of, role_of
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.reading.source import Source

JPEG = b"\xff\xd8\xff\xe0"


def keys(*some: str) -> pa.ChunkedArray:
    return pa.chunked_array([some], pa.large_string())


@pytest.mark.parametrize(
    ("key", "role"),
    [
        *((f"a/x{suffix}", "image") for suffix in (".ppm", ".PGM", ".pnm", ".pbm", ".apng", ".jif", ".mpo")),
        *(
            (f"a/x{style}", "image")
            for style in (".jpg?w=640&h=4", ".jpg!large", ".png@2x", ".JPG.", ".jpg:orig")
        ),
        *(
            (f"a/x{more}", "image")
            for more in (".jpg.jpg", ".webp#a", ".jpeg%3Fw=1", ".jpg;v=2", ".v2.jpg?x.html")
        ),
        *((name, "other") for name in ("md5sums", "MD5SUM", "SHA256SUMS", "VERSION", "CHECKSUMS", "labels")),
        *((name, "other") for name in ("cat_$folder$", "a.jpg_$folder$", "a.jpg~", "a.jpg:Zone.Identifier")),
        *(
            (f"a{suffix}", "other")
            for suffix in (".jpg.bak", ".jpg_original", ".jpg.part", ".NEF", ".svs", ".jſon.txt")
        ),
        *((f"a{suffix}", "parquet") for suffix in (".pq", ".parq", ".Parquet", ".parquet.gz")),
        *((f"a{suffix}", "unknown") for suffix in (".image", ".jpg.1", ".jpg_large", ".jſon", "")),
    ],
)
def test_a_name_tells_what_others_call_their_files(key: str, role: str) -> None:
    assert role_of(key) == role


def test_heic_is_an_image_where_it_can_be_read() -> None:
    assert role_of("IMG_0001.HEIC") == ("image" if names.HEIF_IS_READ else "other")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("a/B.TXT", ".txt"),
        ("x.tar.gz", ".tar.gz"),
        ("shard.00000.mds.zstd", ".mds.zstd"),
        ("train.tfrecord-00000-of-00064", ".tfrecord"),
        ("x.jpg.17", ".jpg.17"),
        ("x.0001", names.NUMBERED),
        (".DS_Store", ".ds_store"),
        ("a.b/README", names.BARE),
        ("Mr. Smith's photo", names.BARE),
        ("photos/", names.FOLDER_MARKER),
        ("cat_$folder$", names.FOLDER_MARKER),
    ],
)
def test_objects_are_counted_by_their_suffix(key: str, kind: str) -> None:
    assert kinds_of(keys(key)).to_pylist() == [kind]


def test_the_line_has_the_most_frequent_suffixes_and_a_bounded_length() -> None:
    assert ignored_line([]) is None
    some = [Ignored(".a", 3), Ignored("run", 2, ("r/1", "r/2")), Ignored("not UTF-8", 1), Ignored(".b", 12)]
    assert ignored_line(some) == (
        "ignored: 12 .b, 3 .a, 2 run directories (r/1, r/2), 1 name that is not UTF-8; rename them: convmv -r -f "
        "latin1 -t utf8 --notest FOLDER"
    )
    many = [Ignored(f".x{number}", number) for number in range(1, 10)]
    line = "ignored: 9 .x9, 8 .x8, 7 .x7, 6 .x6, 5 .x5, 4 .x4, 6 of other kinds"
    assert ignored_line(many) == line
    assert ignored_line([*many, Ignored(OTHER_KINDS, 10)]) == line.replace("6 of", "16 of")


@given(st.lists(st.text("abz./0 ", min_size=1, max_size=5), max_size=40))
def test_every_object_is_counted_once(some: list[str]) -> None:
    assert sum(one.number for one in count_keys(keys(*some))) == len(some)


def test_a_million_suffixes_are_counted_in_few_kinds() -> None:
    found = count_keys(keys(*(f"x.s{number}" for number in range(3000))))
    assert len(found) < 300
    assert sum(one.number for one in found) == 3000


REMEDIES = {
    ".heic": "pip install 'dinoray[heic]'",
    ".tar.gz": "decompress .tar.gz with gunzip",
    ".tgz": "decompress .tgz with gunzip",
    ".zip": "unpack .zip: python -m zipfile -e FILE FOLDER",
    ".rar": "unpack .rar: bsdtar",
    ".mds": "streaming.StreamingDataset(local='FOLDER'",
    ".mdb": "lmdb.open('FOLDER', subdir=",
    ".tfrecord": "TFRecordDataset",
    ".lance": "lance.dataset('FOLDER')",
    ".arrow": "glob('FOLDER/**/*.arrow'",
    ".cr2": "convert .cr2 to .tif or .jpg",
    ".jxl": "convert .jxl to .tif or .jpg",
}


@pytest.mark.parametrize("suffix", REMEDIES)
def test_what_can_be_used_in_another_way_is_named_with_it(suffix: str, tmp_path: Path) -> None:
    if suffix == ".heic" and names.HEIF_IS_READ:
        pytest.skip("HEIC can be read here")
    write_all(tmp_path, {f"{number}{suffix}": b"\x1f\x8b rest" for number in range(24)} | {"notes.txt": b"x"})
    with pytest.raises(DataError) as caught:
        build_manifest(DataConfig(path=str(tmp_path)))
    assert str(caught.value).startswith(f"no images under {tmp_path}; ignored: 24 {suffix}, 1 .txt; ")
    assert REMEDIES[suffix] in str(caught.value)
    assert "{{" not in str(caught.value)
    _, quote, code = str(caught.value).partition('python -c "')
    if quote:
        compile(code[:-1], "command", "exec")
    line = str(caught.value).partition("; ")[2]

    write_all(tmp_path, {"a.jpg": JPEG})
    config = DataConfig(path=str(tmp_path))
    manifest = Manifest.from_bytes(
        build_manifest(config).to_bytes(), config
    )  # as a run that resumes reads it
    assert data_lines(Source(config, manifest))[1:] == [line]


def test_a_manifest_of_an_earlier_version_is_read_with_its_counts(tmp_path: Path) -> None:
    table = pq.read_table(ROOT / "tests/end_to_end/earlier_run/manifest.parquet")
    about = json.loads(table.schema.metadata[b"dinoray.manifest"])
    assert "include" not in about["listed_as"]
    about |= {"num_ignored": 3, "passed_over": ["2 run directories passed over: runs/a, runs/b"]}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({b"dinoray.manifest": json.dumps(about)}), sink)
    config = DataConfig.model_validate(about["listed_as"])
    manifest = Manifest.from_bytes(sink.getvalue().to_pybytes(), config)
    assert ignored_line(manifest.ignored) == (
        "ignored: 2 run directories passed over: runs/a, runs/b, 3 of other kinds"
    )
    for change in (
        {"include": ("a",)},
        {"label_level": 0, "label_from_parent": True},
        {"image_list": "/a.csv"},
    ):
        changed = config.model_copy(update=change)
        assert [name for name, *_ in manifest.misfits(changed, auto_fits=True)] == [*change][:1]


def test_images_beside_everything_else_that_a_bucket_holds(tmp_path: Path) -> None:
    files = {f"{number:032x}": JPEG for number in range(20)} | {
        "VERSION": b"1",
        "md5sums": b"x",
        "_SUCCESS": b"",
    }
    files |= {"cat_$folder$": b"", "meta.parquet": parquet({"url": ["x"]}), "a.json": b"{}"}
    write_all(tmp_path, files)
    config = DataConfig(path=str(tmp_path))
    images = Source(config, build_manifest(config))
    assert images.num_images == 20
    line = "ignored: 1 .json, 1 .parquet, 3 files without a suffix, 1 folder marker"
    assert data_lines(images)[1:] == [line]


def test_tar_files_that_lie_beside_images_are_read_as_the_line_says(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG, "c.tar": tar_of({"0.jpg": JPEG})})
    config = DataConfig(path=str(tmp_path))
    line = "ignored: 1 .tar; data.include='*.tar' reads .tar"
    assert data_lines(Source(config, build_manifest(config)))[1:] == [line]
    assert build_manifest(config.model_copy(update={"include": ("*.tar",)})).kind == "tar"


HIDDEN = (
    ".ipynb_checkpoints/a-checkpoint.jpg",
    ".git/annex/a.jpg",
    "@eaDir/a.jpg/THUMB_M.jpg",
    "$RECYCLE.BIN/b.jpg",
)


@pytest.mark.parametrize("store", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_copies_in_hidden_folders_are_no_images_unless_they_are_asked_for(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = ".hidden data"  # in the path itself it hides nothing
    files = {f"{folder}/{key}": JPEG for key in (*HIDDEN, "a.jpg", "b/.c.jpg", "c/.d/a.jpg")}
    if store == "s3":
        s3, bucket = request.getfixturevalue("s3"), request.getfixturevalue("bucket")
        put_all(s3, bucket, files)
    else:
        write_all(tmp_path, files)
    config = DataConfig(path=f"s3://{bucket}/{folder}" if store == "s3" else f"{tmp_path}/{folder}")
    assert data_lines(Source(config, build_manifest(config)))[1:] == ["ignored: 5 files in hidden folders"]
    chosen = config.model_copy(update={"include": (".git/**",)})
    assert build_manifest(chosen).num_images == 1
    with pytest.raises(
        DataError, match=r"1 file in a hidden folder; point data.path at the hidden folder, or"
    ):
        build_manifest(DataConfig(path=f"{config.path}/c"))
