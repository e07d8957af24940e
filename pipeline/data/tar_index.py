"""The images of one tar file, with their labels: where each lies, by one pass over the headers. No Ray here.

Members are grouped as WebDataset does: those of one folder whose names are equal up to the first dot are a sample, and
the rest of each name is the member's extension. `dogs/017.jpg`, `dogs/017.cls` and `dogs/017.seg.png` are one sample.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dinoray.pipeline.data.detection import AUTO
from dinoray.pipeline.data.names import ARRAY_SUFFIX, role_of
from dinoray.pipeline.data.tar_file import Member, TarFile

CLASS = "cls"
"""The extension that WebDataset has for the class of a sample."""
JSON = "json"
_CHUNK_BYTES = 4 << 20
"""Bytes of a chunk: one request, whose latency is then a small part of it."""
_GAP_BYTES = 256 << 10
"""Bytes between two images that are read for nothing rather than asked for around."""
_MOST_LABEL_BYTES = {CLASS: 1 << 10, JSON: 1 << 20}
_FIRST = ("jpg", "jpeg", "png", "webp")
"""Extensions of images, of which the first is taken if a sample has several."""


class Wanted(NamedTuple):
    """The settings `data.image_column` and `data.label_column`, as extensions of the members of a sample."""

    image: str
    """Extension of the images; auto takes one image of each sample, and arrays where there are no images."""
    label: str | None
    """Extension whose text is the label, or `json.FIELD`; auto takes `cls`."""

    @property
    def label_extension(self) -> str | None:
        """The extension of the members that hold labels."""
        if self.label is None:
            return None
        return CLASS if self.label == AUTO else JSON if self.field is not None else self.label

    @property
    def field(self) -> str | None:
        """The field of JSON that holds the label."""
        start, _, field = (self.label or "").partition(".")
        return field if start == JSON and field else None


class TarImages(NamedTuple):
    """The images of one tar file, in the order in which they lie there; in arrays, which are smaller than lists."""

    names: pa.Array
    offsets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    labels: pa.Array
    """Texts of the members that hold labels; null without one."""
    left_out: Counter[str]
    """Number of members that are no images, by what they are: `.heic`, or `links`."""
    damage: str | None
    """What keeps the rest of the file from being read."""

    def chunks(self) -> NDArray[np.int64]:
        """Return the number of the chunk that each image is in, from 0: neighbours that are read together."""
        numbers = np.empty(len(self.names), np.int64)
        number, begin, end = -1, 0, -1
        for which, (offset, size) in enumerate(
            zip(self.offsets.tolist(), self.num_bytes.tolist(), strict=True)
        ):
            if number < 0 or offset + size - begin > _CHUNK_BYTES or offset - end > _GAP_BYTES:
                number, begin = number + 1, offset
            numbers[which], end = number, offset + size
        return numbers


def index_tar(tar: TarFile, wanted: Wanted) -> TarImages:
    """Return the images of a tar file. Raises CompressedTar, and what reading the file raises."""
    images: dict[str, Member] = {}
    arrays: dict[str, Member] = {}
    others: list[str] = []
    texts: dict[str, str | None] = {}
    left_out: Counter[str] = Counter()
    for member in tar.members():
        if member.left_out is not None:
            left_out[member.left_out] += member.left_out != "folders"
        elif role_of(member.name) == "image":
            # A member that was added again replaces the earlier one, as where the file is unpacked.
            left_out["replaced members"] += images.pop(member.name, None) is not None
            images[member.name] = member
        else:
            sample, extension = split_name(member.name)
            if extension == ARRAY_SUFFIX[1:]:
                arrays[member.name] = member
            else:
                others.append(member.name)
            if extension == wanted.label_extension:
                texts[sample] = _label(tar, member, wanted)
    if not images or wanted.image == ARRAY_SUFFIX[1:]:
        images = arrays
    else:
        others.extend(arrays)
    chosen = list(_chosen(list(images.values()), wanted.image, left_out))
    samples = {split_name(member.name)[0] for member in chosen}
    left_out.update(_suffix(name) for name in others if split_name(name)[0] not in samples)
    return TarImages(
        pa.array([member.name for member in chosen], pa.large_string()),
        np.array([member.offset for member in chosen], np.int64),
        np.array([member.num_bytes for member in chosen], np.int64),
        pa.array([texts.get(split_name(member.name)[0]) for member in chosen], pa.string()),
        +left_out,
        tar.damage,
    )


def split_name(name: str) -> tuple[str, str]:
    """Return the sample that a member belongs to, and the member's extension, in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _chosen(images: Sequence[Member], extension: str, left_out: Counter[str]) -> Iterator[Member]:
    """Yield the images that are used: one of each sample, or all where no extension of a sample is a plain one.

    Names with dots in them, as `2020.01.jpg` and `2020.02.jpg`, are thus not taken for two images of a sample.
    """
    best: dict[str, str] = {}
    for member in images:
        sample, own = split_name(member.name)
        if "." not in own and (sample not in best or _rank(own) < _rank(best[sample])):
            best[sample] = own
    for member in images:
        sample, own = split_name(member.name)
        if own == (best.get(sample, own) if extension == AUTO else extension.lower()):
            yield member
        else:
            left_out[f"other images of samples (.{own})"] += 1


def _rank(extension: str) -> tuple[int, str]:
    return _FIRST.index(extension) if extension in _FIRST else len(_FIRST), extension


def _label(tar: TarFile, member: Member, wanted: Wanted) -> str | None:
    """Return the text of a member as a label; None for no text, or for more than a label has."""
    limit = _MOST_LABEL_BYTES[JSON if wanted.field is not None else CLASS]
    if member.num_bytes > limit:
        return None
    try:
        text = tar.read(member).decode().strip()
        if wanted.field is not None:
            found = json.loads(text)
            for field in wanted.field.split("."):
                found = found[field]
            text = found if isinstance(found, str) else json.dumps(found) if isinstance(found, int) else ""
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return text or None


def _suffix(name: str) -> str:
    dot, suffix = name.rpartition("/")[2].rpartition(".")[1:]
    return f".{suffix.lower()}" if dot else "members without a suffix"
