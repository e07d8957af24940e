"""Row groups of any size: those that are too large for memory come from a file."""

import os
import random
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import parquet, write_all
from sources import fetch_all, source_of

from dinoray.models.errors import ResourceError
from dinoray.pipeline.data.parquet import spill
from dinoray.pipeline.data.reading.source import Source


def notes_of(source: Source) -> str:
    return "; ".join(source.manifest.notes)


def test_row_groups_beyond_the_limit_come_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [random.Random(i).randbytes(3000) for i in range(300)]
    images = pa.array([{"bytes": cell, "path": ""} for cell in cells])
    labels = pa.array([str(i % 7) for i in range(300)])
    table = {"image": images, "label": labels}
    write_all(tmp_path / "data", {"x.parquet": parquet(table, row_group_size=300, compression="none")})
    monkeypatch.setattr(spill, "LEAST_BYTES", 100_000)
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path))
    source = source_of(str(tmp_path / "data"), row_group_cache_bytes=0)
    assert "are read through a file in the folder for temporary files; `dinoray pack" in notes_of(source)
    before = pa.total_allocated_bytes()
    fetched = fetch_all(source)
    assert [(one.data, one.label) for one in fetched] == [(cell, str(i % 7)) for i, cell in enumerate(cells)]
    assert pa.total_allocated_bytes() - before < 200_000
    assert os.listdir(tmp_path) == ["data"]


def test_a_full_disk_for_temporary_files_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path, {"x.parquet": parquet({"image": [bytes(5000)] * 100}, row_group_size=100)})
    source = source_of(str(tmp_path), row_group_cache_bytes=0)
    monkeypatch.setattr(spill, "LEAST_BYTES", 100_000)
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(
        ResourceError, match=r"set TMPDIR to a larger disk, or raise data\.row_group_cache_bytes"
    ):
        source.fetch([0])


def test_a_dictionary_counts_as_the_rows_that_it_stands_for(tmp_path: Path) -> None:
    image = random.Random(0).randbytes(20_000)
    write_all(tmp_path, {"x.parquet": parquet({"image": [image] * 500}, row_group_size=500)})
    source = source_of(str(tmp_path))
    [size] = source.manifest.group_bytes.tolist()
    assert 0.9 * 500 * len(image) < size < 1.1 * 500 * len(image)
    assert {fetched.data for fetched in source.fetch([0, 499])} == {image}


@pytest.mark.nightly
def test_a_struct_of_more_than_two_gigabytes_is_read_in_little_memory(tmp_path: Path) -> None:
    block = random.Random(0).randbytes(1 << 20)
    images = pa.array([{"bytes": block[i:] + block[:i], "path": ""} for i in range(50)])
    table = pa.table({"image": pa.chunked_array([images] * 46)})
    options = {
        "row_group_size": 10_000,
        "compression": "none",
        "use_dictionary": False,
        "write_statistics": False,
    }
    pq.write_table(table, tmp_path / "x.parquet", **options)
    del table, images
    pa.default_memory_pool().release_unused()
    source, before = source_of(str(tmp_path)), psutil.Process().memory_full_info().uss
    fetched = source.fetch([0, 1, 2299])
    assert [one.data for one in fetched] == [block[i:] + block[:i] for i in (0, 1, 49)]
    assert psutil.Process().memory_full_info().uss - before < 1 << 30
