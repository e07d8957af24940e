"""benchmarks/checkpoints.py runs to its end, and its rows are what they are called."""

import checkpoints
import pytest


def test_each_row_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.main(["--recipe", "demo", "--rounds", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    found = {row[0].removeprefix("| "): float(row[1].split(" ")[0].replace(",", "")) for row in rows[1:-4]}
    assert len(found) == 10
    assert all(seconds >= 0 for seconds in found.values())
    assert found["held, now: each later copy"] < found["until committed"]


def test_files_without_checksums_are_those_of_a_benchmark_alone() -> None:
    before = checkpoints.checkpoint_files.zlib.crc32(b"a")
    with checkpoints.without_checksums():
        assert checkpoints.checkpoint_files.zlib.crc32(b"a") == 0
    assert checkpoints.checkpoint_files.zlib.crc32(b"a") == before
