"""Objects whose names say nothing are taken for what a few of them begin as: the images of the real programs."""

import io
from pathlib import Path

import pytest
from faults import FaultProxy
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from samples import parquet, put_all, write_all
from servers import S3Server
from tars import tar_of

from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.decoding.heif import HEIF_IS_READ
from dinoray.pipeline.data.decoding.signatures import begins_as_an_image, content_of
from dinoray.pipeline.data.listing import sniffing
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (200, 10, 10)).save(file, kind)
    return file.getvalue()


KINDS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in Image.SAVE or Image.init() is None])
def test_the_first_bytes_tell_an_image(kind: str) -> None:
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {kind}")
    assert content_of(image(kind)[:32]) == "image"


def test_heic_is_told_and_decoded_where_it_can_be() -> None:
    pytest.importorskip("pillow_heif")
    data = image("HEIF")  # written by the package, which decode.py has loaded
    assert HEIF_IS_READ
    assert content_of(data[:32]) == "image"
    pixels = decode(data, max_pixels=1000)
    assert pixels.shape == (12, 16, 3)
    assert abs(int(pixels[5, 5, 0]) - 200) < 9


def test_a_column_of_heic_is_one_of_images_wherever_it_can_be_read() -> None:
    assert begins_as_an_image(b"\0\0\0\x18ftypheic")
    assert not begins_as_an_image(b"\0\0\0\x18ftypmp42")


@given(
    st.binary(max_size=40)
    | st.sampled_from([b"", b"BM", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x18ftypmp42", b"P12 ", b"PARTY"])
)
def test_what_is_taken_for_an_image_or_parquet_begins_as_one(head: bytes) -> None:
    known = (
        b"\xff\xd8\xff",
        b"\x89PNG",
        b"GIF8",
        b"RIFF",
        b"BM",
        b"II",
        b"MM",
        b"\xff\x4f",
        b"\0\0\0",
        b"P",
        b"PAR1",
        b"\x93NUMPY",
    )
    assert content_of(head) is None or head.startswith(known) or head[4:8] == b"ftyp"
    assert (
        content_of(b"RIFF\0\0\0\0WAVEfmt ")
        is content_of(b"\0\0\0\x18ftypmp42")
        is content_of(b"BMW, Opel")
        is None
    )


def keys_of(manifest: Manifest) -> list[str]:
    keys: list[str] = manifest.table["key"].to_pylist()
    return keys


JPEG, SHARD = image("JPEG"), parquet({"image": [b"x"] * 2})
FILES = {
    "a.image": JPEG,
    "b.image": JPEG,
    "c.image": b"x",
    "hash/0": JPEG,
    "a.jpg.1": JPEG,
    "x.dat": b"x",
    "y.dat": b"",
    "clip.riff": b"RIFF\0\0\0\0WAVE",
}


def test_unknown_suffixes_are_what_most_of_a_sample_are(tmp_path: Path) -> None:
    write_all(tmp_path, FILES)
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert keys_of(manifest) == ["a.image", "a.jpg.1", "b.image", "hash/0"]
    assert "images by their content: 2 .image, 1 without a suffix, 1 .jpg.1" in manifest.notes
    assert [(one.kind, one.number) for one in manifest.ignored] == [(".dat", 2), (".image", 1), (".riff", 1)]


def test_most_of_many_objects_of_a_suffix_decide_for_all(tmp_path: Path) -> None:
    write_all(tmp_path, {f"{n}.image": b"x" if n % 5 == 0 else JPEG for n in range(50)})
    write_all(tmp_path, {f"{n}": b"x" for n in range(50)})
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert manifest.num_images == 50  # ten of them are bad images, which are named
    assert [(one.kind, one.number) for one in manifest.ignored] == [("", 50)]


def test_parquet_without_its_suffix_is_known_by_its_content(tmp_path: Path) -> None:
    write_all(
        tmp_path, {"x.parquet.gz": SHARD, "20260101_000000_00001_abcde": SHARD, "z.parquet": SHARD, "b": JPEG}
    )
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert (manifest.kind, manifest.num_images, manifest.num_ignored) == ("parquet", 6, 1)


@pytest.mark.parametrize("name", ["shard-000", "a.wds"])
def test_tar_files_without_their_suffix_are_known_by_their_content(name: str, tmp_path: Path) -> None:
    write_all(tmp_path, {name: tar_of({"0.jpg": JPEG, "1.jpg": JPEG}), "VERSION": b"1"})
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert (manifest.kind, manifest.num_images, manifest.num_ignored) == ("tar", 2, 1)
    write_all(tmp_path, {f"{number}.jpg": JPEG for number in range(3)})
    manifest = build_manifest(DataConfig(path=str(tmp_path)))  # it is an archive of them
    assert (manifest.kind, manifest.num_images, manifest.num_ignored) == ("images", 3, 2)


def test_beside_tar_files_nothing_else_is_taken_for_what_it_begins_as(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.tar": tar_of({"0.jpg": JPEG}), "b": SHARD, "c": SHARD, "d": JPEG})
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert (manifest.kind, manifest.num_images, manifest.num_ignored) == ("tar", 1, 3)


def test_empty_parquet_beside_images_holds_none(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.jpg": JPEG, "a.parquet": b""})
    manifest = build_manifest(DataConfig(path=str(tmp_path)))
    assert (manifest.kind, manifest.num_images, manifest.num_ignored) == ("images", 1, 1)


def test_the_number_of_looks_does_not_grow_with_the_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path, {f"{number}.k{number % 40}": b"x" for number in range(400)} | {"a.jpg": b"x"})
    looked: list[str] = []
    head = sniffing._head
    monkeypatch.setattr(
        sniffing, "_head", lambda one, *others: looked.append(one["key"]) or head(one, *others)
    )
    assert build_manifest(DataConfig(path=str(tmp_path))).num_ignored == 400
    assert len(looked) == len(set(looked)) == 9 * 8


@pytest.mark.s3
def test_objects_of_a_bucket_are_looked_into(proxy: FaultProxy, s3: S3Server, bucket: str) -> None:
    put_all(s3, bucket, {f"d/{name}": data for name, data in FILES.items()})
    proxy.fail("forbid", pattern=r"GET.*/d/a\.image", times=99)  # it is taken for what the others are
    manifest = build_manifest(DataConfig(path=f"s3://{bucket}/d"))
    assert keys_of(manifest) == [f"d/{name}" for name in ("a.image", "a.jpg.1", "b.image", "hash/0")]
