"""The labelled images of a data set: all images, a set named for evaluation, or a held-out part.

This module stands between sources and the evaluation. It reads at most labels, no images; no Ray here.
"""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.manifests.manifest import DataConfig, build_manifest, load_or_build
from dinoray.pipeline.data.order import permute
from dinoray.pipeline.data.parquet.parquet_rows import read_column
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.storage.config import DEFAULTS, StorageConfig
from dinoray.pipeline.storage.files import Directory, normal_uri

HELD_OUT_SHARE = 0.2
"""Share of the labelled images that is classified if no evaluation set is named."""


def open_source(
    config: DataConfig,
    run: Directory | None,
    name: str,
    *,
    setting: str = "data.path",
    storage: StorageConfig = DEFAULTS,
) -> Source:
    """Open the images of `config`, whose path comes from `setting`.

    Their manifest is kept in the run directory, if given, under `name`.
    """
    if run is None:
        manifest = build_manifest(config, storage, setting=setting)
    else:
        manifest = load_or_build(config, run, name, storage=storage, setting=setting)
    return Source(config, manifest, storage)


def open_labelled(
    config: DataConfig,
    run: Directory | None,
    name: str,
    *,
    setting: str,
    storage: StorageConfig = DEFAULTS,
) -> Source:
    """Open the labelled images of `config`, whose path comes from `setting`.

    Raises ConfigError if there are none.

    A set named for evaluation counts as labelled: its folders are classes, however few images they hold.
    """
    try:
        source = open_source(config, run, name, setting=setting, storage=storage)
    except ConfigError:
        columns = dict.fromkeys(("key_column", "label_column", "uri_column"), AUTO)
        if setting == "data.path" or config == config.model_copy(update=columns):
            raise
        # The columns may be those of the Parquet at data.path, which class folders elsewhere lack.
        config = config.model_copy(update=columns)
        source = open_source(config, run, name, setting=setting, storage=storage)
        if source.manifest.of_kind.has_columns:
            raise
    if not source.has_labels and setting != "data.path" and config.label_from_parent == AUTO:
        with contextlib.suppress(ConfigError):  # the path has no folders
            from_folders = config.model_copy(update={"label_from_parent": True})
            source = open_source(from_folders, run, name, setting=setting, storage=storage)
    labelled = with_labels(source)
    if not source.has_labels or not labelled.num_images:
        raise ConfigError(
            f"eval.val_path needs labels, but {setting}={config.path} has none: set data.label_column (Parquet) or "
            "data.label_from_parent=true (one folder per class), point eval.val_path and eval.train_path at labelled "
            "images, or unset eval.val_path"
        )
    return labelled


def with_labels(source: Source) -> Source:
    """Return the source without images outside of class folders and without rows that lack a label.

    Of a mix, sources that have labels stay; classes of one name are one class.
    """
    if source.parts:
        sides = [
            (first, part) for first, part in zip(source.firsts, source.parts, strict=True) if part.has_labels
        ]
        rows = [first + _rows_of(with_labels(part)) for first, part in sides]
        return source.select(np.concatenate([np.empty(0, np.int64), *rows]))
    labels = source.manifest.labels
    if labels is None and source.config.label_column is not None:
        return _rows_with_labels(source, source.config.label_column)
    if labels is None or not labels.null_count:
        return source
    return source.select(np.flatnonzero(labels.is_valid().to_numpy()))


def _rows_of(source: Source) -> NDArray[np.int64]:
    return source.in_manifest(np.arange(source.num_images))


def _rows_with_labels(source: Source, column: str) -> Source:
    """Drop rows without a label; read only the labels of row groups that may lack some."""
    table = source.manifest.table
    if "num_unlabelled" in table.column_names and not table["num_unlabelled"].fill_null(1).to_numpy().any():
        return source

    def read(number: int) -> NDArray[np.bool_]:
        group = source.manifest.row_group(number)
        if group.get("num_unlabelled") in (0, group["num_rows"]):
            return np.full(group["num_rows"], group["num_unlabelled"] == 0)
        uri = source.manifest.uri(group["key"])
        read = partial(
            read_column, uri, group["size"], group["row_group"], column=column, access=source.storage.access
        )
        labels = source.read(group["key"], lambda retry: read(retry=retry))
        return np.asarray([label is not None for label in labels])

    with ThreadPoolExecutor(source.config.fetch_concurrency) as pool:
        return source.select(np.flatnonzero(np.concatenate([*pool.map(read, range(table.num_rows))])))


def held_out(images: Source, *, max_train_images: int, max_val_images: int) -> tuple[Source, Source] | None:
    """Split the labelled images at random: (voters, classified images); None without labels.

    The split is the same for every run, rank and seed. All images are also used for training, without their
    labels.
    """
    labelled = with_labels(images)
    total = labelled.num_images
    if not images.has_labels or total < 2:
        return None
    num_val = max(1, min(max_val_images, round(HELD_OUT_SHARE * total)))
    chosen = np.arange(min(total, num_val + max_train_images))
    mixed = permute(chosen, size=total, seed=1)
    return labelled.select(np.sort(mixed[num_val:])), labelled.select(np.sort(mixed[:num_val]))


def labelled_sources(
    data: DataConfig,
    config: EvalConfig,
    run: Directory | None = None,
    *,
    storage: StorageConfig = DEFAULTS,
) -> tuple[Source, Source] | None:
    """Return the sources of voters and classified images, read like `data`; None without `eval.val_path`.

    Their manifests are kept in the run directory, if one is given. Raises ConfigError if one source has no
    labels.
    """
    if config.val_path in (None, AUTO):
        return None

    def source(path: str, name: str, setting: str) -> Source:
        of_path: dict[str, Any] = {
            "manifest": None,
            "image_list": None,
            "include": (),
            "exclude": (),
            "mix": {},
        }
        if normal_uri(path) == normal_uri(data.path):
            of_path = {}
        at = DataConfig.model_validate(data.model_dump() | {"path": path} | of_path)
        return open_labelled(at, run, name, setting=setting, storage=storage)

    # First the set that the evaluation names: a wrong path is reported before missing labels of data.path.
    val = source(config.val_path, "manifest_eval_val.parquet", "eval.val_path")
    train = source(
        config.train_path or data.path,
        "manifest_eval_train.parquet",
        "eval.train_path" if config.train_path else "data.path",
    )
    return train, val


def subset(num_images: int, limit: int) -> NDArray[np.int64]:
    """Return a fixed random subset of at most `limit` image indices, ascending; all runs and ranks get it."""
    if num_images <= limit:
        return np.arange(num_images)
    return np.sort(permute(np.arange(limit), size=num_images, seed=0))
