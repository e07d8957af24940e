"""Writes that wait: on a disk that is full, and for a store that refuses them; what is reported of it."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FaultProxy
from small_disk import SmallDisk, small_disk
from test_waiting import Clock

from dinoray.models.errors import DataError
from dinoray.pipeline.ray_private.train import SNAPSHOT
from dinoray.pipeline.storage import unsaved, waiting
from dinoray.pipeline.storage.files import Directory, Unreachable, filesystem
from dinoray.pipeline.storage.local_files import append_to_file
from dinoray.pipeline.storage.unsaved import UnsavedWatch

FULL = Path("/dev/full")
EVER = 1_000_000


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_SECONDS", 0.1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The lines that are reported of this process."""
    found: list[tuple[str, bool]] = []
    watch = UnsavedWatch()
    watch.report = lambda text, is_over: found.append((text, is_over))
    monkeypatch.setattr(unsaved, "UNSAVED", watch)
    return found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 256 << 10) as mounted:
        yield mounted


def watch_with(clock: Clock) -> tuple[UnsavedWatch, list[str]]:
    lines: list[str] = []
    watch = UnsavedWatch(clock)
    watch.report = lambda text, _: lines.append(text)
    return watch, lines


# What is reported


def test_one_line_stands_for_all_files_and_one_for_their_end(clock: Clock) -> None:
    watch, lines = watch_with(clock)
    for _ in range(4):
        for file in ("a", "b"):
            watch.failed(file, "no space", 900)
        clock.now += 2
    assert lines == [
        "a could not be written for 6 s (no space): the run continues, and it is tried again, at most 15 minutes"
    ]
    assert watch.unsaved() == {"a": 8, "b": 8}
    watch.answered("a")
    assert (len(lines), list(watch.unsaved())) == (1, ["b"])
    watch.answered("b")
    assert lines[1:] == ["all files are written again, after 8 s"]


def test_a_write_that_soon_succeeds_is_not_reported(clock: Clock) -> None:
    watch, lines = watch_with(clock)
    watch.failed("a", "busy", 900)
    clock.now += 4.9
    watch.failed("a", "busy", 900)
    assert watch.unsaved() == {}
    watch.answered("a")
    assert lines == []


def test_files_that_are_written_do_not_end_the_wait_of_another(clock: Clock) -> None:
    watch, lines = watch_with(clock)
    for _ in range(4):
        watch.failed("large", "no space", 900)
        watch.answered("small")
        clock.now += 2
    assert watch.unsaved() == {"large": 8}
    assert len(lines) == 1


# Disks


def test_a_write_to_a_full_disk_waits_for_space(disk: SmallDisk, lines: list[tuple[str, bool]]) -> None:
    filler, run = disk.fill(), Directory(str(disk.folder)).patient(60)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (run.write("file", bytes(9000)), done.set()))
    thread.start()
    while not unsaved.UNSAVED._since:
        assert not done.is_set()
    filler.unlink()
    thread.join()
    assert run.read("file") == bytes(9000)
    assert [path.name for path in disk.folder.iterdir()] == ["file"]  # no part of an earlier attempt


def test_a_disk_that_stays_full_is_named_with_the_bytes_that_are_needed(disk: SmallDisk) -> None:
    run = Directory(str(disk.folder)).patient(0.2)
    disk.fill().open("r+b").truncate(64 << 10)
    free = (256 << 10) - (64 << 10)
    expected = (
        rf"^{run.uri}/file: no success for 0 s, .* No space left on device: 300,000 bytes are needed, "
        rf"{free:,} are free; free space on its disk, or raise storage.give_up_after_seconds=0.2$"
    )
    with pytest.raises(Unreachable, match=expected) as caught:
        run.write_pieces("file", lambda file: file.write(bytes(300_000)), num_bytes=300_000)
    assert caught.value.exit_code == 3
    assert not run.exists("file")  # so that other files have its space
    disk.resize(1 << 20)
    run.write_pieces("file", lambda file: file.write(bytes(300_000)), num_bytes=300_000)
    assert run.size("file") == 300_000


def test_a_line_that_does_not_fit_is_appended_later_as_a_whole(disk: SmallDisk) -> None:
    path = str(disk.folder / "lines")
    append_to_file(path, b"a" * 5000)
    filler = disk.fill()
    with pytest.raises(OSError, match=r"5,000 bytes are needed, 0 are free"):
        append_to_file(path, b"b" * 5000)
    assert Path(path).read_bytes() == b"a" * 5000
    filler.unlink()
    append_to_file(path, b"c" * 5000)
    assert Path(path).read_bytes() == b"a" * 5000 + b"c" * 5000


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_full_disk_ends_an_impatient_write_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").symlink_to(FULL)
    run = Directory(str(tmp_path))
    with pytest.raises(DataError, match=rf"^{tmp_path}/file: No space left on device: 1 bytes are needed"):
        run.on_disk(lambda: append_to_file(str(tmp_path / "file"), b"a"), path=str(tmp_path / "file"))


def test_what_no_time_mends_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(DataError, match=rf"{tmp_path}/file: Is a directory; check the path"):
        Directory(str(tmp_path)).patient(900).write("file", b"")


# Stores


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["slow_down", "internal_error", "reset"])
def test_a_write_outlives_a_store_that_refuses_it(
    proxy: FaultProxy, bucket: str, fault: str, lines: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unsaved, "NOTED_SECONDS", 0.0)
    run = Directory(f"s3://{bucket}/run").patient(60)
    proxy.fail(fault, pattern="^PUT ", times=8)  # more than the attempts of an impatient write
    run.write("file", b"data")
    assert run.read("file") == b"data"
    assert [is_over for _, is_over in lines] == [False, True]
    assert re.match(rf"s3://{bucket}/run/file could not be written for 0 s \(.*at most 60 s$", lines[0][0])


@pytest.mark.s3
def test_a_store_that_keeps_refusing_writes_is_given_up_on_by_name(proxy: FaultProxy, bucket: str) -> None:
    proxy.fail("slow_down", pattern="^PUT ", times=EVER)
    expected = rf"^s3://{bucket}/run/file: no answer for .*SlowDown.*storage.give_up_after_seconds=0.5$"
    with pytest.raises(Unreachable, match=expected):
        Directory(f"s3://{bucket}/run").patient(0.5).write("file", b"data")


@pytest.mark.s3
def test_rays_list_of_checkpoints_waits_for_the_store(proxy: FaultProxy, bucket: str) -> None:
    """Ray restarts all workers if it cannot be written."""
    proxy.fail("slow_down", pattern="^PUT ", times=8)
    files, path = filesystem(f"s3://{bucket}/run", give_up_after_seconds=60)
    with files.open_output_stream(f"{path}/{SNAPSHOT}") as stream:
        stream.write(b"{}")
    assert Directory(f"s3://{bucket}/run").read(SNAPSHOT) == b"{}"
    proxy.fail("slow_down", pattern="^PUT ", times=EVER)
    files, path = filesystem(f"s3://{bucket}/run", give_up_after_seconds=0.5)
    with pytest.raises(Unreachable, match=SNAPSHOT), files.open_output_stream(f"{path}/{SNAPSHOT}") as stream:
        stream.write(b"{}")
