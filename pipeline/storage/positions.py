"""A place in a file of known size, for files that are read in ranges: what `io` asks of one that can be sought in."""

import io


class Positioned(io.RawIOBase):
    """A file of `num_bytes` that can be sought in; `read` of a subclass begins at `_position`, and moves it."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self._num_bytes, self._position = num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, start + offset)
        return self._position
