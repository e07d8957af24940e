"""The index of a tar file: where each image lies, what is left out, and how much is read for it."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import packed_by_tar, tar_of

from dinoray.pipeline.data.tar import tar_index
from dinoray.pipeline.data.tar.tar_file import CompressedTar, HeaderFile, TarFile
from dinoray.pipeline.data.tar.tar_index import TarImages, Wanted, index_tar

SOME = {f"{n}.jpg": bytes([n]) * (700 * n) for n in range(1, 6)}


def indexed(
    data: bytes,
    image: str = "auto",
    label: str | None = "auto",
    read: Callable[[int, int], bytes] | None = None,
) -> TarImages:
    file = HeaderFile(read or (lambda first, stop: data[first:stop]), len(data))
    return index_tar(TarFile(file, len(data), name="x.tar"), Wanted(image, label))


def images(data: bytes, found: TarImages) -> dict[str, bytes]:
    """The bytes at the places that an index names."""
    places = zip(found.names.to_pylist(), found.offsets.tolist(), found.num_bytes.tolist(), strict=True)
    return {name: data[offset : offset + size] for name, offset, size in places}


@pytest.mark.parametrize("option", ["--format=gnu", "--format=pax", "--format=ustar", "--format=oldgnu"])
def test_images_of_the_program_tar_lie_where_the_index_says(tmp_path: Path, option: str) -> None:
    files = {
        "a.jpg": b"1" * 513,
        "été/b c.PNG": b"2" * 512,
        f"{'d' * 90}/{'n' * 60}.webp": b"3",
        "e.jpg": b"",
    }
    if "ustar" not in option:
        files[f"{'deep/' * 60}{'n' * 120}.jpg"] = b"4" * 2000
    data = packed_by_tar(tmp_path, files, option)
    found = indexed(data)
    assert images(data, found) == {f"./{name}": content for name, content in files.items()}
    assert (found.left_out, found.damage) == ({}, None)


def test_a_size_in_a_pax_header_and_a_binary_size_are_read() -> None:
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        about = tarfile.TarInfo("big.jpg")
        about.size = 9 << 30  # more than eleven octal digits hold
        header = about.tobuf(format)
        sizes = []

        def read(first: int, stop: int, header: bytes = header, sizes: list[int] = sizes) -> bytes:
            sizes.append(stop - first)
            return header[first:stop].ljust(stop - first, b"\0")

        size = len(header) + about.size + 1024
        file = HeaderFile(read, size)
        found = index_tar(TarFile(file, size, name="x.tar"), Wanted("auto", None))
        assert found.num_bytes.tolist() == [about.size]
        assert found.offsets.tolist() == [len(header)]
        assert found.damage is None
        assert sum(sizes) < 5 << 20


@given(st.integers(0, len(tar_of(SOME))))
def test_a_file_that_is_cut_keeps_the_images_before_the_cut(stop: int) -> None:
    data = tar_of(SOME)
    whole = indexed(data)
    before = [
        name for name, content in images(data, whole).items() if data.index(content) + len(content) <= stop
    ]
    found = indexed(data[:stop])
    assert found.names.to_pylist() == before
    end = data.rindex(SOME["5.jpg"]) + len(SOME["5.jpg"])
    if stop <= end + -end % 512:
        assert found.damage
        assert f"of {stop}" in found.damage
    else:
        assert found.damage is None


def test_a_header_that_is_damaged_ends_the_images_and_is_named() -> None:
    data = bytearray(tar_of(SOME))
    place = data.index(b"3.jpg")
    data[place + 100] ^= 1  # the mode, which the checksum covers
    found = indexed(bytes(data))
    assert found.names.to_pylist() == ["1.jpg", "2.jpg"]
    assert found.damage == f"at byte {place} of {len(data)}: no member begins there"


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, bytes(10)])
def test_what_is_no_tar_file_has_damage_and_no_images(data: bytes) -> None:
    found = indexed(data)
    assert not len(found.names)
    assert found.damage


def test_a_header_that_claims_gigabytes_is_damage_and_is_not_read() -> None:
    about = tarfile.TarInfo("x")
    about.type, about.size = tarfile.XHDTYPE, 3 << 30
    header = about.tobuf(tarfile.GNU_FORMAT)
    size = 4 << 30
    asked = []

    def read(first: int, stop: int) -> bytes:
        asked.append(stop - first)
        return header[first:stop].ljust(stop - first, b"\0")

    found = index_tar(TarFile(HeaderFile(read, size), size, name="x"), Wanted("auto", None))
    assert found.damage
    assert sum(asked) < 16 << 20


@pytest.mark.parametrize(
    ("compress", "remedy"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")]
)
def test_a_compressed_file_is_refused_with_its_remedy(
    compress: Callable[[bytes], bytes], remedy: str
) -> None:
    with pytest.raises(CompressedTar, match=f"x.tar is compressed .*`{remedy} < x.tar`"):
        indexed(compress(tar_of(SOME)))


def test_joined_files_are_read_to_the_end() -> None:
    data = tar_of({"a.jpg": b"1"}) + tar_of({"b.jpg": b"22"})
    found = indexed(data)
    assert images(data, found) == {"a.jpg": b"1", "b.jpg": b"22"}
    assert found.damage is None
    rubbish = tar_of({"a.jpg": b"1"}) + b"rubbish" * 100
    assert "no member begins there" in str(indexed(rubbish).damage)


def test_a_member_that_was_added_again_replaces_the_first(tmp_path: Path) -> None:
    sink = io.BytesIO(tar_of({"a.jpg": b"old", "b.jpg": b"b"}))
    with tarfile.open(fileobj=sink, mode="a") as tar:
        about = tarfile.TarInfo("a.jpg")
        about.size = 3
        tar.addfile(about, io.BytesIO(b"new"))
    data = sink.getvalue()
    found = indexed(data)
    assert images(data, found) == {"b.jpg": b"b", "a.jpg": b"new"}
    assert found.left_out == {"replaced members": 1}


def test_links_and_sparse_files_are_counted_and_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "s.jpg", "wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    (tmp_path / "t.jpg").symlink_to("s.jpg")
    (tmp_path / "u.jpg").write_bytes(b"u")
    os.link(tmp_path / "u.jpg", tmp_path / "v.jpg")
    data = packed_by_tar(tmp_path, {}, "--sparse")
    found = indexed(data)
    assert images(data, found) == {"./u.jpg": b"u"}
    assert found.left_out == {"sparse files": 1, "links": 2}


def test_a_name_that_is_not_utf8_is_kept_readable() -> None:
    about = tarfile.TarInfo("caf\udce9.jpg")
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        tar.addfile(about)
    assert indexed(sink.getvalue()).names.to_pylist() == [r"caf\xe9.jpg"]


@pytest.mark.parametrize(
    ("names", "image", "used", "left_out"),
    [
        ("a.jpg a.cls a.json b.png", "auto", "a.jpg b.png", {}),
        ("a.jpg a.seg.png a.png", "auto", "a.jpg", {".png": 1, ".seg.png": 1}),
        ("a.jpg a.seg.png", "seg.png", "a.seg.png", {".jpg": 1}),
        ("a.seg.png a.JPG", "JPG", "a.JPG", {".seg.png": 1}),
        ("x/2020.01.jpg x/2020.02.jpg", "auto", "x/2020.01.jpg x/2020.02.jpg", {}),
        ("a.nef b.nef c.txt d.jpg README", "auto", "d.jpg", {}),
        ("__MACOSX/._a.jpg a.jpg .DS_Store", "auto", "a.jpg", {}),
    ],
)
def test_one_image_of_each_sample_is_used(
    names: str, image: str, used: str, left_out: dict[str, int]
) -> None:
    found = indexed(tar_of(dict.fromkeys(names.split(), b"x")), image)
    assert found.names.to_pylist() == used.split()
    others = {f"other images of samples ({name})": number for name, number in left_out.items()}
    assert {name: number for name, number in found.left_out.items() if name.startswith("other")} == others


def test_members_of_no_sample_are_counted_by_suffix() -> None:
    names = ["a.nef", "b.NEF", "c.txt", "README", "d.jpg", "d.txt"]
    found = indexed(tar_of(dict.fromkeys(names, b"x")))
    assert found.left_out == {".nef": 2, ".txt": 1, "members without a suffix": 1}


@pytest.mark.parametrize(
    ("label", "labels"),
    [
        ("auto", ["7", None, None]),
        (None, [None, None, None]),
        ("txt", ["a cat", None, None]),
        ("json.label", ["cat", "3", None]),
        ("json.a.b", [None, "deep", None]),
    ],
)
def test_labels_are_the_texts_beside_the_images(label: str | None, labels: list[str | None]) -> None:
    members = {
        "0.cls": b" 7\n",
        "0.txt": b"a cat",
        "0.json": b'{"label": "cat"}',
        "0.jpg": b"0",
        "1.jpg": b"1",
        "1.json": b'{"label": 3, "a": {"b": "deep"}}',
        "1.cls": b"\xff\xfe",
        "2.jpg": b"2",
        "2.json": b"no json",
        "2.cls": b"x" * 2000,
    }
    assert indexed(tar_of(members), label=label).labels.to_pylist() == labels


def test_headers_far_apart_are_read_alone_and_near_ones_in_few_requests() -> None:
    for size, most_requests, most_share in ((1_000, 2, 1.0), (1_200_000, 22, 0.3)):
        data = tar_of(
            {f"{n}.{kind}": bytes(size if kind == "jpg" else 1) for n in range(20) for kind in ("jpg", "cls")}
        )
        asked: list[int] = []

        def read(first: int, stop: int, data: bytes = data, asked: list[int] = asked) -> bytes:
            asked.append(stop - first)
            return data[first:stop]

        assert len(indexed(data, read=read).names) == 20
        assert len(asked) <= most_requests
        assert sum(asked) <= most_share * len(data)


def test_chunks_are_neighbours_of_a_few_megabytes_without_large_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "_CHUNK_BYTES", 10_000)
    monkeypatch.setattr(tar_index, "_GAP_BYTES", 5_000)
    sizes = [3000, 3000, 3000, 50_000, 100, 100]
    members = {f"{n}.jpg": bytes(size) for n, size in enumerate(sizes)} | {
        "5.npy": bytes(9000),
        "6.jpg": b"x",
    }
    assert indexed(tar_of(members)).chunks().tolist() == [0, 0, 1, 2, 3, 3, 4]
