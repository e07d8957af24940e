"""Compare the class names of an evaluation's training and validation images.

Reads only labels; no Ray here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dinoray.pipeline.data.detection import AUTO
from dinoray.pipeline.data.fetched import BAD_OBJECT
from dinoray.pipeline.data.parquet import read_column
from dinoray.pipeline.data.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.labels import subset

_NUM_NAMES = 3
_NAME_LENGTH = 40


class Mismatch(NamedTuple):
    """Validation classes without training images: a message `text`, and a flag if no class matches."""

    text: str
    is_disjoint: bool


def class_mismatch(train: Source, val: Source, config: EvalConfig) -> Mismatch | None:
    """Compare the images that an evaluation takes from each side; return None if no class is missing.

    A held-out part of one data set is not compared: its classes also occur in the rest, except for the
    rarest.
    """
    if config.val_path == AUTO:
        return None
    classified = Counter(name for names in _names(val, config.max_val_images) for name in names)
    missing, known = set(classified), set[str]()
    if not missing:  # the evaluation rejects images without labels
        return None
    for names in _names(train, config.max_train_images):
        known |= set(names)
        missing -= known
        if not missing:
            return None
    setting = "data.path" if config.train_path is None else "eval.train_path"
    train_path = f"{setting}={train.config.path}"
    val_path = f"eval.val_path={val.config.path}"
    if len(missing) == len(classified):
        return Mismatch(
            "k-NN and linear accuracy have no meaning, because the classes are disjoint: "
            f"{val_path} has {_classes(classified)}, {train_path} has {_classes(known)}; "
            "set eval.train_path and eval.val_path to images that share class names",
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
    indices = source.in_manifest(subset(source.num_images, limit))
    sizes = source.manifest.group_sizes
    if sizes is None:
        labels = source.manifest.table["label"].take(indices).to_pylist()
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
    shard, config = source.manifest.table.slice(group, 1).to_pylist()[0], source.config
    if config.label_column is None:
        return [shard["label"]] * shard["num_rows"]  # label of the folder around the shard
    try:
        uri, column = source.manifest.uri(shard["key"]), config.label_column
        return source.read(
            shard["key"],
            lambda retry: read_column(uri, shard["size"], shard["row_group"], column=column, retry=retry),
        )
    except BAD_OBJECT:
        return []
