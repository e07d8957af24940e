"""Bodies that trickle end and are read again; bodies that are slow but steady are not cut."""

import random
from collections.abc import Callable

import pytest
from faults import FaultProxy
from hypothesis import given
from hypothesis import strategies as st

from dinoray.pipeline.storage import bodies
from dinoray.pipeline.storage.bodies import PACE_BYTES, PACE_SECONDS, Pace
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.retry import Unreachable, retrying
from dinoray.pipeline.storage.s3 import ObjectFile, probe_object, read_object

LEAST_RATE = PACE_BYTES / PACE_SECONDS
DATA = random.Random(1).randbytes(200_000)
RECEIVES = st.lists(st.tuples(st.floats(0, 90), st.integers(1, 2 * PACE_BYTES)), max_size=60)
"""(seconds since the last receive, bytes that it brings)."""


def cut_at(receives: list[tuple[float, int]]) -> int | None:
    """The receive at which a body ends for want of pace; None if it is read whole."""
    now = 0.0
    pace = Pace(lambda: now)
    for place, (seconds, num_bytes) in enumerate(receives):
        now += seconds
        try:
            pace.received(num_bytes)
        except TimeoutError:
            return place
    return None


@given(RECEIVES)
def test_an_attempt_ends_in_a_time_that_its_size_bounds(receives: list[tuple[float, int]]) -> None:
    kept = receives[: cut_at(receives)]
    assert (
        sum(seconds for seconds, _ in kept)
        <= PACE_SECONDS + sum(size for _, size in kept) / LEAST_RATE + 1e-6
    )


@given(st.lists(st.integers(1, PACE_BYTES // 2), max_size=60), st.floats(2, 100))
def test_a_body_at_twice_the_least_rate_is_never_cut(sizes: list[int], times: float) -> None:
    assert cut_at([(size / LEAST_RATE / times, size) for size in sizes]) is None


@given(st.floats(0.01, 10), st.integers(0, 20))
def test_a_body_that_stalls_late_has_no_credit_of_its_first_bytes(pause: float, pieces: int) -> None:
    receives = [(0.0, PACE_BYTES)] * pieces + [(pause, 1)] * 10_000
    place = cut_at(receives)
    assert place is not None
    assert sum(seconds for seconds, _ in receives[: place + 1]) <= PACE_SECONDS + pause + 1e-6


READS: dict[str, Callable[[str], bytes]] = {
    "whole": lambda bucket: read_object(bucket, "x.bin"),
    "range": lambda bucket: ObjectFile(bucket, "x.bin", len(DATA)).read(),
}


@pytest.mark.s3
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_body_that_drips_is_read_again(
    read: Callable[[str], bytes], proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Directory(f"s3://{bucket}").write("x.bin", DATA)
    # Neither the time limit of the socket nor that of the test ends it: 200,000 bytes would take hours.
    monkeypatch.setattr(bodies, "PACE_SECONDS", 2.0)
    proxy.fail("drip")
    assert read(bucket) == DATA
    assert proxy.count("^GET ") == 2


@pytest.mark.s3
def test_a_body_that_drips_each_time_is_given_up_on_as_too_slow(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Directory(f"s3://{bucket}").write("x.bin", DATA)
    monkeypatch.setattr(bodies, "PACE_SECONDS", 0.2)
    proxy.fail("drip", times=99)
    with pytest.raises(
        Unreachable, match=rf"^s3://{bucket}/x\.bin: failed after .*600000 bytes in 0\.2 s.*network"
    ):
        read_object(bucket, "x.bin", retry=lambda operation, what: retrying(operation, what=what, attempts=2))


@pytest.mark.s3
@pytest.mark.parametrize("share_of_least_rate", [1.1, 0.9])
def test_only_a_body_slower_than_the_least_rate_is_cut_however_large(
    share_of_least_rate: float, proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steady(Pace):
        """A body that comes at a steady rate, by a clock that its bytes advance."""

        def __init__(self) -> None:
            self.now = 0.0
            super().__init__(lambda: self.now)

        def received(self, num_bytes: int) -> None:
            self.now += num_bytes / (share_of_least_rate * LEAST_RATE)
            super().received(num_bytes)

    data = random.Random(2).randbytes(4 * PACE_BYTES)
    Directory(f"s3://{bucket}").write("x.bin", data)
    monkeypatch.setattr(bodies, "Pace", Steady)
    monkeypatch.setattr(bodies, "_RECEIVED_AT_ONCE", PACE_BYTES // 100)
    if share_of_least_rate > 1:
        assert read_object(bucket, "x.bin") == data
        assert proxy.count("^GET ") == 1
    else:
        with pytest.raises(Unreachable, match="2 attempts"):
            read_object(
                bucket, "x.bin", retry=lambda operation, what: retrying(operation, what=what, attempts=2)
            )


@pytest.mark.s3
@pytest.mark.parametrize("size", [0, 1, 100_000, 3_000_000])
def test_a_connection_is_used_again_after_a_body_of_any_size(
    size: int, proxy: FaultProxy, bucket: str
) -> None:
    data = DATA * (size // len(DATA) + 1)
    Directory(f"s3://{bucket}").write("x.bin", data[:size])
    before = proxy.connections
    for _ in range(5):
        assert read_object(bucket, "x.bin") == data[:size]
        if size:
            probe_object(bucket, "x.bin")
    assert proxy.connections == before
