"""Data sets of tar files: the same images from a disk and from S3, what is left out, and how they are read."""

import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from faults import FaultProxy
from samples import parquet, put_all, write_all
from servers import S3Server
from sources import fetch_all, source_of
from tars import tar_of

from dinoray.jobs.runs.data_lines import data_lines
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.augment.augmenter import Augmenter
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.demo_images import draw_demo_image
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest, build_manifest
from dinoray.pipeline.data.reading.group_reader import GroupReader
from dinoray.pipeline.data.reading.reads import count_reads
from dinoray.pipeline.data.reading.sharing import groups_ahead, share_reading
from dinoray.pipeline.data.reading.source import Source, Status
from dinoray.pipeline.data.tar import tar_index

IMAGES = {
    f"{tar}.tar#s{n:02}.jpg": random.Random(100 * tar + n).randbytes(900 + n)
    for tar in range(3)
    for n in range(20)
}
TARS: dict[str, bytes] = {}
for _tar in range(3):
    _members: dict[str, bytes] = {}
    for _n in range(20):
        _members[f"s{_n:02}.jpg"] = IMAGES[f"{_tar}.tar#s{_n:02}.jpg"]
        _members[f"s{_n:02}.cls"] = str(_n % 4).encode()
    TARS[f"{_tar}.tar"] = tar_of(_members)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_index, "_CHUNK_BYTES", 10_000)


@pytest.mark.s3
def test_a_folder_a_bucket_and_a_single_file_give_the_same_images(
    s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    write_all(tmp_path, TARS)
    put_all(s3, bucket, {f"p/{key}": data for key, data in TARS.items()})
    expected = [(key, data, str(int(key[-6:-4]) % 4), Status.OK, "") for key, data in IMAGES.items()]
    for path, prefix, number in (
        (str(tmp_path), "", 60),
        (f"s3://{bucket}/p", "p/", 60),
        (f"{tmp_path}/0.tar", "", 20),
    ):
        source = source_of(path)
        found = [tuple(fetched) for fetched in fetch_all(source)]
        assert found == [(prefix + key, *rest) for key, *rest in expected[:number]]
        assert [source.key(index) for index in (0, number - 1)] == [found[0][0], found[-1][0]]
        assert source.has_labels
        asked = [7, 0, 19, 7, 3]
        again = pickle.loads(pickle.dumps(source)).fetch(asked)
        assert [fetched.data for fetched in again] == [expected[index][1] for index in asked]


@pytest.mark.s3
def test_a_chunk_is_one_request_and_an_epoch_reads_each_byte_about_once(
    proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, TARS)
    source = source_of(f"s3://{bucket}", row_group_cache_bytes=25_000)
    sizes = source.manifest.group_sizes
    assert sizes is not None
    assert len(sizes) == 3 * 5
    proxy.requests.clear()
    proxy.bytes_answered = 0
    fetch_all(source)
    assert len(proxy.requests) == len(sizes)
    used = sum(map(len, IMAGES.values()))
    assert (
        proxy.bytes_answered < 2.7 * used
    )  # a header and a label of 1,536 bytes lie beside each image of 900
    order = source.order(seed=1)
    window = order.window(0)
    assert window is not None
    assert len(window.groups) == 2
    reads = count_reads(
        source.manifest, order, train_workers=1, global_batch_size=4, image_bytes=1, most_actors=2
    )
    assert reads.times_read == 1


def test_a_manifest_of_tar_files_is_the_same_after_it_is_stored(tmp_path: Path) -> None:
    write_all(tmp_path, TARS)
    config = DataConfig(path=str(tmp_path))
    manifest = build_manifest(config)
    stored = Manifest.from_bytes(manifest.to_bytes(), config)
    assert stored.table.equals(manifest.table)
    assert stored.settle(config).label_column == "cls"
    positions = np.arange(200)
    orders = [Source(config, one).order(3).locate(positions)[1].tolist() for one in (manifest, stored)]
    assert orders[0] == orders[1]
    assert sorted(orders[0][:60]) == [*range(60)]
    objects = manifest.objects.to_pylist()
    assert [(one["key"], one["size"]) for one in objects] == [(key, len(data)) for key, data in TARS.items()]


@pytest.mark.s3
@pytest.mark.parametrize("store", ["local", "s3"])
def test_bad_members_and_changed_files_are_a_status_in_their_place(
    store: str, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    files = {
        "a.tar": tar_of({"empty.jpg": b"", "large.jpg": bytes(1001), "z.jpg": bytes(1000)}),
        "b.tar": tar_of({"gone.jpg": b"1"}),
        "c.tar": tar_of({"changed.jpg": b"1"}),
    }
    other = tar_of({"changed.jpg": b"2", "more.jpg": bytes(20_000)})
    if store == "local":
        write_all(tmp_path, files)
        source = source_of(str(tmp_path), max_object_bytes=1000)
        (tmp_path / "b.tar").unlink()
        (tmp_path / "c.tar").write_bytes(other)
    else:
        put_all(s3, bucket, files)
        source = source_of(f"s3://{bucket}", max_object_bytes=1000)
        s3.client().delete_object(Bucket=bucket, Key="b.tar")
        put_all(s3, bucket, {"c.tar": other})
    fetched = {one.key: one for one in fetch_all(source)}
    assert {key: one.status for key, one in fetched.items()} == {
        "a.tar#empty.jpg": Status.CORRUPT,
        "a.tar#large.jpg": Status.TOO_LARGE,
        "a.tar#z.jpg": Status.OK,
        "b.tar#gone.jpg": Status.MISSING,
        "c.tar#changed.jpg": Status.CORRUPT,
    }
    assert fetched["a.tar#z.jpg"].data == bytes(1000)
    assert "1001 bytes, more than data.max_object_bytes=1000" in fetched["a.tar#large.jpg"].reason
    assert "listed" in fetched["c.tar#changed.jpg"].reason


def test_damaged_and_compressed_files_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    cut = TARS["1.tar"].index(IMAGES["1.tar#s05.jpg"]) + 100
    write_all(
        tmp_path,
        {**TARS, "1.tar": TARS["1.tar"][:cut], "z.tar": b"\x1f\x8b rest", "list.csv": b"x", "VERSION": b"1"},
    )
    source = source_of(str(tmp_path))
    assert source.num_images == 20 + 5 + 20
    line = "; ".join(data_lines(source))
    assert "45 images in 3 tar files" in line
    assert "1 tar file is damaged: 1.tar at byte 1" in line
    assert f"of {cut}: the file ends within 's05.jpg'; its first 5 images are used" in line
    assert "1 unreadable tar file left out: z.tar" in line
    assert "ignored: 1 .csv, 1 file without a suffix" in line


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (
            {"a.tar": b"\x1f\x8b rest"},
            {},
            "1 of 1 tar files under .* cannot be used; .*a.tar is compressed with gzip.*gunzip",
        ),
        ({"a.tar": b"rubbish" * 100}, {}, "a.tar is not a readable tar file: at byte 0 of 700"),
        (
            {"a.tar": tar_of({"x.nef": b"", "y.txt": b""})},
            {},
            "no images in the 1 tar files under .*: 1 .nef, 1 .txt;",
        ),
        (
            TARS,
            {"image_column": "png"},
            "no images in the 3 tar files .*60 other images of samples .*data.image_column",
        ),
        (TARS, {"label_column": "txt"}, "data.label_column='txt': no image .* 'cls'"),
        (TARS, {"key_column": "id"}, "data.key_column='id' is for Parquet.* set data.key_column=null"),
        (
            TARS,
            {"label_from_parent": True},
            "no image of .* lies in a folder; set data.label_from_parent=false",
        ),
        (TARS, {"label_from_parent": True, "label_column": "cls"}, "leave out one of them"),
        (
            {**TARS, "a.jpg": b"1"},
            {},
            r"holds 1 images and 3 tar files; leave out one kind with data.exclude='\*.tar', or point data.path",
        ),
        (
            {**TARS, "x.parquet": parquet({"image": [b"\xff\xd8\xff"]})},
            {},
            r"holds 1 Parquet shards and 3 tar files; leave out one kind with data.exclude='\*.parquet', or point",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, object], message: str
) -> None:
    write_all(tmp_path, files)
    with pytest.raises((ConfigError, DataError), match=message):
        source_of(str(tmp_path), **options)


def test_an_archive_beside_more_images_is_passed_over_and_metadata_beside_tar_files_too(
    tmp_path: Path,
) -> None:
    write_all(tmp_path / "photos", {"a.jpg": b"1", "b.jpg": b"2", "all.tar": TARS["0.tar"]})
    line = "; ".join(data_lines(source_of(str(tmp_path / "photos"))))
    assert "2 images" in line
    assert "ignored: 1 .tar" in line
    write_all(tmp_path / "web", {**TARS, "0.parquet": parquet({"url": ["http://x"]}), "0_stats.json": b"{}"})
    line = "; ".join(data_lines(source_of(str(tmp_path / "web"))))
    assert "60 images in 3 tar files" in line
    assert "ignored: 1 .json, 1 .parquet" in line


def test_folders_in_tar_files_are_labels_below_those_of_the_file(tmp_path: Path) -> None:
    members = {f"{name}/{n}.jpg": b"x" for name in ("cat", "dog") for n in range(4)}
    write_all(tmp_path / "in", {"a.tar": tar_of({f"./{name}": data for name, data in members.items()})})
    assert {fetched.label for fetched in fetch_all(source_of(str(tmp_path / "in")))} == {"cat", "dog"}
    flat = tar_of({f"{n}.jpg": b"x" for n in range(4)})
    write_all(tmp_path / "out", {"cat/0.tar": flat, "dog/0.tar": flat})
    source = source_of(str(tmp_path / "out"))
    assert [fetched.label for fetched in fetch_all(source)] == ["cat"] * 4 + ["dog"] * 4
    assert "in 2 tar files in 2 class folders" in data_lines(source)[0]
    assert not source_of(str(tmp_path / "out"), label_from_parent=False).has_labels


def test_the_stream_of_a_resumed_run_has_the_crops_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Without Ray: the blocks of two actors, which begin at different positions and read by themselves or ahead."""
    members = [
        {f"{n}.jpg": draw_demo_image("dots", "train", 8 * tar + n) for n in range(8)} for tar in range(3)
    ]
    members[1]["3.jpg"] = b"no image"
    write_all(tmp_path, {f"{tar}.tar": tar_of(images) for tar, images in enumerate(members)})
    source = source_of(str(tmp_path), row_group_cache_bytes=30_000)
    order, crops = source.order(5), CropsConfig(num_local_crops=1, global_crop_size=32, local_crop_size=16)
    actors = [Augmenter(source, order, crops, seed=5, num_threads=1) for _ in range(2)]
    whole = actors[0].block(np.arange(60))
    resumed = actors[1].block(np.arange(37, 60))
    for name in ("global_crops", "local_crops", "position", "status", "note"):
        np.testing.assert_array_equal(whole[name][37:], resumed[name])
    bad = [json.loads(note)["key"] for note in whole["note"] if note]
    assert bad == ["1.tar#3.jpg"] * len(bad)
    assert len(bad) in (2, 3)  # once an epoch, in two epochs and a half
    sharing = share_reading(source.manifest, order, most_actors=2, cpus_per_actor=1, rows_per_block=4)
    assert sharing is not None
    reader = GroupReader(source, sharing.cache_bytes)
    images = order.locate(np.arange(24))[1].tolist()
    ahead = groups_ahead(order, 0, 24)
    assert ahead is not None
    reader.read_ahead(ahead)
    assert reader.fetch(images) == source.fetch(images)
