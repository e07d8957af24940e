"""A second request for the same bytes: when it is made, which answer counts, and what becomes of the other."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from faults import FaultProxy
from samples import put_all
from servers import S3Server
from sources import IMAGES, as_shard, fetch_all, source_of

from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.storage import hedging
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.hedging import MAX_SECOND_REQUESTS, hedged
from dinoray.pipeline.storage.s3 import ObjectFile, read_object
from dinoray.pipeline.storage.waiting import Patient

DATA = random.Random(1).randbytes(200_000)
NEVER = 3600.0
SOON = 0.2
READS: dict[str, Callable[[str, Patient], bytes]] = {
    "whole": lambda bucket, retry: read_object(bucket, "x.bin", retry=retry),
    "range": lambda bucket, retry: ObjectFile(bucket, "x.bin", len(DATA), retry=retry).read(),
}


def patient(after_seconds: float) -> Patient:
    return Patient(60, once=partial(hedged, after_seconds=after_seconds))


def until(holds: Callable[[], bool]) -> None:
    """Wait for a condition; the time limit of the test ends it."""
    while not holds():
        time.sleep(0.01)


@pytest.fixture
def no_slots_left_taken() -> Iterator[None]:
    """At its end, all second requests are possible again."""
    yield
    taken = 0
    while taken < MAX_SECOND_REQUESTS and hedging._second_requests.acquire(timeout=120):
        taken += 1
    hedging._second_requests.release(taken)
    assert taken == MAX_SECOND_REQUESTS


@pytest.mark.s3
@pytest.mark.usefixtures("no_slots_left_taken")
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_request_that_hangs_is_overtaken_by_a_second(
    read: Callable[[str, Patient], bytes], proxy: FaultProxy, bucket: str
) -> None:
    Directory(f"s3://{bucket}").write("x.bin", DATA)
    proxy.fail("hang")
    assert read(bucket, patient(SOON)) == DATA
    assert proxy.count("^GET ") == 2
    until(lambda: proxy.in_flight == 1)  # the first still hangs: it was not that which answered


@pytest.mark.s3
@pytest.mark.usefixtures("no_slots_left_taken")
def test_the_connection_of_a_slower_answer_is_closed(proxy: FaultProxy, bucket: str) -> None:
    Directory(f"s3://{bucket}").write("x.bin", DATA)
    proxy.fail("drip")
    assert read_object(bucket, "x.bin", retry=patient(SOON)) == DATA
    until(lambda: not proxy.in_flight)  # 200,000 drips would take hours
    assert proxy.count("^GET ") == 2


@pytest.mark.s3
@pytest.mark.parametrize("retry", [Patient(60), patient(NEVER)], ids=["off", "not slow"])
def test_one_request_is_made_without_need_of_a_second(retry: Patient, proxy: FaultProxy, bucket: str) -> None:
    Directory(f"s3://{bucket}").write("x.bin", DATA)
    proxy.delay_seconds = 2 * SOON
    assert read_object(bucket, "x.bin", retry=retry) == DATA
    assert proxy.count("^GET ") == 1


@pytest.mark.s3
@pytest.mark.usefixtures("no_slots_left_taken")
@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_the_setting_reaches_the_reads_of_images(
    kind: str, proxy: FaultProxy, s3: S3Server, bucket: str
) -> None:
    put_all(s3, bucket, IMAGES if kind == "images" else {"x.parquet": as_shard(IMAGES)})
    listed = source_of(f"s3://{bucket}", **({} if kind == "images" else {"image_column": "jpeg"}))
    calm = fetch_all(listed)
    source = Source(listed.config, listed.manifest, StorageConfig(hedge_after_seconds=SOON))
    proxy.fail("hang", pattern=r"^GET .*\.(jpg|parquet)", times=1)
    assert fetch_all(source) == calm
    until(lambda: proxy.in_flight == 1)  # it still hangs


class Calls:
    """An operation whose calls end when they are told to."""

    def __init__(self, *ends: str | Exception) -> None:
        self.ends, self.gates = ends, [threading.Event() for _ in ends]
        self.made, self._lock = 0, threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            number, self.made = self.made, self.made + 1
        self.gates[number].wait()
        end = self.ends[number]
        if isinstance(end, Exception):
            raise end
        return end


FAILURE, OTHER = TimeoutError("first"), TimeoutError("second")


@pytest.mark.usefixtures("no_slots_left_taken")
@pytest.mark.parametrize(
    ("ends", "order", "expected"),
    [
        (("a", "b"), (0, 1), "a"),
        (("a", "b"), (1, 0), "b"),
        ((FAILURE, "b"), (0, 1), "b"),
        (("a", FAILURE), (1, 0), "a"),
    ],
    ids=str,
)
def test_the_first_answer_counts_and_an_error_only_after_the_other(
    ends: tuple[str | Exception, ...], order: tuple[int, int], expected: str | Exception
) -> None:
    calls, found = Calls(*ends), list[object]()

    def read() -> None:
        try:
            found.append(hedged(calls, after_seconds=0.01))
        except TimeoutError as error:
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: calls.made == 2)
    calls.gates[order[0]].set()
    if isinstance(ends[order[0]], str):
        reader.join()  # without the other
    calls.gates[order[1]].set()
    reader.join()
    assert found == [expected]


@pytest.mark.usefixtures("no_slots_left_taken")
def test_a_read_fails_if_both_requests_do() -> None:
    calls = Calls(FAILURE, OTHER)

    def end_both() -> None:
        until(lambda: calls.made == 2)
        for gate in calls.gates:
            gate.set()

    ender = threading.Thread(target=end_both)
    ender.start()
    with pytest.raises(TimeoutError):
        hedged(calls, after_seconds=0.01)
    ender.join()


def test_an_error_before_the_time_is_up_is_raised_at_once() -> None:
    calls = Calls(FAILURE, "b")
    calls.gates[0].set()
    with pytest.raises(TimeoutError, match="first"):
        hedged(calls, after_seconds=NEVER)
    assert calls.made == 1


class Slots(threading.BoundedSemaphore):
    """A semaphore that lists whether each of those who asked got a place."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.given: list[bool] = []

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        is_given = super().acquire(blocking, timeout)
        self.given.append(is_given)
        return is_given


def test_second_requests_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(MAX_SECOND_REQUESTS)
    monkeypatch.setattr(hedging, "_second_requests", slots)
    reads = 3 * MAX_SECOND_REQUESTS
    calls = Calls(*["a"] * 2 * reads)
    threads = [
        threading.Thread(target=hedged, args=(calls,), kwargs={"after_seconds": 0.01}) for _ in range(reads)
    ]
    for thread in threads:
        thread.start()
    until(lambda: len(slots.given) == reads)  # all are slow, and no call ends before
    assert sum(slots.given) == MAX_SECOND_REQUESTS
    until(lambda: calls.made == reads + MAX_SECOND_REQUESTS)
    for gate in calls.gates:
        gate.set()
    for thread in threads:
        thread.join()
    assert calls.made == reads + MAX_SECOND_REQUESTS
    for _ in range(MAX_SECOND_REQUESTS):  # each place is free again, once the slower call has ended too
        assert slots.acquire(timeout=120)
