"""Images that are members of tar files: a chunk of neighbours is read in one request, and the latest are kept."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dinoray.models.errors import DataError
from dinoray.pipeline.data.manifests.kinds import first_of_groups
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.reading.fetched import BAD_IMAGE, Fetched, Status, expected_etag, whole
from dinoray.pipeline.data.reading.image_reader import Begin, Read, read_groups
from dinoray.pipeline.data.recently_used import RecentlyUsed
from dinoray.pipeline.storage.addresses import is_s3
from dinoray.pipeline.storage.checks import NO_MEMBER_CHECKSUMS, UNCHECKED
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.ranges import read_range


class TarMembers:
    """One image per member of a tar file."""

    def __init__(self, config: DataConfig, manifest: Manifest, read: Read, access: Access = SIGNED) -> None:
        self._config, self._manifest, self._waiting, self._access = config, manifest, read, access
        table = manifest.table
        self.num_images = table.num_rows
        self._firsts = first_of_groups(table)
        self._offsets, self._num_bytes = table["offset"].to_numpy(), table["num_bytes"].to_numpy()
        sizes, num_bytes = manifest.group_sizes, manifest.group_bytes
        assert sizes is not None
        assert num_bytes is not None
        self._sizes_of_groups, self._bytes_of_groups = sizes, num_bytes
        self.cache: RecentlyUsed[int, memoryview] = RecentlyUsed(config.row_group_cache_bytes)

    def key(self, index: int) -> str:
        table = self._manifest.table
        return f"{table['key'][index].as_py()}#{table['member'][index].as_py()}"

    def arrivals(self, indices: Sequence[int], begin: Begin) -> Iterator[tuple[int, Fetched]]:
        groups = np.searchsorted(self._firsts, np.asarray(indices, np.int64), side="right") - 1
        return read_groups(
            groups.tolist(),
            begin,
            cache=self.cache,
            num_bytes=lambda some: self._bytes_of_groups[some].tolist(),
            read=self._read,
            image=lambda place, group, data: self._image(indices[place], group, data),
        )

    def _read(self, group: int) -> memoryview:
        """Return the bytes of a chunk; none of one that is a single image, if that is too large."""
        first, size = int(self._firsts[group]), int(self._bytes_of_groups[group])
        is_single = self._sizes_of_groups[group] == 1
        if not size or (is_single and size > self._config.max_object_bytes):
            return memoryview(b"")
        tar = self._manifest.table.select(["key", "size", "etag"]).slice(first, 1).to_pylist()[0]
        uri, begin = self._manifest.uri(tar["key"]), int(self._offsets[first])
        options: dict[str, Any] = {
            "listed_bytes": tar["size"] if self._config.if_overwritten == "bad" else None,
            "etag": expected_etag(self._config, tar["etag"]),
            "access": self._access,
        }
        data = self._waiting(
            tar["key"], lambda retry: read_range(uri, (begin, begin + size - 1), retry=retry, **options)
        )
        if is_s3(uri):
            UNCHECKED.add(uri, NO_MEMBER_CHECKSUMS)
        return memoryview(data)

    def _image(self, index: int, group: int, data: memoryview | DataError) -> Fetched:
        key, label = self.key(index), self._manifest.table["label"][index].as_py()
        if isinstance(data, DataError):
            return Fetched(key, None, label, BAD_IMAGE[type(data)], str(data))
        begin, size = (
            int(self._offsets[index] - self._offsets[self._firsts[group]]),
            int(self._num_bytes[index]),
        )
        limit = self._config.max_object_bytes
        if size > limit:
            reason = f"{size} bytes, more than data.max_object_bytes={limit}"
            return Fetched(key, None, label, Status.TOO_LARGE, reason)
        return whole(key, bytes(data[begin : begin + size]), label, limit)
