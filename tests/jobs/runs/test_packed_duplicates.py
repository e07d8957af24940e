"""What packing leaves out and what it shows: damaged images, duplicates, and the page about the data."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import encode, scene
from parts_in_process import KilledError, Pool, use_pool
from PIL import Image
from samples import parquet, put_all, write_all
from servers import S3Server

from dinoray.jobs import pack
from dinoray.jobs.runs.choosing import Asked
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source

NUM = 24


def photo(number: int, quality: int = 90) -> bytes:
    turned = scene(80 + 8 * (number % 3), 64).rotate(15 * number, expand=False)
    return encode(turned, "JPEG", quality=quality)


PHOTOS = {f"{'ab'[n % 2]}/{n:02d}.jpg": photo(n) for n in range(NUM)}
COPIES = {"a/05 copy.jpg": PHOTOS["b/05.jpg"], "b/07b.jpg": PHOTOS["b/07.jpg"]}
"""The first one is the original of the other, by its key."""
AGAIN = {"b/<02>.jpg": photo(2, quality=80)}
DAMAGED = {"a/90.jpg": photo(90)[:-400], "a/91.jpg": b"<html>"}
FILES = PHOTOS | COPIES | AGAIN | DAMAGED | {"a/notes.txt": b"x"}


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    return use_pool(monkeypatch)


@pytest.fixture
def source(tmp_path: Path, pool: Pool) -> Path:
    write_all(tmp_path / "in", FILES)
    return tmp_path / "in"


def run(source: Path, out: Path, *more: str) -> None:
    pack.main([str(source), f"--out={out}", "data.max_bad_fraction=0.2", *more])


def keys(out: Path) -> set[str]:
    """The keys of the table, none of them twice, each with the bytes that it should have."""
    parts = sorted(out.glob("part-*.parquet"))
    table = pa.concat_tables([pq.read_table(part).replace_schema_metadata() for part in parts])
    found = table["key"].to_pylist()
    assert table["image"].to_pylist() == [FILES[key] for key in found]
    assert len(set(found)) == len(found)
    return set(found)


def about(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "_about" / name).read_text().splitlines()]


def test_damaged_images_are_left_out_and_named_without_shrink(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out)
    assert keys(out) == {*PHOTOS, *COPIES, *AGAIN}
    reasons = {line["key"]: line["reason"] for line in about(out, "quarantine.jsonl")}
    assert reasons.keys() == DAMAGED.keys()
    assert reasons["a/90.jpg"].startswith("damaged or cut off JPEG")
    (summary,) = about(out, "summary.json")
    assert (summary["rows_in"], summary["rows_out"], summary["quarantined"]) == (29, 27, 2)
    assert (summary["exact_duplicates"], summary["near_duplicates"]) == (2, 1)
    with pytest.raises(DataError, match=r"2 of 29 images .* data\.max_bad_fraction=0\.01"):
        run(source, tmp_path / "strict", "data.max_bad_fraction=0.01")


@pytest.mark.parametrize(
    ("which", "gone"),
    [
        ("exact", {"b/05.jpg", "b/07b.jpg"}),
        ("near", {"b/05.jpg", "b/07b.jpg", "b/<02>.jpg"}),
    ],
)
def test_duplicates_are_left_out_and_listed(
    which: str, gone: set[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(source, out, "--duplicates", which, "--rows-per-file=5")
    assert keys(out) == {*PHOTOS, *COPIES, *AGAIN} - gone
    told = f"29 images in = {27 - len(gone)} images out + 2 quarantined + {len(gone)} duplicates"
    assert told in capsys.readouterr().out
    listed = {line["key"]: line for line in about(out, "duplicates.jsonl")}
    assert {key for key, line in listed.items() if line["left_out"]} == gone
    assert listed["b/05.jpg"]["duplicate_of"] == "a/05 copy.jpg"
    assert {key: line["kind"] for key, line in listed.items()} == {
        "b/05.jpg": "exact",
        "b/07b.jpg": "exact",
        "b/<02>.jpg": "near",
    }
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]
    run(source, out, "--duplicates", which, "--rows-per-file=5")
    assert told in capsys.readouterr().out  # finished


@pytest.mark.parametrize("in_pass", ["in_first_pass", "in_second_pass"])
def test_a_job_that_is_killed_leaves_out_the_same(
    in_pass: str, source: Path, tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoray.pipeline.export.packing_plan._LEAST_ROWS", 7)  # parts of a first pass
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--duplicates=near", "--rows-per-file=5")
    run(source, whole, *options)

    def kill(number: int) -> None:
        if number == 2:
            setattr(pool, in_pass, lambda number: None)
            raise KilledError

    setattr(pool, in_pass, kill)
    with pytest.raises(KilledError):
        run(source, out, *options)
    assert not (out / "data.html").exists()
    run(source, out, *options)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        if file.name not in ("pack.json", "_manifest.parquet", "first_pass", "data.html"):
            assert (whole / file).read_bytes() == (out / file).read_bytes(), file
    page = (out / "data.html").read_text()
    assert page == (whole / "data.html").read_text().replace(str(whole), str(out))


def test_facts_that_the_second_pass_misses_are_made_again_with_their_part(
    source: Path, tmp_path: Path, pool: Pool
) -> None:
    def lose(number: int) -> None:
        pool.in_second_pass = lambda number: None
        (tmp_path / "out-first-pass/_about/_images-00000.parquet").unlink()
        raise KilledError

    pool.in_second_pass = lose
    with pytest.raises(KilledError):
        run(source, tmp_path / "out", "--duplicates=near")
    with pytest.raises(
        DataError, match=r"_images-00000.parquet is missing; delete (\S+) and run again"
    ) as error:
        run(source, tmp_path / "out", "--duplicates=near")
    Path(str(error.value).split("delete ")[1].split(" and")[0]).unlink()
    run(source, tmp_path / "out", "--duplicates=near")
    assert len(keys(tmp_path / "out")) == 24


@pytest.mark.s3
def test_a_bucket_is_packed_into_a_bucket_with_its_page(s3: S3Server, bucket: str, pool: Pool) -> None:
    put_all(s3, bucket, {f"in/{key}": data for key, data in FILES.items()})
    pack.main(
        [f"s3://{bucket}/in", f"--out=s3://{bucket}/out", "--duplicates=near", "data.max_bad_fraction=0.2"]
    )
    listed = [entry["Key"] for entry in s3.client().list_objects_v2(Bucket=bucket)["Contents"]]
    assert {key.split("/")[0] for key in listed} == {"in", "out"}
    page = s3.client().get_object(Bucket=bucket, Key="out/data.html")["Body"].read().decode()
    assert "<h1>24 images</h1>" in page
    assert page.count("data:image/") == 4
    config = DataConfig(path=f"s3://{bucket}/out")
    assert Source(config, build_manifest(config)).num_images == 24


def test_a_part_without_its_facts_is_made_again_and_others_stay(
    source: Path, tmp_path: Path, pool: Pool
) -> None:
    """As parts of earlier versions, which had not been decoded."""
    out = tmp_path / "out"

    def kill(number: int) -> None:
        if number == 3:
            pool.in_first_pass = lambda number: None
            raise KilledError

    pool.in_first_pass = kill
    with pytest.raises(KilledError):
        run(source, out, "--rows-per-file=5")
    (out / "_about/_images-00001.parquet").unlink()
    times = {part.name: part.stat().st_mtime_ns for part in out.glob("part-*")}
    run(source, out, "--rows-per-file=5")
    changed = {name for name, then in times.items() if (out / name).stat().st_mtime_ns != then}
    assert changed == {"part-00001.parquet"}
    assert len(keys(out)) == 27


def test_rows_of_parquet_lose_their_duplicates_too(source: Path, tmp_path: Path) -> None:
    names = [key for key in FILES if key.endswith(".jpg")]
    rows = {"image": [FILES[key] for key in names], "key": names}
    write_all(tmp_path, {"rows/x.parquet": parquet(rows, row_group_size=4)})
    out = tmp_path / "out"
    run(tmp_path / "rows", out, "--duplicates=exact", "--rows-per-file=6")
    assert keys(out) == {*PHOTOS, *AGAIN}  # in the order of rows, the copies come later


@pytest.mark.parametrize(
    "setting",
    ["data.include=*.jpg", "data.label_level=0", "data.image_list={}/list.csv", "data.uri_column=url"],
)
def test_what_chose_images_and_labels_is_not_asked_of_the_first_pass(
    setting: str, tmp_path: Path, pool: Pool
) -> None:
    names, source, out = [*PHOTOS][:5], tmp_path / "in", tmp_path / "out"
    write_all(source, {key: PHOTOS[key] for key in names})
    (tmp_path / "list.csv").write_text("key,label\n" + "".join(f"{key},{key[0]}\n" for key in names))
    if "uri" in setting:
        columns = {"url": [f"../in/{key}" for key in names], "label": [key[0] for key in names]}
        source = tmp_path / "table"
        write_all(source, {"x.parquet": parquet(columns)})
    run(source, out, "--duplicates=exact", setting.format(tmp_path))
    table = pq.read_table(sorted(out.glob("part-*")), columns=["key", "label"])
    found = {key.rpartition("in/")[2]: label for key, label in zip(*table.to_pydict().values(), strict=True)}
    assert found == {key: key[0] for key in names}


def test_what_cannot_be_combined_or_changed_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--one-pass writes each image before .*; leave out one of them"):
        run(source, tmp_path / "out", "--one-pass", "--duplicates=exact")
    run(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"made with duplicates=None, not 'near'; set it back"):
        run(source, tmp_path / "out", "--duplicates=near")


def test_the_page_shows_what_was_packed_and_why_not_the_rest(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    page = (tmp_path / "out/data.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        "27 images",
        "JPEG",
        "RGB, 8 bits",
        "27",
        "100.00%",
        "damaged or cut off JPEG",
        "a/91.jpg",
        "ignored: 1 .txt",
        "2 images are byte for byte the same as an earlier one, 1 nearly the same",
        "In 2 pairs the two labels differ.",
        "80 x 64 pixels",
        f"dinoray pretrain data.path={tmp_path}/out",
    ):
        assert words in text, words
    assert page.count("data:image/") == 4  # samples and pairs, text and pictures of each
    assert "&lt;html&gt;" in page or "<html>" not in page[20:]
    # The next run takes the packed images, and what lies beside them is none.
    config = DataConfig(path=str(tmp_path / "out"))
    assert Source(config, build_manifest(config)).num_images == 27


def test_a_set_of_one_image_of_one_colour_has_a_page(tmp_path: Path, pool: Pool) -> None:
    write_all(tmp_path / "in", {"x.png": encode(Image.new("L", (1, 1), 7), "PNG")})
    pack.main([str(tmp_path / "in"), f"--out={tmp_path}/out"])
    assert "<dt>images of one colour</dt><dd>1</dd>" in (tmp_path / "out/data.html").read_text()


def test_arrays_of_four_channels_are_packed_and_the_printed_settings_take_them(
    tmp_path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        np.save(tmp_path / "in" / f"{number}.npy", np.full((30, 40, 4), 50 * number, np.uint8))
    run(tmp_path / "in", tmp_path / "out", "data.channels=4")
    *_, line = capsys.readouterr().out.strip().split("\n")
    _, _, *overrides = line.split()
    config = Asked(None, None, overrides).config()
    assert (config.data.channels, config.crops.channels, config.crops.hue) == (4, 4, 0)
    source = Source(config.data, build_manifest(config.data))
    packed = source.fetch(range(source.num_images))
    assert sorted(one.key for one in packed) == ["0.npy", "1.npy", "2.npy"]
    assert decode(packed[0].data or b"", max_pixels=10_000, config=config.data).shape == (30, 40, 4)
