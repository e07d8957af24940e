"""What a run says about its images before it starts."""

from pathlib import Path

from samples import parquet, write_all

from dinoray.jobs.cli.config import load_config
from dinoray.jobs.runs.data_lines import describe_data, reading_warnings
from dinoray.pipeline.data.manifest import DataConfig, build_manifest
from dinoray.pipeline.data.source import Source


def line(folder: Path) -> str:
    config = DataConfig(path=str(folder))
    return describe_data(Source(config, build_manifest(config)))


def test_damaged_shards_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    good = parquet({"image": [b"1"], "label": [3]})
    write_all(tmp_path, {f"{i:02d}.parquet": b"x" if i % 2 else good for i in range(3)})
    assert line(tmp_path).endswith("; 1 damaged Parquet file left out: 01.parquet)")
    assert "label" in line(tmp_path)  # as without the damage

    write_all(tmp_path, {f"{i:02d}.parquet": b"x" if i % 2 else good for i in range(3, 15)})
    names = "01.parquet, 03.parquet, 05.parquet, 07.parquet, 09.parquet and 2 more"
    assert line(tmp_path).endswith(f"; 7 damaged Parquet files left out: {names})")


def test_row_groups_that_many_actors_read_are_warned_of_with_the_remedy(tmp_path: Path) -> None:
    write_all(tmp_path, {"a.parquet": parquet({"image": [b"x" * 100] * 4000}, row_group_size=100)})
    config = load_config(
        "photos_small",
        None,
        [f"data.path={tmp_path}", "train.global_batch_size=64", "resources.train_workers=1"],
    )
    images = Source(config.data, build_manifest(config.data))
    (warning,) = reading_warnings(images, config, most_actors=16)
    assert warning.startswith("16 augment actors read each row group")
    assert f"dinoray pack {tmp_path} --out FOLDER" in warning
    assert reading_warnings(images, config, most_actors=1) == []
