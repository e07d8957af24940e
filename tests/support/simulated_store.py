"""An object store in memory for simulated processes: requests take time, and may be late, refused or lost.

In place of botocore's S3 client: what the modules under test do with its answers and errors is their own. Two rules are
assumed of a real store, too. A request for the lease may be carried out at any time after it was sent. Any other one is
carried out within `LATE_SECONDS` or never: a killed process may have sent it, and workers need longer to start.
"""

import hashlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from botocore import exceptions as boto
from lease_simulation import TIMEOUT_SECONDS, Fate
from simulated_time import Killed, Process, Time

LATE_SECONDS = 8.0
"""Longest time until a request that is not for the lease is carried out."""
_TORN_SECONDS = 0.5
"""For which a file that is written in place is there in part."""


class Action(NamedTuple):
    """A request that is sent, or carried out (its answer is not there yet), or half carried out."""

    process: Process
    operation: str
    """put, get, head, list or delete."""
    key: str
    phase: str
    """sent, torn or done."""


class SimulatedStore:
    """Objects by key, and what becomes of each request."""

    def __init__(self, time: Time, fate: Callable[[Process, str, str], Fate]) -> None:
        """`fate(process, operation, key)` of each request."""
        self.time, self._fate = time, fate
        self.objects: dict[str, bytes] = {}
        self.is_torn: Callable[[str], bool] = lambda key: False
        """Whether an object is written in place, as a file of a disk is."""
        self.is_refused: Callable[[Process, str], bool] = lambda process, operation: False
        self.watchers: list[Callable[[Action], object]] = []
        """Called for each action."""

    def client(self, *_: object, **__: object) -> "SimulatedStore":
        """Return the client of the current process."""
        return self

    def put_object(
        self,
        *,
        Bucket: str,
        Key: str,
        Body: bytes,
        IfMatch: str | None = None,
        IfNoneMatch: str | None = None,
    ) -> dict[str, Any]:
        def put() -> dict[str, Any]:
            there = self.objects.get(Key)
            wrong = (there is not None) if IfNoneMatch else IfMatch is not None and IfMatch != _etag(there)
            if wrong:
                raise _error("PutObject", "PreconditionFailed", 412)
            self.objects[Key] = bytes(Body)
            return {"ETag": _etag(Body)}

        return self._request("put", Key, put, torn=bytes(Body) if self.is_torn(Key) else None)

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        def get() -> dict[str, Any]:
            data = self._there(Key, "GetObject")
            return {"ETag": _etag(data), "Body": io.BytesIO(data), "ContentLength": len(data)}

        return self._request("get", Key, get)

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        return self._request("head", Key, lambda: {"ContentLength": len(self._there(Key, "HeadObject"))})

    def delete_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        return self._request("delete", Key, lambda: {"Gone": self.objects.pop(Key, b"")})

    def list_objects_v2(self, *, Bucket: str, Prefix: str, Delimiter: str) -> dict[str, Any]:
        def find() -> dict[str, Any]:
            rests = {key: key[len(Prefix) :] for key in self.objects if key.startswith(Prefix)}
            files = [{"Key": key, "Size": 1} for key, rest in rests.items() if Delimiter not in rest]
            folders = {rest.partition(Delimiter)[0] for rest in rests.values() if Delimiter in rest}
            return {
                "Contents": files,
                "CommonPrefixes": [{"Prefix": f"{Prefix}{one}/"} for one in sorted(folders)],
            }

        return self._request("list", Prefix, find)

    def _there(self, key: str, operation: str) -> bytes:
        if key not in self.objects:
            raise _error(operation, "NoSuchKey", 404)
        return self.objects[key]

    def _request(
        self, operation: str, key: str, carry_out: Callable[[], dict[str, Any]], *, torn: bytes | None = None
    ) -> dict[str, Any]:
        """Send a request; return its answer or raise its error, in the current process."""
        time, process = self.time, self.time.current.process
        if not process.is_alive:
            raise Killed
        fate = self._fate(process, operation, key)
        self._note(Action(process, operation, key, "sent"))

        def arrange(wake: Callable[..., None]) -> None:
            def arrive() -> None:
                if self.is_refused(process, operation):
                    wake(_error(operation, "SlowDown", 503), 0.1)
                elif torn is not None and process.is_alive:
                    self.objects[key] = torn[: len(torn) // 2]
                    self._note(Action(process, operation, key, "torn"))
                    time.at(time.now + _TORN_SECONDS, finish)
                else:
                    finish()

            def finish() -> None:
                if torn is not None and not process.is_alive:
                    return  # a process writes its file itself: what is not written when it is killed never is
                try:
                    answer: Any = carry_out()
                except boto.ClientError as refusal:
                    answer = refusal
                self._note(Action(process, operation, key, "done"))
                if not fate.is_answer_lost:
                    wake(answer, fate.answer_seconds)

            if not fate.is_lost:
                time.at(time.now + fate.request_seconds, arrive)
            wake(None, TIMEOUT_SECONDS)

        answer = time.block(arrange)
        if answer is None:
            raise boto.ReadTimeoutError(endpoint_url=key, error="simulated")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _note(self, action: Action) -> None:
        for watch in self.watchers:
            watch(action)


def _etag(data: bytes | None) -> str:
    return "" if data is None else f'"{hashlib.md5(data).hexdigest()}"'


def _error(operation: str, code: str, status: int) -> boto.ClientError:
    return boto.ClientError(
        {"Error": {"Code": code, "Message": "simulated"}, "ResponseMetadata": {"HTTPStatusCode": status}},
        operation,
    )
