"""A write that is repeated for minutes is made only if its directory is still this run's."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as boto
from faults import FaultProxy
from leases import record, write

from dinoray.pipeline.ray_private.train import SNAPSHOT
from dinoray.pipeline.storage import lease_keeper
from dinoray.pipeline.storage.files import Directory, MissingObject, Unreachable, filesystem
from dinoray.pipeline.storage.lease import LostLeaseError
from dinoray.pipeline.storage.lease_keeper import Fence
from dinoray.pipeline.storage.retry import guarded, retrying

at_once = partial(retrying, sleep=lambda _: None)


def failing(*errors: Exception) -> Callable[[], str]:
    """An operation whose attempts fail with these errors before one succeeds."""
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def lost() -> None:
    raise LostLeaseError("it was taken over")


def test_a_guard_is_called_before_each_attempt() -> None:
    calls: list[None] = []
    operation = failing(TimeoutError(), TimeoutError())
    assert guarded(at_once, lambda: calls.append(None))(operation, what="file") == "done"
    assert len(calls) == 3


def test_what_a_guard_raises_at_a_later_attempt_ends_the_write() -> None:
    guard = failing()
    with pytest.raises(LostLeaseError):
        guarded(at_once, lambda: guard() if len(made) < 1 else lost())(
            partial(failed_attempt, made := []), what="file"
        )
    assert made == [1]


def failed_attempt(made: list[int]) -> None:
    made.append(1)
    raise TimeoutError


def test_a_guard_that_gets_no_answer_is_a_failed_attempt() -> None:
    """The storage may answer again at the moment in which the file would be written."""
    unreachable = Unreachable("lease")
    unreachable.__cause__ = TimeoutError()
    made: list[int] = []
    guard = failing(unreachable)
    assert guarded(at_once, guard)(lambda: made.append(1), what="file") is None
    assert made == [1]
    for_ever = failing(*[unreachable] * 9)
    with pytest.raises(Unreachable, match="failed after 5 attempts"):
        guarded(at_once, for_ever)(lambda: made.append(1), what="file")
    assert made == [1]


@pytest.mark.parametrize("patience", [None, 5.0])
def test_files_of_a_folder_are_not_changed_against_the_guard(patience: float | None, tmp_path: Path) -> None:
    folder = Directory(str(tmp_path)).patient(patience)
    folder.write("file", b"old")
    ours = folder.guarded(lost)
    for change in (
        lambda: ours.write("file", b"new"),
        lambda: ours.write_pieces("file", lambda sink: sink.write(b"new"), num_bytes=3),
        lambda: ours.delete("file"),
        lambda: ours.child("below").write("file", b"new"),
    ):
        with pytest.raises(LostLeaseError):
            change()
    assert ours.read("file") == b"old"
    assert ours.list() == ["file"]


class Silent:
    """A store that does not answer."""

    def perform(self, request: object, *, attempts: int) -> Any:
        return retrying(failing(*[boto.ReadTimeoutError(endpoint_url="", error="")] * 9), what="", attempts=1)


def test_a_fence_that_gets_no_answer_raises_only_if_it_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "lease_store", lambda _: Silent())
    fence = Fence(Directory("/nowhere"), "a")
    fence.check()
    with pytest.raises(Unreachable):
        fence.check(is_strict=True)


@pytest.mark.s3
def test_a_write_that_s3_refused_is_not_repeated_once_the_run_was_taken_over(
    proxy: FaultProxy, bucket: str
) -> None:
    run = Directory(f"s3://{bucket}/run")
    write(run, record("a"))
    proxy.fail("slow_down", pattern=r"^PUT .*/file")

    def guard() -> None:
        Fence(run, "a").check(is_strict=True)
        write(run, record("b"))  # it is taken over while the request is under way

    with pytest.raises(LostLeaseError):
        run.patient(60.0).guarded(guard).write("file", b"1")
    with pytest.raises(MissingObject):
        run.read("file")
    assert proxy.count(r"^PUT .*/file") == 1


@pytest.mark.s3
def test_the_list_of_checkpoints_is_not_written_once_the_run_was_taken_over(bucket: str) -> None:
    """Ray Train's controller does not look at the lease."""
    run = Directory(f"s3://{bucket}/run")
    guard = partial(Fence(run, "a").check, is_strict=True)
    storage, path = filesystem(run.uri, give_up_after_seconds=60.0, guard=guard)
    storage = pickle.loads(pickle.dumps(storage))

    def commit(data: bytes) -> None:
        with storage.open_output_stream(f"{path}/{SNAPSHOT}") as stream:
            stream.write(data)

    write(run, record("a"))
    commit(b"ours")
    run.write("step_00000001/file", b"1")
    write(run, record("b"))
    with pytest.raises(LostLeaseError):
        commit(b"theirs")
    with pytest.raises(LostLeaseError):
        storage.delete_dir(f"{path}/step_00000001")
    assert run.read(SNAPSHOT) == b"ours"
    assert run.child("step_00000001").list() == ["file"]
