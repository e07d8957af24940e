"""The S3 clients of a process, and the basic reads: an object, a range, a listing.

Stands between botocore and the rest of pipeline/. Credentials, region and endpoint come only from the AWS
default chain (environment, profile, role; AWS_ENDPOINT_URL included), so this code stores no secret. Every
request goes through `retrying`. No images, no run directories and no Ray here.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import botocore
import botocore.exceptions
import botocore.session
from botocore.config import Config
from botocore.httpchecksum import StreamingChecksumBody

from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.pipeline.storage import pages
from dinoray.pipeline.storage.bodies import read_body
from dinoray.pipeline.storage.checks import NO_CHECKSUM, UNCHECKED, is_its_md5
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.etags import is_listed_so
from dinoray.pipeline.storage.positions import Positioned
from dinoray.pipeline.storage.remedies import ACCESS, OR_ANONYMOUS, SET_CREDENTIALS
from dinoray.pipeline.storage.retry import (
    LIST_AGAIN,
    ChangedObject,
    ObjectTooLarge,
    Retry,
    retrying,
)

CONNECT_SECONDS = 5.0
"""Time limit to open a connection; after it the attempt fails and is retried."""
READ_SECONDS = 20.0
"""Longest pause within a response; after it the request fails and is retried. bodies.py bounds a body as a whole."""
MAX_CONNECTIONS = 512
"""Largest number of open connections; at least the number of requests that a source may have in flight."""

_clients: dict[tuple[Any, ...], dict[tuple[Access, float | None], tuple[Any, Any]]] = {}
"""The AWS_* variables, the latest only -> access and time limit -> client and credentials."""
_clients_lock = threading.Lock()


def _forget_clients() -> None:
    """Drop the clients in a forked child: it must not share sockets, and the lock may be held for ever."""
    global _clients_lock
    _clients_lock = threading.Lock()
    _clients.clear()


os.register_at_fork(after_in_child=_forget_clients)


def s3_client(access: Access = SIGNED, *, read_seconds: float | None = None) -> Any:
    """Return this process's S3 client for `access`: one for all threads, anew after a fork, or a change of AWS_* or
    of a file of credentials.

    `read_seconds`, if it is not READ_SECONDS. botocore's own retries are off (`retrying` is the only policy).
    botocore itself chooses path-style addresses for a custom endpoint. Raises DataError without credentials,
    ConfigError for an unusable endpoint.
    """
    return _client_and_credentials(access, read_seconds)[0]


def s3_keys() -> tuple[str, str, str | None]:
    """Return (access key, secret key, session token or None) of `s3_client`'s requests, renewed if they soon expire.

    Raises DataError where that fails. They are for pyarrow alone: never log, pickle or send them.
    """
    keys = retrying(_client_and_credentials()[1].get_frozen_credentials, what="AWS credentials")
    return keys.access_key, keys.secret_key, keys.token


def _client_and_credentials(access: Access = SIGNED, read_seconds: float | None = None) -> tuple[Any, Any]:
    environment = (
        *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")),
        *map(_version_of, _KEY_FILES.items()),
    )
    with _clients_lock:
        if environment not in _clients:
            _clients.clear()
            _clients[environment] = {}
        made = _clients[environment]
        if (access, read_seconds) not in made:
            made[access, read_seconds] = _new_client(access, read_seconds)
        return made[access, read_seconds]


_KEY_FILES = {
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
    "AWS_CONFIG_FILE": "~/.aws/config",
}
"""Files from which botocore reads keys once for each session: the variable that names a file, and where it is else."""


def _version_of(file: tuple[str, str]) -> tuple[int, int]:
    """Return what differs once a file of keys is written again; zeros if there is none."""
    variable, default = file
    try:
        found = os.stat(os.path.expanduser(os.environ.get(variable, default)))
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _new_client(access: Access, read_seconds: float | None) -> tuple[Any, Any]:
    """Return a client, and botocore's credentials that it signs with, None for an anonymous client."""
    session = botocore.session.Session()
    try:
        if session.get_config_variable("metadata_service_num_attempts") == 1:
            # The metadata service of a node throttles many actors that start at once. botocore makes one
            # attempt only and would then report missing credentials.
            session.set_config_variable("metadata_service_num_attempts", 3)
        # botocore reads AWS_DEFAULT_REGION alone, and without a region takes this one for S3, but none for a role.
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        session.set_config_variable("region", region or "us-east-1")
        # The search for credentials may take seconds: an anonymous client has none.
        credentials = None if access.anonymous else session.get_credentials()
        if credentials is None and not access.anonymous:
            raise DataError(f"no AWS credentials found; {SET_CREDENTIALS}{OR_ANONYMOUS}")
        config = Config(
            signature_version=botocore.UNSIGNED if access.anonymous else None,
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=CONNECT_SECONDS,
            read_timeout=read_seconds or READ_SECONDS,
            max_pool_connections=MAX_CONNECTIONS,
            tcp_keepalive=True,
        )
        client = session.create_client("s3", config=config)
    except ValueError as error:
        raise ConfigError(f"{one_line(error)}; AWS_ENDPOINT_URL must look like http://host:port") from error
    except botocore.exceptions.BotoCoreError as error:
        remedy = SET_CREDENTIALS + ("" if access.anonymous else OR_ANONYMOUS)
        raise DataError(f"no usable AWS credentials or settings: {one_line(error)}; {remedy}") from error
    client.meta.events.register(pages.EVENT, pages.take_objects)
    client.meta.events.register("after-call.s3", partial(_note_access, access))
    if access.requester_pays:
        client.meta.events.register("before-call.s3", _pay)
    return client, credentials


def _note_access(access: Access, parsed: dict[str, Any], **_: object) -> None:
    """Add the access of a request to its answer: the remedy of an error depends on it."""
    parsed[ACCESS] = access


def _pay(params: dict[str, Any], **_: object) -> None:
    """Add the header of requester pays to a request that is not signed yet."""
    params["headers"]["x-amz-request-payer"] = "requester"


def etag_of(answer: Mapping[str, Any]) -> str:
    """Return the ETag in an answer or a listing, without quotes or a proxy's mark of weakness; "" if there is none."""
    return pages.etag_text(str(answer.get("ETag", "")))


def read_object(
    bucket: str,
    key: str,
    *,
    byte_range: tuple[int, int] | None = None,
    listed_bytes: int | None = None,
    etag: str | None = None,
    max_bytes: int | None = None,
    retry: Retry = retrying,
    access: Access = SIGNED,
) -> bytes:
    """Return the bytes of one object, or its bytes [first, last], both included; `retry` the whole GET.

    Raises MissingObject, Unreachable or another DataError. Before reading the body, raises ObjectTooLarge if its
    length is over `max_bytes`, and ChangedObject if the object no longer has the ETag `etag`, or that of a
    range no longer `listed_bytes` in total. A whole body is compared with the ETag where that is its MD5.
    """
    uri = f"s3://{bucket}/{key}"
    extra = {"Range": f"bytes={byte_range[0]}-{byte_range[1]}"} if byte_range else {}

    seen: set[str] = set()

    def get() -> bytes:
        client = s3_client(access)
        response = client.get_object(Bucket=bucket, Key=key, **extra)
        found = etag_of(response)
        with contextlib.closing(response["Body"]) as body:
            length = response.get("ContentLength")
            if max_bytes is not None and length is not None and length > max_bytes:
                raise ObjectTooLarge(f"{uri} holds {length} bytes, more than {max_bytes}")
            total = response.get("ContentRange", "").rpartition("/")[2]
            if listed_bytes is not None and total.isdigit() and int(total) != listed_bytes:
                raise ChangedObject(f"{uri} has {total} bytes, not {listed_bytes} as listed; {LIST_AGAIN}")
            if etag and found and found != etag and not is_listed_so(client, bucket, key, etag):
                raise ChangedObject(f"{uri} was overwritten after it was listed; {LIST_AGAIN}")
            has_checksum = isinstance(body, StreamingChecksumBody)  # which compares it
            data = read_body(body)
        expected = byte_range[1] - byte_range[0] + 1 if byte_range else length
        if expected is not None and len(data) != expected:
            raise botocore.exceptions.IncompleteReadError(actual_bytes=len(data), expected_bytes=expected)
        if byte_range:
            return data
        if not is_its_md5(data, response, found, seen, bucket=bucket, uri=uri) and not has_checksum:
            UNCHECKED.add(uri, NO_CHECKSUM)
        return data

    return retry(get, what=uri)


def probe_object(bucket: str, key: str, access: Access = SIGNED) -> None:
    """Read one byte of an object in a single attempt. Raises botocore's own errors."""
    response = s3_client(access).get_object(Bucket=bucket, Key=key, Range="bytes=0-0")
    read_body(response["Body"])


def list_page(
    bucket: str,
    prefix: str,
    *,
    delimiter: str | None = None,
    start_after: str | None = None,
    token: str | None = None,
    retry: Retry = retrying,
    access: Access = SIGNED,
) -> pages.Page:
    """Return one page of the keys that start with `prefix`: that after the key `start_after`, or that of `token`.

    With `delimiter`, keys that have one after the prefix are folded into common prefixes.
    """
    parameters = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
    parameters |= {"StartAfter": start_after, "ContinuationToken": token}
    operation = partial(pages.request_page, s3_client(access).list_objects_v2, **parameters)
    return retry(operation, what=f"s3://{bucket}/{prefix}")


def list_pages(bucket: str, prefix: str, *, delimiter: str | None = None) -> Iterator[pages.Page]:
    """Yield the pages of all keys that start with `prefix`, one request after the other."""
    token: str | None = ""
    while token is not None:
        page = list_page(bucket, prefix, delimiter=delimiter, token=token or None)
        yield page
        token = page.token


class ObjectFile(Positioned):
    """One S3 object as a seekable, read-only file for pyarrow: each read is one ranged GET, repeated whole by `retry`.

    `num_bytes` is the listed size, so opening needs no request.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        num_bytes: int,
        *,
        retry: Retry = retrying,
        etag: str | None = None,
        access: Access = SIGNED,
    ) -> None:
        super().__init__(num_bytes)
        self._bucket, self._key, self._retry = bucket, key, retry
        self._etag, self._access = etag, access

    def read(self, size: int | None = -1, /) -> bytes:
        end = self._num_bytes if size is None or size < 0 else min(self._num_bytes, self._position + size)
        if end <= self._position:
            return b""
        data = read_object(
            self._bucket,
            self._key,
            byte_range=(self._position, end - 1),
            listed_bytes=self._num_bytes,
            etag=self._etag,
            retry=self._retry,
            access=self._access,
        )
        self._position = end
        return data
