"""Images that are objects or files of their own: one GET or one read for each. Decodes nothing; no Ray here."""

import posixpath
from collections.abc import Iterator, Sequence

from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.manifests.manifest_file import UNKNOWN_BYTES
from dinoray.pipeline.data.reading.fetched import BAD_IMAGE, BAD_OBJECT, Fetched, Status, expected_etag, whole
from dinoray.pipeline.data.reading.image_reader import Begin, Read
from dinoray.pipeline.storage.addresses import is_s3, split_s3_uri
from dinoray.pipeline.storage.config import Access
from dinoray.pipeline.storage.ranges import read_file
from dinoray.pipeline.storage.retry import MissingObject, Retry
from dinoray.pipeline.storage.s3 import read_object


class Objects:
    """One image per object or file."""

    def __init__(self, config: DataConfig, manifest: Manifest, read: Read, access: Access) -> None:
        self._config, self._manifest, self._waiting, self._access = config, manifest, read, access
        columns = (manifest.table[name] for name in ("key", "size", "etag", "label"))
        self._keys, self._sizes, self._etags, self._labels = columns
        self.num_images = manifest.num_images
        self.cache = None
        self._read = self._read_s3 if is_s3(manifest.root) else self._read_file

    def key(self, index: int) -> str:
        return str(self._keys[index].as_py())

    def arrivals(self, indices: Sequence[int], begin: Begin) -> Iterator[tuple[int, Fetched]]:
        limit = self._config.max_object_bytes
        listed = (self._sizes[index].as_py() for index in indices)
        sizes = [min(UNKNOWN_BYTES if size is None else size, limit) for size in listed]
        return begin(self._one, indices, sizes)

    def _one(self, index: int) -> Fetched:
        key, label, limit = self.key(index), self._labels[index].as_py(), self._config.max_object_bytes
        size = self._sizes[index].as_py()
        if size is not None and size > limit:
            reason = f"{size} bytes, more than data.max_object_bytes={limit}"
            return Fetched(key, None, label, Status.TOO_LARGE, reason)
        try:
            data = self._waiting(key, lambda retry: self._read(index, limit, retry))
        except BAD_OBJECT as error:
            return Fetched(key, None, label, BAD_IMAGE[type(error)], str(error))
        return whole(key, data, label, limit)

    def _read_s3(self, index: int, limit: int, retry: Retry) -> bytes:
        bucket, _ = split_s3_uri(self._manifest.root)
        key = self.key(index)
        if self._manifest.uri(key) == key:
            bucket, key = split_s3_uri(key)
        etag = expected_etag(self._config, self._etags[index].as_py())
        return read_object(bucket, key, etag=etag, max_bytes=limit, retry=retry, access=self._access)

    def _read_file(self, index: int, limit: int, retry: Retry) -> bytes:
        key, listed = self.key(index), self._sizes[index].as_py()
        path = self._manifest.uri(key)
        if posixpath.isabs(key) or ".." in key.split("/"):
            raise MissingObject(f"{key!r} leads out of {self._manifest.root}")
        listed_bytes = listed if self._config.if_overwritten == "bad" else None
        return read_file(path, listed_bytes=listed_bytes, max_bytes=limit, retry=retry)
