"""Reads that wait: how long, for what, when an object itself is bad, and what is reported of an outage."""

from collections.abc import Callable

import pytest
from botocore import exceptions as boto
from test_retries import Failing, answer

from dinoray.models.errors import DataError
from dinoray.pipeline.storage import waiting
from dinoray.pipeline.storage.retry import ArchivedObject, DeniedObject, FailingObject, Unreachable
from dinoray.pipeline.storage.waiting import LONE_ANSWERS, LONE_FAILURES, OutageWatch, Patient

WHAT = "s3://some-bucket/some/key.jpg"
SLOW_DOWN, INTERNAL = answer("SlowDown", 503), answer("InternalError", 500)
DENIED, ARCHIVED = answer("AccessDenied", 403), answer("InvalidObjectState", 403)
REFUSED = boto.EndpointConnectionError(endpoint_url="http://x")
EVER = 10_000


class Clock:
    """A clock that only pauses advance."""

    def __init__(self) -> None:
        self.now, self.pauses = 100.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "WATCH", OutageWatch(clock))
    return clock


@pytest.fixture
def lines(clock: Clock) -> list[str]:
    """The lines that are reported."""
    found: list[str] = []
    waiting.report_outages(lambda text, _: found.append(text))
    return found


def patient(clock: Clock, seconds: float, *others: Callable[[], object]) -> Patient:
    return Patient(seconds, others=lambda: others, sleep=clock.sleep, clock=clock, rng=lambda: 1.0)


@pytest.mark.parametrize("error", [SLOW_DOWN, INTERNAL, REFUSED, TimeoutError()], ids=str)
def test_a_read_outlives_an_outage(clock: Clock, error: Exception) -> None:
    assert patient(clock, 900)(Failing(*[error] * 100), what=WHAT) == "done"
    assert clock.pauses == [0.2, 0.4, 0.8, 1.6, 3.2, *[5.0] * 95]


@pytest.mark.parametrize("error", [SLOW_DOWN, INTERNAL, REFUSED], ids=str)
def test_a_read_ends_a_given_time_after_its_first_failure(clock: Clock, error: Exception) -> None:
    operation = Failing(*[error] * EVER)
    with pytest.raises(
        Unreachable, match=rf"^{WHAT}: no answer for 5 minutes, .*AWS_ENDPOINT_URL.*seconds=300"
    ):
        patient(clock, 300)(operation, what=WHAT)
    assert clock.now == 400
    assert operation.calls == len(clock.pauses) + 1


def test_time_before_the_first_failure_does_not_count(clock: Clock) -> None:
    failing = Failing(*[REFUSED] * 8)

    def operation() -> str:
        clock.now += 0 if failing.calls else 1000  # the first request hangs for long
        return failing()

    assert patient(clock, 60)(operation, what=WHAT) == "done"


def test_a_read_that_nobody_awaits_ends(clock: Clock) -> None:
    wanted = iter([True, True, False])
    retry = Patient(900, is_wanted=lambda: next(wanted), sleep=clock.sleep, clock=clock)
    with pytest.raises(Unreachable):
        retry(Failing(*[REFUSED] * EVER), what=WHAT)
    assert len(clock.pauses) == 2


def test_an_object_that_fails_alone_is_bad(clock: Clock) -> None:
    operation, other = Failing(*[INTERNAL] * EVER), Failing()
    with pytest.raises(FailingObject, match=rf"^{WHAT}: all of its last 18 requests failed.*InternalError"):
        patient(clock, 900, other)(operation, what=WHAT)
    assert operation.calls == LONE_FAILURES + LONE_ANSWERS
    assert other.calls == LONE_ANSWERS


@pytest.mark.parametrize("of_other", [SLOW_DOWN, INTERNAL, REFUSED, DENIED], ids=str)
def test_an_object_is_not_bad_while_others_fail_too(clock: Clock, of_other: Exception) -> None:
    others = [Failing(*[of_other] * EVER) for _ in range(4)]
    with pytest.raises(Unreachable):
        patient(clock, 900, *others)(Failing(*[INTERNAL] * EVER), what=WHAT)
    assert all(other.calls > LONE_ANSWERS for other in others)


def test_answers_for_others_count_only_in_a_row(clock: Clock) -> None:
    other = Failing()
    flaky = [REFUSED, *[None] * (LONE_ANSWERS - 1)] * EVER

    def probe() -> str:
        error = flaky.pop(0)
        if error is not None:
            raise error
        return other()

    with pytest.raises(Unreachable):
        patient(clock, 900, probe)(Failing(*[INTERNAL] * EVER), what=WHAT)


@pytest.mark.parametrize("others", [0, 1])
def test_throttling_never_makes_an_object_bad(clock: Clock, others: int) -> None:
    often = [*[INTERNAL] * (LONE_FAILURES + LONE_ANSWERS - 1), SLOW_DOWN]
    with pytest.raises(Unreachable):
        patient(clock, 900, *[Failing()] * others)(Failing(*often * EVER), what=WHAT)


def test_an_object_without_others_to_compare_it_with_waits_for_the_limit(clock: Clock) -> None:
    with pytest.raises(Unreachable):
        patient(clock, 900)(Failing(*[INTERNAL] * EVER), what=WHAT)
    assert clock.now == 1000


def test_a_short_limit_does_not_end_a_run_because_of_one_object(clock: Clock) -> None:
    with pytest.raises(FailingObject):
        patient(clock, 3, Failing())(Failing(*[INTERNAL] * EVER), what=WHAT)
    with pytest.raises(Unreachable):
        patient(clock, 3, Failing())(Failing(*[SLOW_DOWN] * EVER), what=WHAT)
    back = Failing(*[INTERNAL] * 5)  # and succeeds in the last attempt
    assert patient(clock, 3, Failing())(back, what=WHAT) == "done"


@pytest.mark.parametrize(("error", "kind"), [(DENIED, DeniedObject), (ARCHIVED, ArchivedObject)], ids=str)
def test_a_refused_object_is_bad_if_another_can_be_read(
    clock: Clock, error: Exception, kind: type[DataError]
) -> None:
    with pytest.raises(kind, match=WHAT):
        patient(clock, 900, Failing(error), Failing())(Failing(error), what=WHAT)
    assert clock.pauses == []


@pytest.mark.parametrize("error", [DENIED, ARCHIVED], ids=str)
@pytest.mark.parametrize("others", [0, 3])
def test_a_store_that_refuses_all_objects_is_no_property_of_one(
    clock: Clock, error: Exception, others: int
) -> None:
    with pytest.raises(DataError, match=WHAT) as caught:
        patient(clock, 900, *[Failing(error) for _ in range(others)])(Failing(error), what=WHAT)
    assert type(caught.value) is DataError
    assert clock.pauses == []


def test_a_refusal_in_an_outage_is_judged_after_it(clock: Clock) -> None:
    other = Failing(REFUSED, REFUSED)
    with pytest.raises(DeniedObject):
        patient(clock, 900, other)(Failing(DENIED, DENIED, DENIED), what=WHAT)
    assert len(clock.pauses) == 2


def test_expired_credentials_end_a_comparison(clock: Clock) -> None:
    with pytest.raises(DataError, match=r"ExpiredToken.*renew the credentials") as caught:
        patient(clock, 900, Failing(answer("ExpiredToken", 400)))(Failing(DENIED), what=WHAT)
    assert type(caught.value) is DataError


def test_an_outage_is_reported_once_and_its_end_once(clock: Clock, lines: list[str]) -> None:
    for _ in range(2):
        patient(clock, 900)(Failing(*[SLOW_DOWN] * 20), what=WHAT)
    waits, again = lines[::2], lines[1::2]
    assert len(lines) == 4
    assert all(line.startswith(f"storage has not answered for 6 s ({WHAT}: ClientError: ") for line in waits)
    assert all(line.endswith("): waiting, at most 15 minutes") for line in waits)
    assert again == ["storage answers again after 81 s"] * 2


def test_a_short_wait_is_not_reported(clock: Clock, lines: list[str]) -> None:
    patient(clock, 900)(Failing(*[SLOW_DOWN] * 4), what=WHAT)
    assert lines == []


def test_one_slow_read_among_others_is_no_outage(clock: Clock, lines: list[str]) -> None:
    def other_succeeds(seconds: float) -> None:
        clock.sleep(seconds)
        Patient(900)(Failing(), what="another")

    Patient(900, sleep=other_succeeds, clock=clock, rng=lambda: 0.9)(Failing(*[SLOW_DOWN] * 30), what=WHAT)
    assert lines == []
