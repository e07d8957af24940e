"""An S3 object that is written piece by piece, in parts: large files of checkpoints.

Each part is one request, repeated by itself, so that an outage does not begin a large file anew. The object appears
once it is closed. No Ray here.
"""

import contextlib
from functools import partial
from typing import Any

from botocore import exceptions as boto

from dinoray.pipeline.storage.addresses import split_s3_uri
from dinoray.pipeline.storage.retry import Retry
from dinoray.pipeline.storage.s3 import s3_client

PART_BYTES = 64 << 20
"""Size of a part; S3 takes at most 10,000 of them, so objects of up to 640 GiB."""


class ObjectWriter:
    """Write the object at `uri`; `retry` repeats each request. `close` or `abort` it."""

    def __init__(self, uri: str, retry: Retry) -> None:
        self._uri, self._retry = uri, retry
        self._bucket, self._key = split_s3_uri(uri)
        self._buffer = bytearray()
        self._num_bytes = 0
        self._upload: str | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes) -> int:
        """Append `data`. Raises DataError."""
        self._buffer += data
        self._num_bytes += len(data)
        while len(self._buffer) > PART_BYTES:
            self._send_part(bytes(memoryview(self._buffer)[:PART_BYTES]))
            del self._buffer[:PART_BYTES]
        return len(data)

    def flush(self) -> None:
        """Do nothing: `close` sends what is left."""

    def close(self) -> None:
        """Send what is left; the object is complete then. Raises DataError."""
        if self._upload is None:
            self._request("put_object", Body=bytes(self._buffer))
            return
        self._send_part(bytes(self._buffer))
        self._retry(self._complete, what=self._uri)

    def abort(self) -> None:
        """Remove the parts that were sent, if the store answers."""
        if self._upload is not None:
            with contextlib.suppress(boto.ClientError, boto.BotoCoreError):
                s3_client().abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._upload)

    def _send_part(self, data: bytes) -> None:
        if self._upload is None:
            self._upload = self._request("create_multipart_upload")["UploadId"]
        number = len(self._parts) + 1
        answer = self._request("upload_part", PartNumber=number, UploadId=self._upload, Body=data)
        # The store compares the parts with their checksums, where it has returned some.
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum")}
        checksums.pop("ChecksumType", None)
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})

    def _complete(self) -> None:
        try:
            s3_client().complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload,
                MultipartUpload={"Parts": self._parts},
            )
        except boto.ClientError as error:
            # So it ends too if an earlier attempt has completed it, and its answer was lost.
            if error.response.get("Error", {}).get("Code") != "NoSuchUpload" or not self._is_there():
                raise

    def _is_there(self) -> bool:
        head = s3_client().head_object(Bucket=self._bucket, Key=self._key)
        return int(head["ContentLength"]) == self._num_bytes

    def _request(self, name: str, **arguments: Any) -> Any:
        send = getattr(s3_client(), name)
        return self._retry(partial(send, Bucket=self._bucket, Key=self._key, **arguments), what=self._uri)
