"""quarantine.jsonl: each image once, with every epoch in which it was replaced, whatever kills and resumes come."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_logs import lines

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.tracking import bad_image_file
from dinoray.pipeline.tracking.bad_image_file import BadImageFile

NUM_IMAGES = 20


def open_file(folder: Path, *, resume_position: int = 0, told: list[str] | None = None) -> BadImageFile:
    return BadImageFile(
        Directory(str(folder)),
        num_images=NUM_IMAGES,
        resume_position=resume_position,
        staging=folder,
        tell=[].append if told is None else told.append,
    )


def record(position: int, key: str = "", **facts: Any) -> dict[str, Any]:
    return {"position": position, "status": "corrupt", "key": key or f"{position % NUM_IMAGES}.jpg", **facts}


def named(folder: Path) -> list[dict[str, Any]]:
    return lines(folder, "quarantine.jsonl")


def test_an_image_has_one_line_with_its_epochs_and_what_was_found_last(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    file.add([record(3, reason="cut off", bytes=10), record(5, reason="empty", bytes=0)])
    assert [line["epochs"] for line in named(tmp_path)] == [[0], [0]]  # at once
    file.add([record(47, key="3.jpg", reason="missing", bytes=None)])
    file.sync()
    assert named(tmp_path) == [
        {
            "status": "corrupt",
            "key": "3.jpg",
            "reason": "missing",
            "bytes": None,
            "epochs": [0, 2],
            "positions": [3, 47],
        },
        {
            "status": "corrupt",
            "key": "5.jpg",
            "reason": "empty",
            "bytes": 0,
            "epochs": [0],
            "positions": [5],
        },
    ]


def test_positions_to_come_are_dropped(tmp_path: Path) -> None:
    first = open_file(tmp_path)
    first.add([record(position) for position in (3, 23, 39, 40, 55, 59)])
    first.sync()
    open_file(tmp_path, resume_position=40)
    assert [(line["key"], line["epochs"]) for line in named(tmp_path)] == [("3.jpg", [0, 1]), ("19.jpg", [1])]


def test_lines_of_an_earlier_version_are_merged(tmp_path: Path) -> None:
    old = '{"position": 3, "status": "missing", "key": "a"}\n{"position": 23, "status": "missing", "key": "a"}\n'
    (tmp_path / "quarantine.jsonl").write_text(old)
    open_file(tmp_path, resume_position=40)
    assert named(tmp_path) == [{"status": "missing", "key": "a", "epochs": [0, 1], "positions": [3, 23]}]


def test_more_images_than_may_be_named_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_image_file, "_MAX_NAMES", 2)
    told: list[str] = []
    file = open_file(tmp_path, told=told)
    file.add([record(position) for position in (0, 1, 2, 3)])
    file.add([record(20), record(24)])
    file.sync()
    assert [(line["key"], line["epochs"]) for line in named(tmp_path)] == [("0.jpg", [0, 1]), ("1.jpg", [0])]
    assert len(told) == 1
    assert "2 bad images are named" in told[0]


@given(positions=st.sets(st.integers(0, 99)), checkpoints=st.lists(st.integers(0, 99), max_size=4))
def test_kills_and_resumes_leave_what_a_calm_run_leaves(
    tmp_path_factory: pytest.TempPathFactory, positions: set[int], checkpoints: list[int]
) -> None:
    calm, killed = tmp_path_factory.mktemp("calm"), tmp_path_factory.mktemp("killed")
    for folder, stops in ((calm, [100]), (killed, [*sorted(checkpoints), 100])):
        begin = 0
        for stop in stops:
            file = open_file(folder, resume_position=begin)
            file.add([record(position) for position in sorted(positions) if begin <= position < stop])
            file.sync()  # as before each checkpoint
            file.add([record(position) for position in sorted(positions) if stop <= position < stop + 30])
            begin = stop  # killed
    open_file(killed, resume_position=100)
    assert sorted(named(killed), key=str) == sorted(named(calm), key=str)
