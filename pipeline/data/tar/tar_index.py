"""The images of one tar file, with their labels: where each lies, by one pass over the headers. No Ray here.

Members are grouped as WebDataset does: those of one folder whose names are equal up to the first dot are a sample, and
the rest of each name is the member's extension. `dogs/017.jpg`, `dogs/017.cls` and `dogs/017.seg.png` are one sample.
"""

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.listing.names import ARRAY_SUFFIX, role_of
from dinoray.pipeline.data.tar.tar_file import Member, TarFile

CLASS = "cls"
"""The extension that WebDataset has for the class of a sample."""
JSON = "json"
_CHUNK_BYTES = 4 << 20
"""Bytes of a chunk: one request, whose latency is then a small part of it."""
_GAP_BYTES = 256 << 10
"""Bytes between two images that are read for nothing rather than asked for around."""
_MOST_LABEL_BYTES = {CLASS: 1 << 10, JSON: 1 << 20}
_BATCH_ROWS = 65_536
_ARRAY = ARRAY_SUFFIX[1:]
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


class _Rows:
    """Rows that become Arrow columns a batch at a time: a Python object for each would take far more memory."""

    def __init__(self, **columns: pa.DataType) -> None:
        self._schema = pa.schema(list(columns.items()))
        self._batches: list[pa.RecordBatch] = []
        self._pending: list[tuple[Any, ...]] = []

    def add(self, *row: Any) -> None:
        self._pending.append(row)
        if len(self._pending) == _BATCH_ROWS:
            self._flush()

    def columns(self) -> list[pa.Array]:
        """Return all rows so far, as columns."""
        if self._pending:
            self._flush()
        table = pa.Table.from_batches(self._batches, self._schema)
        self._batches = []
        return [column.combine_chunks() for column in table.columns]

    def _flush(self) -> None:
        columns = zip(*self._pending, strict=True)
        arrays = [pa.array(column, kind) for column, kind in zip(columns, self._schema.types, strict=True)]
        self._batches.append(pa.record_batch(arrays, self._schema))
        self._pending = []


def index_tar(tar: TarFile, wanted: Wanted) -> TarImages:
    """Return the images of a tar file; takes some 300 bytes of memory per member meanwhile.

    Raises CompressedTar, and what reading the file raises.
    """
    text = pa.large_string()
    images, arrays = (_Rows(name=text, offset=pa.int64(), num_bytes=pa.int64()) for _ in range(2))
    others = _Rows(name=text)
    texts = _Rows(sample=text, label=pa.string())
    left_out: Counter[str] = Counter()
    for member in tar.members():
        if member.left_out is not None:
            left_out[member.left_out] += member.left_out != "folders"
        elif role_of(member.name) == "image":
            images.add(member.name, member.offset, member.num_bytes)
        else:
            sample, extension = split_name(member.name)
            if extension == _ARRAY:
                arrays.add(member.name, member.offset, member.num_bytes)
            else:
                others.add(member.name)
            if extension == wanted.label_extension:
                texts.add(sample, _label(tar, member, wanted))
    names, offsets, num_bytes, names_of_others = *images.columns(), *others.columns()
    of_arrays = arrays.columns()
    if not len(names) or wanted.image == _ARRAY:
        names, offsets, num_bytes = map(
            pa.concat_arrays, zip((names, offsets, num_bytes), of_arrays, strict=True)
        )
    else:  # features or masks of the images
        names_of_others = pa.concat_arrays([names_of_others, of_arrays[0]])
    samples, extensions = _split_names(names)
    # A member that was added again replaces the earlier one, as where the file is unpacked.
    is_latest = _is_latest(names)
    is_chosen = _is_chosen(samples.filter(is_latest), extensions.filter(is_latest), wanted.image)
    unchosen = extensions.filter(is_latest).filter(pc.invert(is_chosen))
    left_out["replaced members"] += pc.sum(pc.invert(is_latest)).as_py() or 0
    left_out.update(
        {
            f"other images of samples (.{one['values']})": one["counts"]
            for one in unchosen.value_counts().to_pylist()
        }
    )
    names, offsets, num_bytes, samples = (
        column.filter(is_latest).filter(is_chosen) for column in (names, offsets, num_bytes, samples)
    )
    _count_suffixes(names_of_others, samples, left_out)
    return TarImages(
        names,
        offsets.to_numpy(),
        num_bytes.to_numpy(),
        _labels_of(samples, *texts.columns()),
        +left_out,
        tar.damage,
    )


def split_name(name: str) -> tuple[str, str]:
    """Return the sample that a member belongs to, and the member's extension, in lower case."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _split_names(names: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Return `split_name` of many names."""
    parts = pc.extract_regex(names, r"(?s)^(?P<sample>(?:.*/)?[^/.]*)(?:\.(?P<extension>[^/]*))?$")
    extensions = pc.utf8_lower(pc.fill_null(pc.struct_field(parts, "extension"), ""))
    return pc.struct_field(parts, "sample"), extensions


def _is_latest(names: pa.Array) -> pa.Array:
    """Return True for the last of each name."""
    encoded = names.dictionary_encode()
    which, rows = encoded.indices.to_numpy(), np.arange(len(names))
    last = np.zeros(len(encoded.dictionary), np.int64)
    last[which] = rows
    return pa.array(last[which] == rows)


def _is_chosen(samples: pa.Array, extensions: pa.Array, extension: str) -> pa.Array:
    """Return True for the images that are used: one of each sample, or all if no extension of a sample is a plain one.

    Names with dots in them, as `2020.01.jpg` and `2020.02.jpg`, are thus not taken for two images of a sample.
    """
    if extension != AUTO:
        return pc.equal(extensions, extension.lower())
    of_samples, of_extensions = samples.dictionary_encode(), extensions.dictionary_encode()
    found = of_extensions.dictionary.to_pylist()
    plain = sorted((one for one in found if "." not in one), key=_rank)
    places = {one: place for place, one in enumerate(plain)}
    place_of = np.array([places.get(one, len(plain)) for one in found], np.int64)
    place, sample = place_of[of_extensions.indices.to_numpy()], of_samples.indices.to_numpy()
    best = np.full(len(of_samples.dictionary), len(plain))
    np.minimum.at(best, sample, place)
    return pa.array((best[sample] == len(plain)) | (place == best[sample]))


def _count_suffixes(names: pa.Array, samples: pa.Array, left_out: Counter[str]) -> None:
    """Count the members beside no image of `samples` by their suffixes."""
    alone = names.filter(pc.invert(pc.is_in(_split_names(names)[0], samples)))
    for first in range(0, len(alone), _BATCH_ROWS):
        left_out.update(map(_suffix, alone.slice(first, _BATCH_ROWS).to_pylist()))


def _labels_of(samples: pa.Array, labelled: pa.Array, labels: pa.Array) -> pa.Array:
    """Return the label of each of `samples`, the last that `labelled` has of it; null without one."""
    latest_first = np.arange(len(labelled))[::-1]
    return labels.take(latest_first).take(pc.index_in(samples, labelled.take(latest_first)))


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
