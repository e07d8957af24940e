"""The files of steps that went wrong are few, and what is not kept is counted."""

import json
import math
from pathlib import Path
from typing import Any

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking.capture_files import CaptureFiles, captured, read_capture


def record(step: int, *, rank: int = 0, reason: str = "non-finite step", **more: Any) -> dict[str, Any]:
    return {"step": step, "rank": rank, "reason": reason, **more}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "capture").iterdir())


def test_a_capture_is_json_whose_numbers_that_json_lacks_are_text(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    assert captured(run) == {}
    assert read_capture(run, 5) == {}
    assert CaptureFiles(run).write(record(5, metrics={"loss": math.nan, "grad_norm": 2.0}))
    assert names(tmp_path) == ["step_00000005.json"]
    assert read_capture(run, 5)["metrics"] == {"loss": "nan", "grad_norm": 2.0}
    assert captured(run) == {5: "non-finite step"}


def test_the_first_steps_are_kept_over_all_starts_and_further_ones_are_counted(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    files = CaptureFiles(run, limit=2)
    assert [files.write(record(step)) for step in (3, 7, 8)] == [True, True, False]
    again = CaptureFiles(run, limit=2)
    assert again.write(record(7, reason="exception"))  # repeated, so it takes the same file
    assert not again.write(record(9, reason="uniform collapse"))
    assert not again.write(record(10))
    assert names(tmp_path) == ["counts.json", "step_00000003.json", "step_00000007.json"]
    counts = json.loads((tmp_path / "capture" / "counts.json").read_text())
    assert counts == {"captured": 2, "more": {"non-finite step": 2, "uniform collapse": 1}, "last_step": 10}
    assert captured(run) == {3: "non-finite step", 7: "exception"}


def test_ranks_have_files_of_their_own_and_the_lowest_is_read(tmp_path: Path) -> None:
    run = Directory(str(tmp_path))
    for rank in (2, 10, 1):
        CaptureFiles(run).write(record(5, rank=rank))
    assert names(tmp_path) == [f"step_00000005_rank_{rank}.json" for rank in (1, 10, 2)]
    assert read_capture(run, 5)["rank"] == 1
