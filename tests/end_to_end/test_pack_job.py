"""The packing job in real processes: killed and continued, on S3, and read again by the settings that it names."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import encode, pillow
from jobs_processes import start_job
from PIL import Image
from samples import parquet, put_all, write_all
from servers import S3Server, use_aws

from dinoray.jobs import pack as job
from dinoray.jobs.cli.config import load_config
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Fetched, Source
from dinoray.pipeline.export.packing import Plan, shrink, write_part
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.local_files import TEMPORARY

LABELS = ("boats", "cats", "trees")
PER_LABEL = 40
MOST = 1875  # pixels: 8^2 / 0.05 * 1.21^2
BAD = {"boats/03.jpg": b"<html>no picture</html>", "trees/39.jpg": b""}


def photo(number: int) -> bytes:
    """Clouds of colour; every fourth has too few pixels to be shrunk."""
    rough = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    size = (45, 40) if number % 4 == 0 else (300 + 10 * (number % 7), 240)
    return encode(Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC), "JPEG", quality=90)


FILES = {
    f"{label}/{i:02d}.jpg": photo(PER_LABEL * number + i)
    for number, label in enumerate(LABELS)
    for i in range(PER_LABEL)
} | BAD


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pack") / "images"
    write_all(folder, FILES)
    return folder


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    """One image to a part, so that there is something between the first and the last."""
    return [
        *(str(images), f"--out={out}", "--shrink", "--rows-per-file=1"),
        *("crops.global_crop_size=16", "crops.local_crop_size=8"),
        *("data.label_from_parent=true", "data.max_bad_fraction=0.02", "resources.augment_actors=1"),
        *more,
    ]


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def table(out: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(part).replace_schema_metadata() for part in parts(out)])


def read_as_told(output: str) -> list[Fetched]:
    """All images, by the settings of the command that the job prints at its end."""
    words = shlex.split(output.strip().splitlines()[-1])
    assert words[:2] == ["dinoray", "pretrain"]
    config = load_config(None, None, words[2:]).data
    source = Source(config, build_manifest(config))
    return source.fetch(range(source.num_images))


@pytest.fixture(scope="module")
def packed(images: Path, run_here: Callable[..., str]) -> Path:
    """A directory that a job began, lost its driver over, and was started for again."""
    out = images.parent / "packed"
    with start_job("jobs.pack", *arguments(images, out)) as running:
        running.wait_until(lambda: len(parts(out)) >= 5)
        running.kill_driver()
    committed = {part: (part.stat().st_mtime_ns, part.read_bytes()) for part in parts(out)}
    assert 5 <= len(committed) < 120, "killed too late to prove anything"
    assert not (out / "_about/summary.json").exists()

    output = run_here("jobs.pack", *arguments(images, out))

    (images.parent / "output").write_text(output)
    assert f"{120 - len(committed)} of 120 to do" in output
    assert committed == {part: (part.stat().st_mtime_ns, part.read_bytes()) for part in committed}
    return out


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_is_killed_continues_to_the_table_that_it_would_have_made(
    packed: Path, images: Path
) -> None:
    found = table(packed)
    usable = [key for key in FILES if key not in BAD]
    assert sorted(found["key"].to_pylist()) == sorted(usable)
    assert found["key"].to_pylist() != usable  # but shuffled
    usable = found["key"].to_pylist()
    assert found["label"].to_pylist() == [key.split("/")[0] for key in usable]
    assert found["image"].to_pylist() == [shrink(FILES[key], max_pixels=MOST) for key in usable]
    # Part by part, to the last byte, it is what one process makes without a job around it.
    about = json.loads((packed / "_about/pack.json").read_text())
    config = DataConfig(path=str(images), label_from_parent=True)
    source = Source(config, build_manifest(config))
    plan = Plan(about["manifest"], tuple(range(121)), about["max_pixels"])
    for part in (0, 3, 77, 119):
        write_part(None, source, part, out=Directory(str(packed.parent / "again")), plan=plan)
    for part in parts(packed.parent / "again"):
        assert part.read_bytes() == (packed / part.name).read_bytes()


@pytest.mark.ray
def test_it_says_what_became_of_the_images(packed: Path, images: Path) -> None:
    output = (images.parent / "output").read_text()
    assert f"data: 120 images in {len(LABELS)} class folders at {images} (labels from folder names)" in output
    assert f"images of more than {MOST} pixels are shrunk to {MOST} if that makes the file smaller" in output
    summary = json.loads((packed / "_about/summary.json").read_text())
    num_shrunk = sum(shrink(FILES[key], max_pixels=MOST) != FILES[key] for key in FILES if key not in BAD)
    assert num_shrunk == 90 - 2  # 90 large ones, two of them bad
    assert (summary["rows_in"], summary["rows_out"], summary["quarantined"]) == (120, 118, 2)
    assert summary["num_shrunk"] == num_shrunk
    assert summary["bytes_in"] == sum(len(data) for key, data in FILES.items() if key not in BAD)
    assert summary["bytes_out"] == sum(map(len, table(packed)["image"].to_pylist()))
    megabytes = f"{summary['bytes_in'] / 1e6:.1f} MB before, {summary['bytes_out'] / 1e6:.1f} MB after"
    assert f"120 images in = 118 images out + 2 quarantined, {num_shrunk} shrunk, {megabytes}" in output
    lines = [json.loads(line) for line in (packed / "_about/quarantine.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert sorted(reasons) == sorted(BAD)
    assert f"page about the images: {packed}/data.html" in output
    page = (packed / "data.html").read_text()
    assert all(words in page for words in ("118 images", "trees", "boats/03.jpg", "320 x 240"))
    assert "not an image" in reasons["boats/03.jpg"]


@pytest.mark.ray
def test_the_command_that_it_prints_reads_the_same_keys_and_labels(packed: Path, images: Path) -> None:
    read = read_as_told((images.parent / "output").read_text())
    assert sorted(image.key for image in read) == sorted(key for key in FILES if key not in BAD)
    assert [image.label for image in read] == [image.key.split("/")[0] for image in read]
    shapes = [pillow(image.data).shape for image in read if image.data is not None]
    assert len(shapes) == 118
    assert all(height * width <= MOST for height, width, _ in shapes)


@pytest.mark.ray
def test_a_finished_job_says_so_and_does_nothing(
    packed: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in packed.rglob("*")}
    job.main(arguments(images, packed))
    output = capsys.readouterr().out
    assert "is finished: 120 images in = 118 images out" in output
    assert len(read_as_told(output)) == 118
    assert before == {file: file.stat().st_mtime_ns for file in packed.rglob("*")}


@pytest.mark.ray
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["crops.local_crop_size=10"], "max_pixels=1875, not 2929"),
        (["--rows-per-file=2"], "rows_per_file=1, not 2"),
        (["data.label_from_parent=false"], "data.label_from_parent=True, not False"),
        (["data.max_pixels=1000"], "data.max_pixels=100000000, not 1000"),
        (["data.path=ELSEWHERE"], "data.path="),
    ],
)
def test_other_settings_are_refused_with_what_differs(
    more: list[str], words: str, packed: Path, images: Path
) -> None:
    more = [argument.replace("ELSEWHERE", str(images / "cats")) for argument in more]
    with pytest.raises(ConfigError, match=r"holds images made with .*set it back") as caught:
        job.main(arguments(images, packed, *more))
    assert words in str(caught.value)


@pytest.mark.ray
def test_files_as_they_are_do_not_go_where_shrunk_ones_are(packed: Path, images: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_pixels=1875, not None"):
        job.main([str(images), f"--out={packed}", "--rows-per-file=1", "data.label_from_parent=true"])


@pytest.mark.ray
def test_more_bad_images_than_allowed_end_the_job(packed: Path, images: Path) -> None:
    (packed / "_about/summary.json").rename(packed / "_about/aside.json")  # no longer finished
    try:
        with pytest.raises(DataError, match=r"2 of 120 .*data\.max_bad_fraction=0\.01.*is packed already"):
            job.main(arguments(images, packed, "data.max_bad_fraction=0.01"))
        assert not (packed / "_about/summary.json").exists()
    finally:
        (packed / "_about/aside.json").rename(packed / "_about/summary.json")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["train.epochs=2"], r"only data\.\*, storage\.\*, resources\.\*, crops\.\* can be set here"),
        (["--recipe=demo_"], "invalid choice: 'demo_'"),
        (["--rows-per-file=0"], "invalid positive number"),
        (["data.pth=x"], r"did you mean data\.path"),
        (["--out=IMAGES/packed"], "must not be inside the folder of the images"),
        (["--out=IMAGES/.."], "must not be inside the folder of the images"),
        (["--out=IMAGES/"], "must not be inside the folder of the images"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    more: list[str], words: str, images: Path, tmp_path: Path
) -> None:
    more = [argument.replace("IMAGES", str(images)) for argument in more]
    with pytest.raises(ConfigError, match=words):
        job.main(arguments(images, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
    assert {path.name for path in images.iterdir()} == set(LABELS)


def test_crops_are_no_matter_where_nothing_is_shrunk(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="goes with --shrink"):
        job.main([str(images), f"--out={tmp_path / 'out'}", "crops.local_crop_size=8"])


def test_two_rows_of_one_key_are_refused_before_anything_is_packed(tmp_path: Path) -> None:
    write_all(tmp_path / "in", {"a.parquet": parquet({"image": [b"x"] * 3, "name": ["k", "l", "k"]})})
    with pytest.raises(ConfigError, match="has 'k' in 2 rows"):
        job.main([str(tmp_path / "in"), f"--out={tmp_path / 'out'}", "data.key_column=name"])
    assert not (tmp_path / "out" / "_about/pack.json").exists()


# Two passes


@pytest.mark.ray
@pytest.mark.slow
def test_parquet_sorted_by_class_is_shuffled_in_two_passes_with_one_account(
    tmp_path: Path, run_here: Callable[..., str]
) -> None:
    """An image is bad, and a part is lost after the end, when the first pass is gone."""
    small = [encode(Image.new("RGB", (8, 8), (number, 0, 0)), "JPEG") for number in range(256)]
    for number, label in enumerate(LABELS):
        rows = {
            "image": [b"no picture" if (number, i) == (1, 7) else small[i] for i in range(256)],
            "name": [f"{label} {i}" for i in range(256)],
            "kind": [label] * 256,
        }
        write_all(tmp_path / "in", {f"{label}.parquet": parquet(rows, row_group_size=64)})
    out = tmp_path / "out"
    command = [
        *("jobs.pack", str(tmp_path / "in"), f"--out={out}", "--shrink", "crops.local_crop_size=16"),
        *("crops.global_crop_size=32", "data.key_column=name", "data.label_column=kind"),
        "data.max_bad_fraction=0.002",
    ]
    output = run_here(*command)
    assert "pass 1 of 2: shuffles the rows of 4 of 12 row groups at a time" in output
    assert f"{out}: 768 images in = 767 images out + 1 quarantined, 0 shrunk" in output
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]
    bad = [json.loads(line) for line in (out / "_about/quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["status"]) for line in bad] == [(f"{LABELS[1]} 7", "corrupt")]
    packed = table(out)
    assert len(set(packed["key"].to_pylist())) == packed.num_rows == 767
    assert [key.split()[0] for key in packed["key"].to_pylist()] == packed["label"].to_pylist()
    images = [small[int(key.split()[1])] for key in packed["key"].to_pylist()]
    assert packed["image"].to_pylist() == images
    labels = packed["label"].to_pylist()
    assert all(set(labels[i : i + 64]) == set(LABELS) for i in range(0, 700, 64))

    assert "is finished: 768 images in = 767" in run_here(*command)
    before = {part.name: part.read_bytes() for part in parts(out)}
    assert len(before) > 2
    parts(out)[1].unlink()
    write_all(tmp_path, {f"out-first-pass/part-00001.parquet.0{TEMPORARY}": b"PAR1"})  # of a killed process
    assert f"1 of {len(before)} to do" in run_here(*command)
    assert before == {part.name: part.read_bytes() for part in parts(out)}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]


def test_a_first_pass_does_not_go_where_the_images_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/out-first-pass must not be inside the folder of the images"):
        job.main([str(tmp_path / "out-first-pass"), f"--out={tmp_path}/out"])


@pytest.mark.s3
def test_a_first_pass_has_no_place_beside_a_bucket(tmp_path: Path, bucket: str) -> None:
    write_all(tmp_path / "in", {"a.parquet": parquet({"image": [b"x"] * 600}, row_group_size=200)})
    with pytest.raises(ConfigError, match=r"is a bucket, .* choose a folder in it"):
        job.main([str(tmp_path / "in"), f"--out=s3://{bucket}"])


# S3


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_parquet_on_s3_is_packed_onto_s3_byte_for_byte(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, run_here: Callable[..., str]
) -> None:
    s3.client().create_bucket(Bucket="pack")
    names = [f"photo {i}" for i in range(24)]
    files = {name: photo(i) for i, name in enumerate(names)}
    kinds = [None if i == 5 else LABELS[i % 3] for i in range(24)]
    structs = [{"bytes": files[name], "path": name} for name in names]
    shards = {
        f"in/{s}.parquet": parquet({"photo": structs[rows], "name": names[rows], "kind": kinds[rows]})
        for s, rows in enumerate((slice(12), slice(12, 24)))
    }
    put_all(s3, "pack", shards)
    command = [
        *("s3://pack/in", "--out=s3://pack/out", "--rows-per-file=5"),
        *("data.image_column=photo", "data.key_column=name", "data.label_column=kind"),
    ]
    output = run_here("jobs.pack", *command)
    assert "image files are stored unchanged" in output
    assert "24 images in = 24 images out + 0 quarantined, 0 shrunk" in output
    assert "pass 1 of 2: shuffles the rows of 12 of 12 row groups at a time" in output
    listed = [entry["Key"] for entry in s3.client().list_objects_v2(Bucket="pack")["Contents"]]
    assert [key for key in listed if key.startswith("out/part")] == [
        f"out/part-{p:05d}.parquet" for p in range(5)
    ]
    assert {key.split("/")[0] for key in listed} == {"in", "out"}  # nothing beside it is left
    page = s3.client().get_object(Bucket="pack", Key="out/data.html")["Body"].read().decode()
    assert "24 images" in page
    assert page.count("data:image/") == 2

    use_aws(monkeypatch, s3.env)
    read = read_as_told(output)
    labels = dict(zip(names, kinds, strict=True))
    assert sorted(image.key for image in read) == sorted(names)
    assert all((image.data, image.label) == (files[image.key], labels[image.key]) for image in read)
    job.main(command)  # finished: nothing to start
