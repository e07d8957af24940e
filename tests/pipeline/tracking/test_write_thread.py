"""Files of a run that are written on a thread: in order, without holding up the caller, and never lost in silence."""

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FaultProxy
from PIL import Image
from run_logs import BLUE, embedding, lines, png_of
from small_disk import SmallDisk, small_disk

from dinoray.models.errors import DataError
from dinoray.pipeline.storage import waiting
from dinoray.pipeline.storage.files import Directory, Unreachable
from dinoray.pipeline.tracking.run_log import MetricsLog
from dinoray.pipeline.tracking.sink import MetricSink
from dinoray.pipeline.tracking.write_thread import WriteThread

EVER = 1_000_000


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_SECONDS", 0.1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 1 << 20) as mounted:
        yield mounted


class Seen(MetricSink):
    """A sink that is not a file."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.is_closed = False

    def log(self, step: int, values: object) -> None:
        self.steps.append(step)

    def close(self, *, failed: bool) -> None:
        self.is_closed = True


def log_to(run: Directory, writes: WriteThread, *others: MetricSink) -> MetricsLog:
    return MetricsLog(run, num_images=20, others=others, tell=lambda _: None, writes=writes)


def test_jobs_run_in_order_and_the_caller_does_not_wait() -> None:
    writes, may_begin, seen = WriteThread(), threading.Event(), list[int]()
    writes.put(may_begin.wait)
    for i in range(100):
        writes.put(lambda i=i: seen.append(i))
    marked = writes.mark()
    assert not seen
    may_begin.set()
    marked.wait()
    assert seen == list(range(100))
    writes.wait()


def test_the_error_of_a_job_is_raised_at_each_later_call_and_later_jobs_are_dropped() -> None:
    writes, seen = WriteThread(), list[int]()

    def fail() -> None:
        raise DataError("full; free space")

    may_begin = threading.Event()
    writes.put(may_begin.wait)
    writes.put(fail)
    writes.put(lambda: seen.append(1))
    writes.put(lambda: seen.append(2), always=True)  # what somebody waits for
    may_begin.set()
    with pytest.raises(DataError, match="full"):
        writes.wait()
    for call in (writes.check, lambda: writes.put(lambda: seen.append(3)), writes.wait):
        with pytest.raises(DataError, match="full"):
            call()
    assert seen == [2]


def test_a_wait_may_have_an_end() -> None:
    writes, may_end = WriteThread(), threading.Event()
    writes.put(may_end.wait)
    writes.wait(0.01)
    may_end.set()
    writes.wait()


@pytest.mark.s3
def test_a_log_is_written_once_the_store_takes_it(proxy: FaultProxy, bucket: str) -> None:
    run, writes, sink, posted = (
        Directory(f"s3://{bucket}/run").patient(60),
        WriteThread(),
        Seen(),
        threading.Event(),
    )
    log = log_to(run, writes, sink)
    writes.wait()
    proxy.fail("slow_down", pattern="^PUT ", times=EVER)
    log.log(1, {"loss": 2.0})
    log.picture("attention", 1, png_of(BLUE))
    log.embedding(1, embedding(1))
    log.add_bad_images([{"position": 3, "key": "a", "status": "corrupt"}])
    log.sync(then=posted.set)
    log.log(2, {"loss": 1.0})
    assert sink.steps == [1, 2]  # what waits for nothing is not held up
    while proxy.count("^PUT ") < 12:  # more than an impatient write would try
        assert not posted.is_set()
    proxy.heal()
    log.close()
    assert posted.is_set()
    assert sink.is_closed
    written = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    assert [line["step"] for line in written] == [1, 2]
    assert json.loads(run.read("quarantine.jsonl"))["key"] == "a"
    assert run.read("attention/step_00000001.png") == png_of(BLUE)
    assert run.exists("tensorboard/run/projector_config.pbtxt")


@pytest.mark.s3
def test_a_log_that_the_store_never_takes_ends_with_its_name(proxy: FaultProxy, bucket: str) -> None:
    writes = WriteThread()
    log = log_to(Directory(f"s3://{bucket}/run").patient(0.5), writes)
    log.log(1, {"loss": 2.0})
    proxy.fail("slow_down", pattern="^PUT ", times=EVER)
    log.sync()
    with pytest.raises(Unreachable, match=rf"s3://{bucket}/run/metrics.jsonl: no answer"):
        writes.wait()
    with pytest.raises(Unreachable, match=r"metrics.jsonl"):
        log.log(2, {"loss": 1.0})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_a_log_on_a_full_disk_is_written_once_there_is_space(disk: SmallDisk) -> None:
    writes, told = WriteThread(), list[str]()
    run = Directory(str(disk.folder)).patient(60)
    log = MetricsLog(run, num_images=20, tell=told.append, writes=writes)
    log.log(1, {"loss": 1.0})
    log.sync()
    writes.wait()
    filler = disk.fill()
    for step in range(2, 302):  # more than the rest of a page
        log.log(step, {"loss": 1.0})
    log.add_bad_images([{"position": 3, "key": "a", "status": "corrupt", "reason": "r" * 5000}])
    assert not writes.mark().wait(0.5)
    filler.unlink()
    log.close()
    assert [line["step"] for line in lines(disk.folder)] == list(range(1, 302))
    assert [line["key"] for line in lines(disk.folder, "quarantine.jsonl")] == ["a"]
    assert len(told) <= 1  # of TensorBoard's curves, which may have a gap


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_events_on_a_full_disk_are_told_once_and_go_on_later(disk: SmallDisk) -> None:
    told: list[str] = []
    run = Directory(str(disk.folder))
    log = MetricsLog(run, num_images=20, tell=told.append)
    filler, noise = disk.fill(), io.BytesIO()
    Image.effect_noise((99, 99), 99).save(noise, "PNG")
    for _ in range(3):
        for sink in log._files[1:]:  # metrics.jsonl waits for space, and the picture's own file too
            sink.picture("crops", 1, noise.getvalue())
            sink.sync()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    filler.unlink()
    log.sync()
    log.log(2, {"loss": 1.0})
    log.close()
    events = (disk.folder / "tensorboard" / "disk").glob("events.*")
    assert b"train/loss" in b"".join(file.read_bytes() for file in events)


def test_a_log_that_cannot_be_written_ends_with_name_and_bytes(disk: SmallDisk) -> None:
    writes = WriteThread()
    log = MetricsLog(
        Directory(str(disk.folder)).patient(0.2), num_images=20, tell=lambda _: None, writes=writes
    )
    writes.wait()
    disk.fill()
    log.log(1, {"text": "x" * 5000})
    expected = rf"^{disk.folder}/metrics.jsonl: no success for 0 s.*5,\d\d\d bytes are needed, 0 are free; free space"
    with pytest.raises(DataError, match=expected):
        writes.wait()
