"""Leases of run directories for tests: records of drivers elsewhere, and times that are short."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.lease import Found, Holder, Read, Record, Timing, Write, Written
from dinoray.pipeline.storage.lease_store import READ_SECONDS, lease_store
from dinoray.pipeline.storage.s3 import s3_client

SHORT = Timing(term=3.0, margin=0.3, renew=0.3, poll=0.1)
"""A tenth of a lease's usual times."""


def record(name: str = "a", **changes: Any) -> Record:
    """Of a driver on another machine, of which nothing can be known but its renewals."""
    elsewhere = Holder(name, f"host-{name}", pid=7, machine="", started="", job="", since=1.7e9)
    return replace(Record(elsewhere), **changes)


def stored(directory: Directory) -> Record | None:
    """The record that is there, once it is written whole; None if there is none."""
    found = lease_store(directory).perform(Read())
    for _ in range(1000):  # its holder may be writing it
        assert isinstance(found, Found)
        if found.record is not None or found.token is None:
            break
        time.sleep(0.001)
        found = lease_store(directory).perform(Read())
    return found.record


def write(directory: Directory, new: Record) -> str:
    """Write a record over whatever is there; return its token."""
    store = lease_store(directory)
    for _ in range(100):  # its holder may renew it in between
        found = store.perform(Read())
        assert isinstance(found, Found)
        reply = store.perform(Write(new, found.token))
        if isinstance(reply, Written):
            return reply.token
    raise AssertionError("the record changed each time")


@contextlib.contextmanager
def ignored_conditions() -> Iterator[None]:
    """Requests are sent as if the store had ignored their conditions. The client is one for all tests."""

    def drop(params: dict[str, Any], **_: object) -> None:
        for name in ("If-Match", "If-None-Match"):
            params["headers"].pop(name, None)

    events = s3_client(read_seconds=READ_SECONDS).meta.events
    events.register("before-call.s3.PutObject", drop)
    try:
        yield
    finally:
        events.unregister("before-call.s3.PutObject", drop)
