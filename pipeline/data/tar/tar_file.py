"""The headers of a tar file, in one pass that reads hardly more than these: what members it has, and where.

Feeds tar_index.py. The format is the business of Python's tarfile: ustar, pax and GNU names, sparse files. It ends
silently at a header that is damaged, so this looks at what lies there. Decodes nothing; no Ray here.
"""

import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dinoray.models.errors import DataError, one_line
from dinoray.pipeline.storage.positions import Positioned

_BLOCK = tarfile.BLOCKSIZE
_FAR = 1 << 20
"""Bytes of a body above which a request more costs less time than reading through."""
_NEAR_BYTES, _FAR_BYTES = 4 << 20, 64 << 10
"""Bytes of a request: where headers lie near one another, and where a body was passed over."""
_MOST_HEADER_BYTES = 16 << 20
"""A longer header, for a name or for the attributes of pax, is damage."""
_MOST_ZEROS = 64 << 10
"""Zeros after an end mark, before which a further archive is looked for: blocks of 20 headers are usual."""
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}

ReadRange = Callable[[int, int], bytes]
"""Return the bytes [first, stop) of a file."""


class CompressedTar(DataError):  # noqa: N818
    """A tar file that is compressed as a whole: no member of it can be read without all that lies before."""


class Member(NamedTuple):
    """A regular file in a tar file, or, with `left_out`, a member that is none and is not read."""

    name: str
    """With escapes for bytes that are not UTF-8, which keep names apart."""
    offset: int
    num_bytes: int
    left_out: str | None


class HeaderFile(Positioned):
    """A file of which pieces around headers are read: all of it where members are small, else a piece for each."""

    def __init__(self, read: ReadRange, num_bytes: int, *, piece_bytes: int = _NEAR_BYTES) -> None:
        super().__init__(num_bytes)
        self._read, self._piece_bytes = read, piece_bytes
        self._start = self._latest = 0
        self._piece = b""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes. Raises tarfile.ReadError for more than any header or label has."""
        size = self._num_bytes if size is None or size < 0 else size
        begin, stop = self._position, min(self._position + size, self._num_bytes)
        if stop <= begin:
            return b""
        if stop - begin > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {stop - begin} bytes")
        end = self._start + len(self._piece)
        if begin < self._start or stop > end:
            is_far = begin - self._latest > _FAR
            piece_bytes = max(
                stop - begin, min(self._piece_bytes, _FAR_BYTES) if is_far else self._piece_bytes
            )
            self._piece = self._read(begin, min(begin + piece_bytes, self._num_bytes))
            self._start = begin
        self._position = self._latest = stop
        return self._piece[begin - self._start : stop - self._start]


class TarFile:
    """The members of a tar file of `num_bytes`, and once all have been yielded, what is wrong with it."""

    def __init__(self, file: HeaderFile, num_bytes: int, *, name: str) -> None:
        self._file, self._num_bytes, self._name = file, num_bytes, name
        self.damage: str | None = None
        """What keeps the rest of the file from being read, or seems to be missing at its end."""

    def members(self) -> Iterator[Member]:
        """Yield the members before the first damage, in their order.

        Raises CompressedTar, and what reading the file raises.
        """
        start = self._file.read(8)
        for magic, (program, remedy) in _COMPRESSED.items():
            if start.startswith(magic):
                raise CompressedTar(
                    f"{self._name} is compressed with {program}, so no image in it can be read alone; "
                    f"put what `{remedy} < {self._name.rpartition('/')[2]}` writes in its place"
                )
        self._file.seek(0)
        offset = 0
        try:
            tar = tarfile.TarFile(fileobj=self._file, encoding="utf-8", errors="surrogateescape")
            while True:
                found = tar.next()
                if found is None:
                    further = self._after_end(tar.offset)
                    if further is None:
                        return
                    tar.offset = further
                    continue
                if tar.offset <= offset:
                    raise tarfile.ReadError("a size below zero")
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
                member = _member(found)
                if member.left_out is None and member.offset + member.num_bytes > self._num_bytes:
                    raise tarfile.ReadError(f"the file ends within {member.name!r}")
                yield member
                offset = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            self._note(offset, one_line(error))

    def read(self, member: Member) -> bytes:
        """Return the bytes of a small member. Called between two members, it reads nothing anew."""
        self._file.seek(member.offset)
        return self._file.read(member.num_bytes)

    def _after_end(self, offset: int) -> int | None:
        """Return where a joined archive begins, if one does; note damage unless the members end with zeros."""
        self._file.seek(offset)
        block = self._file.read(_BLOCK)
        if not block:
            self._note(offset, "it has no end mark, so members may be missing")
        elif block.strip(b"\0"):
            self._note(offset, "no member begins there")
        else:
            rest = self._file.read(min(_MOST_ZEROS, self._num_bytes - offset - _BLOCK))
            if further := rest.strip(b"\0"):
                return offset + _BLOCK + rest.index(further) // _BLOCK * _BLOCK
        return None

    def _note(self, offset: int, what: str) -> None:
        self.damage = f"at byte {offset} of {self._num_bytes}: {what}"


def _member(found: tarfile.TarInfo) -> Member:
    name = found.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    left_out = None
    if found.issparse():
        left_out = "sparse files"
    elif not found.isreg():
        left_out = (
            "folders" if found.isdir() else "links" if found.issym() or found.islnk() else "special files"
        )
    return Member(name, found.offset_data, found.size, left_out)
