"""What a run says about its images before it starts."""

from pathlib import Path

from samples import parquet, write_all

from dinoray.jobs.runs.data_lines import describe_data
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
