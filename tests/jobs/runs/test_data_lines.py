"""What a run says about its images before it starts."""

import random
from pathlib import Path

from samples import parquet, write_all

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.runs.data_lines import data_lines, describe_reading
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.reading.source import Source


def line(folder: Path) -> str:
    config = DataConfig(path=str(folder))
    return "\n".join(data_lines(Source(config, build_manifest(config))))


def test_damaged_shards_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    good = parquet({"image": [b"1"], "label": [3]})
    write_all(tmp_path, {f"{i:02d}.parquet": b"x" if i % 2 else good for i in range(3)})
    assert line(tmp_path).endswith("; 1 unreadable Parquet file left out: 01.parquet)")
    assert "label" in line(tmp_path)  # as without the damage

    write_all(tmp_path, {f"{i:02d}.parquet": b"x" if i % 2 else good for i in range(3, 15)})
    names = "01.parquet, 03.parquet, 05.parquet, 07.parquet, 09.parquet and 2 more"
    assert line(tmp_path).endswith(f"; 7 unreadable Parquet files left out: {names})")


def test_how_parquet_of_others_is_shuffled_and_read_is_said_with_a_remedy(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
        images = [random.Random(f"{name}{row}").randbytes(100) for row in range(1000)]
        write_all(tmp_path / name, {"a.parquet": parquet({"image": images}, row_group_size=100)})
    settings = [f"data.path={tmp_path}", "train.global_batch_size=64", "resources.train_workers=1"]

    def line_of(*more: str) -> str:
        config = load_config("photos_small", None, [*settings, *more])
        (found,) = describe_reading(Source(config.data, build_manifest(config.data)), config, most_actors=16)
        return found

    assert line_of("data.label_from_parent=true") == (
        "reading: windows of 4,000 images (0.43 MB), shuffled; a batch of 64 is from up to 40 row groups, 4 of 4 class "
        "folders; each byte is read 1.01 times"
    )
    plain = line_of("data.label_from_parent=false", "data.row_group_cache_bytes=40000")
    assert (
        "a batch of 64 is from up to 3 row groups, about 21.3 neighbours of each; each byte is read 1."
        in plain
    )
    assert plain.endswith(
        f"`dinoray pack {tmp_path} --out FOLDER` writes Parquet whose rows are shuffled further"
    )
    assert "pack" not in line_of("data.row_group_cache_bytes=200000")


def test_of_images_that_need_no_windows_nothing_is_said(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.jpg": b"x"})
    config = load_config("photos_small", None, [f"data.path={tmp_path}"])
    images = Source(config.data, build_manifest(config.data))
    assert describe_reading(images, config, most_actors=16) == []
