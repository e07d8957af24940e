"""The line about a long listing: what it holds, that short listings show none, and that it is renewed in place."""

import io
import threading
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from samples import parquet, write_all
from terminal import terminal

from dinoray.jobs.cli import progress_line
from dinoray.jobs.cli.progress_line import ProgressLines, describe_progress
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest
from dinoray.pipeline.storage import progress
from dinoray.pipeline.storage.progress import Count, counting, show_progress


def test_the_line_holds_count_rate_and_seconds() -> None:
    count = Count("listing s3://photos", "keys")
    count.add(1_250_000)
    assert describe_progress(count, 25.0) == "listing s3://photos: 1,250,000 keys  50,000 keys/s  25 s"
    count = Count("reading footers", "files", 40)
    assert describe_progress(count, 0.0) == "reading footers: 0 of 40 files  0 files/s  0 s"


def test_the_rate_leaves_out_what_was_kept() -> None:
    count = Count("listing s3://photos", "keys")
    count.add(3000, kept=True)
    count.add(500)
    line = describe_progress(count, 5.0)
    assert line == (
        "listing s3://photos: 3,500 keys  100 keys/s  5 s  3,000 kept of the listing that was interrupted"
    )


@given(st.lists(st.integers(0, 1000), max_size=8))
def test_counts_of_several_threads_are_added_up(numbers: list[int]) -> None:
    count = Count("", "")
    threads = [threading.Thread(target=count.add, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.done == sum(numbers)


def test_a_short_listing_prints_nothing() -> None:
    text = io.StringIO()
    for is_terminal in (False, True):
        lines = ProgressLines(Console(file=text, force_terminal=is_terminal))
        with lines.show(Count("listing", "keys")) as count:
            count.add(5)
    assert text.getvalue() == ""


class _Lines(io.StringIO):
    """Text that tells when some lines have been written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.are_enough, self._number = threading.Event(), number

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.getvalue().count("\n") >= self._number:
            self.are_enough.set()
        return written


def test_without_a_terminal_lines_come_while_the_listing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_line, "_PLAIN_SECONDS", 0.01)
    text, times = _Lines(3), count(0, 30)
    lines = ProgressLines(Console(file=text, width=20), clock=lambda: float(next(times)))
    listed = Count("listing s3://a/long/path/of/a/bucket", "keys")
    listed.add(600)
    with lines.show(listed):
        assert text.are_enough.wait(60)
    first, second = text.getvalue().splitlines()[:2]
    assert first == "listing s3://a/long/path/of/a/bucket: 600 keys  20 keys/s  30 s"
    assert second.endswith("600 keys  10 keys/s  60 s")


PROGRAM = """
import sys
from rich.console import Console
from dinoray.jobs.cli import progress_line
from dinoray.pipeline.storage.progress import counting

progress_line._LIVE_SECONDS = 0.0
progress_line.show_progress_lines()
with counting("listing s3://photos", "keys") as count:
    for line in sys.stdin:
        count.add(int(line))
print("this comes after the listing")
"""
"""Counts the numbers that it reads."""


@pytest.mark.parametrize("columns", [30, 120])
def test_a_terminal_has_one_line_that_is_renewed_and_then_gone(columns: int) -> None:
    with terminal(PROGRAM, columns=columns) as screen:
        screen.send("1000")
        screen.wait_until(lambda lines: "1,000" in "".join(lines))
        screen.send("234")
        lines = screen.wait_until(lambda lines: "1,234" in "".join(lines))
        assert len(lines) == 1
        assert screen.end() == ["this comes after the listing"]


def test_a_manifest_counts_keys_and_then_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Count] = []

    def show(count: Count):  # type: ignore[no-untyped-def]
        seen.append(count)
        return progress._unseen(count)

    monkeypatch.setattr(progress, "_show", show)
    write_all(tmp_path, {f"{i}.parquet": parquet({"image": [b"x"] * 2}) for i in range(3)} | {"a.txt": b""})
    build_manifest(DataConfig(path=str(tmp_path)))
    assert [(count.what, count.unit, count.done, count.total) for count in seen] == [
        (f"listing {tmp_path}", "keys", 4, None),
        (f"reading footers of Parquet at {tmp_path}", "files", 3, 3),
    ]


def test_what_shows_counts_is_set_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_show", progress._show)
    text = io.StringIO()
    lines = ProgressLines(Console(file=text))
    show_progress(lines.show)
    with counting("listing", "keys") as count:
        assert [thread.name for thread in threading.enumerate()].count("progress") == 1
        count.add(1)
    assert [thread.name for thread in threading.enumerate()].count("progress") == 0
