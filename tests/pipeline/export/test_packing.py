"""Packing: what shrinking does to an image, where parts are cut, and what a part holds."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crops_oracle import photo_files
from hypothesis import example, given
from hypothesis import strategies as st
from image_files import encode, pillow
from PIL import Image
from samples import parquet, write_all

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.data.decode import BadImage
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
    shrink_pixels,
    shrunk_size,
    write_part,
)
from dinoray.pipeline.export.parquet_parts import PartFooter, collect
from dinoray.pipeline.storage.files import Directory

MOST = 40_000
ORIENTATION = 0x0112


def account(out: Directory, plan: Plan, part: int) -> tuple[list[PartFooter], list[dict[str, Any]]]:
    return collect(out, {part: plan.rows(part)}, KIND, plan.identity)


def scene(width: int, height: int) -> Image.Image:
    """A picture with edges, slopes and some grain, that no flip or turn leaves the same."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    rings = 60 * np.sign(np.sin(25 * np.hypot(x - 0.3, y - 0.2)))
    grain = np.random.default_rng(0).normal(0, 6, (height, width))
    planes = [140 + rings + grain - 90 * y, 110 + 120 * x - rings / 2 + grain, 60 + 150 * y + grain]
    return Image.fromarray(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return encode(image, "JPEG", **{"quality": 95, **options})


def resized_by_pillow(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pillow(data)).resize(size, Image.Resampling.LANCZOS)).astype(int)


def deviation(shrunk: bytes, data: bytes) -> float:
    """Mean absolute difference, in levels of 255, from the original as Pillow alone resizes it."""
    found = pillow(shrunk).astype(int)
    return float(np.abs(found - resized_by_pillow(data, found.shape[1::-1])).mean())


# Shrinking.


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_of_no_more_pixels_stays_the_very_same_bytes(image_format: str) -> None:
    data = encode(scene(200, 200), image_format, quality=95)
    assert shrink(data, max_pixels=200 * 200) is data
    assert shrink(data, max_pixels=200 * 100) != data


def test_a_larger_image_becomes_a_jpeg_of_quality_95_with_its_colours_at_full_resolution() -> None:
    shrunk = Image.open(io.BytesIO(shrink(jpeg(scene(640, 480)), max_pixels=MOST)))
    assert shrunk.format == "JPEG"
    assert [sampling[1:3] for sampling in shrunk.layer] == [(1, 1)] * 3
    twin = Image.open(io.BytesIO(jpeg(scene(8, 8), quality=95)))
    assert shrunk.quantization == twin.quantization
    assert "exif" not in shrunk.info


def test_the_quality_can_be_chosen() -> None:
    data = jpeg(scene(640, 480))
    best, usual, least = (len(shrink(data, max_pixels=MOST, quality=q)) for q in (98, 95, 60))
    assert best > usual > least


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (201, 201), (1999, 1111), (5000, 20), (3000, 14)])
def test_the_picture_keeps_its_shape_and_has_as_many_pixels_as_it_may(size: tuple[int, int]) -> None:
    data = jpeg(scene(*size), quality=100)
    height, width = pillow(shrink(data, max_pixels=MOST)).shape[:2]
    assert width * height <= MOST
    assert width * height > MOST * (1 - 1.5 / min(width, height))
    scale = (MOST / (size[0] * size[1])) ** 0.5
    assert abs(width - size[0] * scale) <= 1
    assert abs(height - size[1] * scale) <= 1


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 10**6))
@example(99, 99, 1)
def test_a_size_is_shrunk_once_to_what_is_allowed_and_never_enlarged(
    width: int, height: int, most: int
) -> None:
    new_width, new_height = shrunk_size(width, height, most)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert new_width * new_height <= most
    assert ((new_width, new_height) == (width, height)) is (width * height <= most)
    assert shrunk_size(new_width, new_height, most) == (new_width, new_height)
    if width != height:
        assert shrunk_size(height, width, most) == (new_height, new_width)


def test_no_side_is_longer_than_a_jpeg_can_have() -> None:
    assert shrunk_size(1, 100_000, 100_000) == (1, 100_000)  # as it is
    assert shrunk_size(3, 100_000, 270_000) == (2, 65_500)


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (2, 5000), (1, 1)])
def test_a_line_of_pixels_is_shrunk_along_itself(size: tuple[int, int]) -> None:
    shrunk = shrink(encode(scene(*size), "BMP"), max_pixels=100)
    height, width = pillow(shrunk).shape[:2]
    assert min(width, height) == 1
    assert max(width, height) == min(100, max(size))


FORMATS = {
    "jpeg 4:2:0": jpeg(scene(900, 700), subsampling=2),
    "progressive jpeg": jpeg(scene(900, 700), progressive=True),
    "gray jpeg": jpeg(scene(900, 700).convert("L")),
    "cmyk jpeg": jpeg(scene(900, 700).convert("CMYK")),
    "png": encode(scene(900, 700), "PNG"),
    "palette png": encode(scene(900, 700).quantize(200), "PNG"),
    "gray png": encode(scene(900, 700).convert("L"), "PNG"),
    "webp": encode(scene(900, 700), "WEBP"),
    "tiff": encode(scene(900, 700), "TIFF"),
    "exactly a fourth": jpeg(scene(800, 800)),
    "over an eighth": jpeg(scene(2003, 1601)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_picture_is_the_one_that_pillow_resizes(name: str) -> None:
    shrunk = shrink(FORMATS[name], max_pixels=MOST)
    assert deviation(shrunk, FORMATS[name]) < 1.7  # levels of 255, some 1.2 of which are JPEG's at quality 95
    # What is left where the encoding costs next to nothing: a decoder's rounding, or another of its scales.
    best = shrink(FORMATS[name], max_pixels=MOST, quality=100)
    assert deviation(best, FORMATS[name]) < 1.2
    if "gray" in name:
        assert np.ptp(pillow(shrunk).astype(int), axis=-1).max() == 0


@pytest.mark.parametrize("name", ["jpeg 4:2:0", "over an eighth"])
def test_no_other_place_or_filter_comes_as_near(name: str) -> None:
    shrunk = shrink(FORMATS[name], max_pixels=MOST, quality=100)
    pixels, best = pillow(shrunk).astype(int), deviation(shrunk, FORMATS[name])
    expected = resized_by_pillow(FORMATS[name], pixels.shape[1::-1])
    for axis in (0, 1):
        for step in (-1, 1):
            assert np.abs(np.roll(pixels, step, axis) - expected).mean() > 4 * best
    nearest = Image.fromarray(pillow(FORMATS[name])).resize(pixels.shape[1::-1], Image.Resampling.NEAREST)
    assert np.abs(np.asarray(nearest).astype(int) - expected).mean() > 4 * best


@pytest.mark.skipif(not photo_files(1), reason="needs ../shared/data/photos-small")
def test_photographs_deviate_by_no_more_than_their_encoding() -> None:
    for data in photo_files(20):
        shrunk = shrink(data, max_pixels=9000)
        if shrunk is not data:
            exact = resized_by_pillow(data, pillow(shrunk).shape[1::-1]).astype(np.uint8)
            encoding = np.abs(pillow(jpeg(Image.fromarray(exact), subsampling=0)).astype(int) - exact).mean()
            assert deviation(shrunk, data) < encoding + 0.5


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(640, 480), (1203, 905)])  # the latter decoded at half its odd size
def test_it_stands_upright_and_says_nothing_of_turning(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = jpeg(scene(*size), exif=exif, subsampling=2)
    shrunk = shrink(data, max_pixels=MOST)
    height, width = np.asarray(Image.open(io.BytesIO(shrunk))).shape[:2]
    assert (width < height) is (orientation >= 5)
    assert Image.open(io.BytesIO(shrunk)).getexif().get(ORIENTATION) is None
    assert deviation(shrunk, data) < 2


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_picture_that_is_turned_lies_as_exactly_as_one_that_is_not(orientation: int) -> None:
    """Decoded at an eighth, the last row and column stand for one pixel each; turned, they may come first."""
    image, exif = scene(1601, 1201), Image.Exif()
    exif[ORIENTATION] = orientation
    plain, turned = jpeg(image), jpeg(image, exif=exif)
    deviations = [deviation(shrink(data, max_pixels=7500, quality=100), data) for data in (plain, turned)]
    assert deviations[1] < 1.2 * deviations[0]


def test_what_shrinking_would_not_make_smaller_stays_as_it_is() -> None:
    rough = jpeg(scene(320, 240), quality=20)
    assert shrink(rough, max_pixels=320 * 239) is rough


@pytest.mark.parametrize(
    "data",
    [
        b"<html>no picture</html>",
        b"",
        jpeg(scene(640, 480))[:-3000],
        jpeg(scene(100, 100))[:-300],
        encode(scene(100, 100), "PNG")[:-300],
    ],
    ids=["text", "empty", "large, cut off", "small, cut off", "small PNG, cut off"],
)
def test_what_is_no_whole_image_is_bad_whatever_its_size(data: bytes) -> None:
    with pytest.raises(BadImage):
        shrink(data, max_pixels=MOST)


def test_an_image_beyond_what_may_be_decoded_is_bad() -> None:
    with pytest.raises(BadImage, match="640x480"):
        shrink(jpeg(scene(640, 480)), max_pixels=MOST, most_pixels=640 * 479)


# How many pixels.


@pytest.mark.parametrize(
    ("crops", "pixels"),
    [
        ({}, 269_863),  # 96^2 / 0.05 * 1.21^2 = 184,320 * 1.4641
        ({"local_crop_scale": (0.1, 0.4)}, 183_657),  # now the global crops: 224^2 / 0.4 * 1.4641
        ({"num_local_crops": 0, "local_blur_prob": 0.5}, 183_657),
        ({"global_crop_scale": (0.25, 1)}, 293_851),  # 224^2 / 0.25 * 1.4641
        ({"global_crop_size": 32, "local_crop_size": 10, "local_crop_scale": (0.2, 1)}, 3749),
    ],
)
def test_the_crop_that_asks_for_most_decides(crops: dict[str, Any], pixels: int) -> None:
    assert shrink_pixels(CropsConfig(**crops)) == pixels


def test_without_slack_the_smallest_region_is_exactly_its_crop() -> None:
    assert shrink_pixels(CropsConfig(), slack=1.0) == 96 * 96 * 20


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
