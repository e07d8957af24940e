"""Compare the class names of an evaluation's training and validation images.

Reads only labels; no Ray here.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.parquet.column_detection import other_label_column
from dinoray.pipeline.data.parquet.parquet import read_footer
from dinoray.pipeline.data.parquet.parquet_rows import read_column
from dinoray.pipeline.data.reading.fetched import BAD_OBJECT
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import subset
from dinoray.pipeline.storage.addresses import is_s3

_NUM_NAMES = 3
_IMAGES_PER_CLASS = 2
_NAME_LENGTH = 40


class Mismatch(NamedTuple):
    """Validation classes without training images: a message `text`, and a flag if no class matches."""

    text: str
    is_disjoint: bool


def class_mismatch(train: Source, val: Source, config: EvalConfig) -> Mismatch | None:
    """Compare the images that an evaluation takes from each side; return None if no class is missing.

    The classes of a held-out part also occur in the rest, except for the rarest. It is compared only if labels
    hardly repeat.
    """
    if config.val_path == AUTO:
        return _held_out_mismatch(train, val, config)
    classified = Counter(name for names in _names(val, config.max_val_images) for name in names)
    missing, known = set(classified), set[str]()
    if not missing:  # the evaluation rejects images without labels
        return None
    for names in _names(train, config.max_train_images):
        known |= set(names)
        missing -= known
        if not missing:
            return None
    setting = _setting(train, config)
    train_path = f"{setting}={train.config.path}"
    val_path = f"eval.val_path={val.config.path}"
    if len(missing) == len(classified):
        return Mismatch(
            "k-NN and linear accuracy have no meaning, because the classes are disjoint: "
            f"{val_path} has {_classes(classified)}, {train_path} has {_classes(known)}; "
            f"{_names_remedy(train, val)}set eval.train_path and eval.val_path to images that share class names",
            is_disjoint=True,
        )
    remedy = "add training images of these classes, or remove the classes from eval.val_path"
    if train.num_images > config.max_train_images:
        remedy = f"raise eval.max_train_images={config.max_train_images}, or {remedy}"
    wrong = sum(classified[name] for name in missing)
    return Mismatch(
        f"{len(missing)} of {len(classified)} classes of {val_path} ({_some(missing)}) have no training image: "
        f"{train_path} has {_classes(known)}; {wrong} of {classified.total()} validation images count as wrong; "
        f"{remedy}",
        is_disjoint=False,
    )


def overlap_warnings(labelled: tuple[Source, Source] | None, config: EvalConfig) -> list[str]:
    """Return a warning if images of `eval.val_path` also vote, because one address is or holds the other."""
    if labelled is None or config.val_path == AUTO:
        return []
    voters, val = (labelled[0].manifest, _real(labelled[1].manifest.path))
    trains = [_real(one.path) for one in voters.sources or (voters,)]
    train = next((t for t in trains if f"{t}/".startswith(f"{val}/") or f"{val}/".startswith(f"{t}/")), None)
    if train is None:
        return []
    setting = _setting(labelled[0], config)
    where = "is" if train == val else "holds images of" if train.startswith(f"{val}/") else "lies in"
    return [
        f"k-NN accuracy is too high, because images vote for themselves: eval.val_path={labelled[1].manifest.path} "
        f"{where} {setting}={voters.path}; leave eval.val_path out to hold out a part of data.path, "
        "or move the images of eval.val_path into a folder outside"
    ]


def _setting(train: Source, config: EvalConfig) -> str:
    """Return the setting that gave the images that vote."""
    return "eval.train_path" if config.train_path is not None else train.config.setting


def _real(path: str) -> str:
    return path if is_s3(path) else os.path.realpath(path)


def _held_out_mismatch(train: Source, val: Source, config: EvalConfig) -> Mismatch | None:
    """Return a mismatch if most held-out images have a class that no other image has.

    Reads labels only until enough repeat: r repeats among n of N labels suggest 2rN/n^2 images per class.
    """
    known, number = set[str](), 0
    for names in _names(train, config.max_train_images):
        known |= set(names)
        number += len(names)
        repeats = number - len(known)
        if 2 * repeats * train.num_images >= _IMAGES_PER_CLASS * number**2 > 0:
            return None
    classified = Counter(name for names in _names(val, config.max_val_images) for name in names)
    wrong = sum(count for name, count in classified.items() if name not in known)
    if 2 * wrong <= classified.total():
        return None
    column = next((part for part in train.parts if part.has_labels), train).config.label_column
    setting, remedy = "data.label_from_parent=true", "data.label_from_parent=false"
    if column is not None:
        setting, remedy = (
            f"data.label_column={column!r}",
            "data.label_column to a column of classes, or to null",
        )
    total = number + classified.total()
    values = len(known | set(classified))
    return Mismatch(
        f"k-NN and linear accuracy have no meaning, because labels hardly repeat: {setting} gives {values} classes "
        f"to {total} images, and {wrong} of {classified.total()} held-out images have a class of their own; "
        f"set {remedy}",
        is_disjoint=wrong == classified.total(),
    )


def _names_remedy(train: Source, val: Source) -> str:
    """Return `set data.label_column=NAME, or ` where Parquet has another column of labels, as text."""
    for side in (train, val):
        column = side.config.label_column
        if column is None or not side.manifest.of_kind.has_columns:
            continue
        shard = side.manifest.row_group(0)
        read = partial(
            read_footer, side.manifest.uri(shard["key"]), shard["size"], access=side.storage.access
        )
        try:
            schema = side.read(shard["key"], lambda retry, read=read: read(retry=retry).schema)  # type: ignore[misc]
        except BAD_OBJECT:
            continue
        if other := other_label_column(schema, column):
            return f"set data.label_column={other}, or "
    return ""


def _classes(names: Iterable[str]) -> str:
    """Format class names as `12 classes ('a', 'b', 'c' and 9 more)`."""
    number = len(set(names))
    shown = f" ({_some(names)})" if number else ""
    return f"{number} class{'' if number == 1 else 'es'}{shown}"


def _some(names: Iterable[str]) -> str:
    ordered = sorted(set(names))
    shown = ", ".join(repr(name[:_NAME_LENGTH]) for name in ordered[:_NUM_NAMES])
    return f"{shown} and {len(ordered) - _NUM_NAMES} more" if len(ordered) > _NUM_NAMES else shown


def _names(source: Source, limit: int) -> Iterator[list[str]]:
    """Yield the labels of the subset that an evaluation takes, in parts; omit images without a label."""
    for part, rows in source.divided(source.in_manifest(subset(source.num_images, limit))):
        yield from _names_of(part, rows)


def _names_of(source: Source, indices: NDArray[np.int64]) -> Iterator[list[str]]:
    """Yield the labels of these rows of the manifest of one source."""
    of_images, sizes = source.manifest.labels, source.manifest.group_sizes
    if of_images is not None or sizes is None:
        labels = [] if of_images is None else of_images.take(indices).to_pylist()
        yield [label for label in labels if label and label.strip()]
        return
    starts = np.cumsum(sizes) - sizes
    groups = np.searchsorted(starts, indices, side="right") - 1
    wanted, at_once = np.unique(groups), source.config.fetch_concurrency
    with ThreadPoolExecutor(at_once) as pool:
        # A few row groups at a time: most often the first row groups contain all classes.
        for first in range(0, len(wanted), at_once):
            wave = wanted[first : first + at_once]
            for group, labels in zip(wave, pool.map(lambda group: _read(source, group), wave), strict=True):
                rows = indices[groups == group] - starts[group]
                chosen = [labels[row] for row in rows if row < len(labels)]
                yield [label for label in chosen if label and label.strip()]


def _read(source: Source, group: int) -> list[str | None]:
    """Return the labels of a row group; none if its images count as unreadable."""
    shard, config = source.manifest.row_group(group), source.config
    if config.label_column is None:
        return [shard["label"]] * shard["num_rows"]  # label of the folder around the shard
    try:
        uri, column = source.manifest.uri(shard["key"]), config.label_column
        read = partial(
            read_column, uri, shard["size"], shard["row_group"], column=column, access=source.storage.access
        )
        labels = source.read(shard["key"], lambda retry: read(retry=retry))
        return [label or shard.get("label") for label in labels]  # or that of a folder `column=label`
    except BAD_OBJECT:
        return []
