"""Where the record of a lease is kept: a real S3 server, also one that lacks or ignores conditions, and a folder."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import FaultProxy
from leases import ignored_conditions, record, write

from dinoray.models.errors import DataError
from dinoray.pipeline.storage import lease_store as module
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import Failed, Found, Read, Write, Written
from dinoray.pipeline.storage.lease_store import lease_store


def test_a_record_is_written_only_over_the_one_that_was_read(directory: Directory) -> None:
    store = lease_store(directory)
    assert store.perform(Read()) == Found(None, None)
    first = write(directory, record())
    assert store.perform(Read()) == Found(record(), first)
    assert store.perform(Write(record("b"), None)) is Failed.CONFLICT
    second = write(directory, record(renewals=1))
    assert store.perform(Write(record("b"), first)) is Failed.CONFLICT
    assert store.is_conditional(record(renewals=1))
    assert store.perform(Read()) == Found(record(renewals=1), second)


def test_of_many_that_write_at_once_one_succeeds(directory: Directory) -> None:
    token = None
    for turn in range(2):  # to take it, and to take it over
        start = threading.Barrier(8)

        def attempt(name: str, token: str | None = token, start: threading.Barrier = start) -> object:
            start.wait()
            return lease_store(directory).perform(Write(record(name), token))

        names = [f"{turn}-{i}" for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            replies = dict(zip(names, pool.map(attempt, names), strict=True))
        (winner,) = [name for name, reply in replies.items() if isinstance(reply, Written)]
        assert [reply for name, reply in replies.items() if name != winner] == [Failed.CONFLICT] * 7
        found = lease_store(directory).perform(Read())
        assert isinstance(found, Found)
        assert found.record == record(winner)
        token = found.token


def test_who_was_asleep_for_many_renewals_does_not_write_over_a_folders_record(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    asleep = write(directory, record())
    newest = [write(directory, record(renewals=i)) for i in range(1, 6)][-1]
    assert lease_store(directory).perform(Write(record("b"), asleep)) is Failed.CONFLICT
    assert lease_store(directory).perform(Read()) == Found(record(renewals=5), newest)
    assert directory.list() == ["lease-00000006.json"]


def test_a_folders_record_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(str(tmp_path))
    token = write(directory, record())
    monkeypatch.setattr(
        module.Record, "encode", lambda self: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(DataError, match="No space left"):
        lease_store(directory).perform(Write(record("b"), token))
    assert lease_store(directory).perform(Read()) == Found(record(), token)


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["refuses", "ignores"])
def test_a_store_without_conditions_is_found_out_and_still_used(
    kind: str, proxy: FaultProxy, bucket: str
) -> None:
    store = lease_store(Directory(f"s3://{bucket}/runs/run"))
    for header in ("if-none-match", "if-match") if kind == "refuses" else ():
        proxy.fail("not_implemented", pattern="^PUT ", header=header, times=1000)
    with ignored_conditions() if kind == "ignores" else contextlib.nullcontext():
        reply = store.perform(Write(record(), None))
        assert isinstance(reply, Written)
        assert not store.is_conditional(record())
        assert store.perform(Read()) == Found(record(), reply.token)
        # Not atomic, but who comes later does not write over it.
        assert store.perform(Write(record("b"), None)) is Failed.CONFLICT
        assert isinstance(store.perform(Write(record(renewals=1), reply.token)), Written)
        assert store.perform(Write(record("b"), reply.token)) is Failed.CONFLICT


@pytest.mark.s3
def test_a_bucket_that_does_not_exist_is_named_and_not_taken_for_a_conflict(bucket: str) -> None:
    store = lease_store(Directory(f"s3://no-{bucket}/run"))
    with pytest.raises(DataError, match="check the bucket's name"):
        store.perform(Write(record(), None))
    with pytest.raises(DataError, match="check the bucket's name"):
        store.perform(Read())
