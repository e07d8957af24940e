"""pyarrow's S3 filesystem with botocore's credentials, so that what is written and what is read have the same keys.

Ray's checkpoints and Parquet files need a pyarrow filesystem. pyarrow's own search for keys knows fewer kinds of
profiles (no role of another profile), and does not renew keys that it is given. So each call asks botocore for the
keys, and makes a new S3FileSystem once they differ. The data itself does not pass through Python. Images are not read
by this way, so `storage.anonymous` and `storage.requester_pays` do not concern it. No Ray here.

Ray Train restarts all workers if it cannot write its list of checkpoints, so that file waits for the storage.
"""

import io
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow
import pyarrow.fs

from dinoray.pipeline.ray_private.train import SNAPSHOT
from dinoray.pipeline.storage.retry import Retry, guarded
from dinoray.pipeline.storage.s3 import CONNECT_SECONDS, READ_SECONDS, s3_client, s3_keys
from dinoray.pipeline.storage.unsaved import patient_write


class RenewedS3(pyarrow.fs.FileSystemHandler):
    """The S3 of `options`, arguments of pyarrow's S3FileSystem without keys. A pickle has only these.

    botocore renews keys minutes before they expire; a single file must be written within that time.
    `give_up_after_seconds`: how long Ray Train's list of checkpoints waits for the storage; None: a few attempts.
    `guard`: called before each attempt to write that list, and before a folder is deleted; picklable. What it raises
    ends the write, as in `retry.guarded`: Ray Train knows nothing of the lease of a run.
    """

    def __init__(
        self,
        options: dict[str, Any],
        give_up_after_seconds: float | None = None,
        guard: Callable[[], object] | None = None,
    ) -> None:
        self._options, self._lock = options, threading.Lock()
        self._give_up_after_seconds, self._guard = give_up_after_seconds, guard
        self._keys: tuple[str, str, str | None] | None = None
        self._made: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RenewedS3, (self._options, self._give_up_after_seconds, self._guard)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RenewedS3) and self._options == other._options

    __hash__ = None  # type: ignore[assignment]

    def _s3(self) -> Any:
        keys = s3_keys()
        with self._lock:
            if keys != self._keys:
                access_key, secret_key, session_token = keys
                self._made = pyarrow.fs.S3FileSystem(
                    access_key=access_key,
                    secret_key=secret_key,
                    session_token=session_token,
                    # Ray copies files on the threads that would also upload their parts: many large files at once
                    # would wait for one another for ever (https://github.com/apache/arrow/issues/32372).
                    background_writes=False,
                    connect_timeout=CONNECT_SECONDS,
                    request_timeout=READ_SECONDS,
                    retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=5),
                    **self._options,
                )
                self._keys = keys
            return self._made

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._s3().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._s3().get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._s3().create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        if self._guard is not None:
            self._guard()
        self._s3().delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._s3().delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("this would empty all buckets")

    def delete_file(self, path: str) -> None:
        self._s3().delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._s3().move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._s3().copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._s3().open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> Any:
        return self._s3().open_input_file(path)

    def open_output_stream(self, path: str, metadata: dict[str, str]) -> Any:
        if path.endswith(f"/{SNAPSHOT}") and self._give_up_after_seconds is not None:
            retry: Retry = patient_write(self._give_up_after_seconds)
            retry = retry if self._guard is None else guarded(retry, self._guard)
            return pyarrow.PythonFile(_WaitingObject(path, retry), mode="w")
        return self._s3().open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: dict[str, str]) -> Any:
        raise NotImplementedError(f"{path}: nothing is appended to objects of S3")


class _WaitingObject(io.BytesIO):
    """A small object that is put when it is closed, as soon as the storage takes it."""

    def __init__(self, path: str, retry: Retry) -> None:
        super().__init__()
        self._path, self._retry = path, retry

    def close(self) -> None:
        if self.closed:
            return
        data = self.getvalue()
        super().close()
        bucket, _, key = self._path.partition("/")
        put = partial(s3_client().put_object, Bucket=bucket, Key=key, Body=data)
        self._retry(put, what=f"s3://{self._path}")
