"""The retry policy by itself: what is tried again, how often, after which pauses, and what ends it at once."""

import errno
import random
import re

import pytest
from botocore import exceptions as boto
from hypothesis import given
from hypothesis import strategies as st

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.files import MissingObject, Unreachable, retrying

WHAT = "s3://some-bucket/some/key.jpg"


def answer(code: str, status: int, operation: str = "GetObject") -> boto.ClientError:
    response = {
        "Error": {"Code": code, "Message": "said\nthe store"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return boto.ClientError(response, operation)  # type: ignore[arg-type]


class Failing:
    """An operation that raises the given errors, one a call, and then succeeds."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


TRANSIENT = [
    answer("SlowDown", 503),
    answer("InternalError", 500),
    answer("503", 503, "HeadObject"),
    answer("TooManyRequests", 429),
    answer("RequestTimeout", 400),
    boto.EndpointConnectionError(endpoint_url="http://x"),
    boto.ConnectTimeoutError(endpoint_url="http://x"),
    boto.ReadTimeoutError(endpoint_url="http://x"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    boto.ResponseStreamingError(error="broken"),
    boto.FlexibleChecksumError(error_msg="crc32"),
    ConnectionResetError("reset"),
    OSError(errno.EIO, "input or output error"),
    OSError(errno.ESTALE, "stale handle"),
    OSError(errno.EMFILE, "too many open files"),
]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "raise the limit of open files (ulimit -n)"),
        (errno.EIO, "check the disk, or the server of"),
    ],
)
def test_a_disk_that_keeps_failing_is_given_up_with_a_remedy_of_its_own(number: int, remedy: str) -> None:
    operation = Failing(*3 * [OSError(number, "again")])
    with pytest.raises(Unreachable, match=rf"^/a/b.jpg: failed after 3 attempts, .*; {re.escape(remedy)}"):
        retrying(operation, what="/a/b.jpg", attempts=3, sleep=lambda seconds: None)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR])
def test_what_a_disk_says_of_one_file_is_raised_as_it_is(number: int) -> None:
    operation = Failing(OSError(number, "no"))
    with pytest.raises(OSError, match="no"):
        retrying(operation, what="/a/b.jpg", sleep=lambda seconds: None)
    assert operation.calls == 1


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: type(error).__name__)
def test_a_passing_trouble_is_tried_again(error: Exception) -> None:
    operation = Failing(error, error)
    assert retrying(operation, what=WHAT, sleep=lambda seconds: None) == "done"
    assert operation.calls == 3


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answer("AccessDenied", 403), ["AccessDenied", "s3:GetObject", "said the store"]),
        (answer("403", 403, "HeadObject"), ["403", "s3:GetObject"]),
        (answer("InvalidAccessKeyId", 403), ["AWS_ACCESS_KEY_ID"]),
        (answer("SignatureDoesNotMatch", 403), ["AWS_SECRET_ACCESS_KEY"]),
        (answer("ExpiredToken", 400), ["ExpiredToken", "renew"]),
        (answer("NoSuchBucket", 404), ["NoSuchBucket", "bucket's name"]),
        (answer("404", 404, "HeadBucket"), ["NoSuchBucket"]),
        (answer("PermanentRedirect", 301), ["AWS_REGION"]),
        (boto.NoCredentialsError(), ["no usable AWS credentials", "AWS_PROFILE"]),
    ],
    ids=str,
)
def test_a_lasting_trouble_ends_it_at_once_and_says_what_to_do(error: Exception, words: list[str]) -> None:
    operation = Failing(error)
    with pytest.raises(DataError) as caught:
        retrying(operation, what=WHAT)
    assert operation.calls == 1
    assert not isinstance(caught.value, MissingObject)
    message = str(caught.value)
    assert message.startswith(WHAT)
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("code", ["NoSuchKey", "404"])
def test_a_missing_object_has_an_error_of_its_own(code: str) -> None:
    with pytest.raises(MissingObject, match=WHAT):
        retrying(Failing(answer(code, 404)), what=WHAT)


def test_a_bug_is_not_disguised_as_trouble_with_storage() -> None:
    with pytest.raises(ZeroDivisionError):
        retrying(lambda: 1 / 0, what=WHAT)


@given(failures=st.integers(0, 8), attempts=st.integers(1, 6))
def test_an_operation_is_called_until_it_succeeds_or_attempts_run_out(failures: int, attempts: int) -> None:
    operation = Failing(*[answer("SlowDown", 503)] * failures)
    pauses: list[float] = []
    if failures < attempts:
        assert retrying(operation, what=WHAT, attempts=attempts, sleep=pauses.append) == "done"
    else:
        with pytest.raises(Unreachable, match=f"{attempts} attempts.*SlowDown"):
            retrying(operation, what=WHAT, attempts=attempts, sleep=pauses.append)
    assert operation.calls == min(failures + 1, attempts)
    assert len(pauses) == operation.calls - 1
    assert all(0 <= pause <= 0.2 * 2**i for i, pause in enumerate(pauses))


def test_pauses_double_up_to_a_limit_and_are_drawn_anew_each_time() -> None:
    pauses: list[float] = []
    retrying(
        Failing(*[TimeoutError()] * 5),
        what=WHAT,
        attempts=6,
        base_seconds=1,
        max_seconds=6,
        rng=iter([1.0, 0.5, 1.0, 0.25, 1.0]).__next__,
        sleep=pauses.append,
    )
    assert pauses == [1.0, 1.0, 4.0, 1.5, 6.0]


def test_the_jitter_leaves_the_global_random_numbers_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    retrying(Failing(TimeoutError()), what=WHAT, sleep=lambda seconds: None)
    assert random.random() == expected
