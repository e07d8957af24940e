"""The list of all images of a data set, made once: one row per image object, or per Parquet row group.

First in the flow: `data.path` -> manifest -> order (positions) -> source (bytes). A listing takes minutes for
millions of objects and may change between two starts. So the manifest is stored in the run directory and
reused: an index refers to the same image during the whole run. Reads no image; no Ray here.

Columns of the table, sorted by key in byte order:

    kind images    key  size  etag  label
    kind parquet   key  size  etag  row_group  num_rows  num_bytes  num_unlabelled  label?

Settings of `data` that are auto are resolved here, by the rules of detection.py, and stored with the table.
"""

import contextlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from dinoray.models.errors import ConfigError, DataError
from dinoray.models.settings import Auto, Settings
from dinoray.pipeline.data.contents import labelled_parts, list_contents, no_images
from dinoray.pipeline.data.detection import (
    AUTO,
    is_class,
    labels_from_folders,
    note_on_parts,
)
from dinoray.pipeline.data.row_groups import Asked, hold_images, list_row_groups
from dinoray.pipeline.data.sorting import sorted_by_key
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.config import DEFAULTS, StorageConfig
from dinoray.pipeline.storage.files import Directory, MissingObject, check_bucket, normal_uri
from dinoray.pipeline.storage.waiting import Patient

logger = logging.getLogger(__name__)

_VERSION = 1
_METADATA = b"dinoray.manifest"
_DETECTABLE = ("image_column", "key_column", "label_column", "label_from_parent")
_LISTED_AS = ("path", *_DETECTABLE)


class DataConfig(Settings):
    """Images: where they are and how they are fetched. Credentials and endpoint come from AWS_* alone."""

    path: str = Field(min_length=1)
    """A folder, s3://bucket/prefix, or Parquet shards in either (a folder of *.parquet, or one such file)."""
    image_column: str = "auto"
    """Parquet: the column of encoded images, binary or a struct with a binary field 'bytes'; auto detects it."""
    key_column: str | None = "auto"
    """Parquet: the column that names an image; null names it shard#row, auto detects the column."""
    label_column: str | None = "auto"
    """Parquet: the column of labels, read as text; null ignores labels, auto detects the column."""
    label_from_parent: bool | Auto = "auto"
    """The name of the folder that holds an image, or a Parquet shard, is its label; auto looks at the folders."""
    fetch_concurrency: int = Field(default=32, ge=16, le=512)
    """Images, or Parquet row groups, that each augmentation actor requests at once."""
    fetch_buffer_bytes: int = Field(default=256 << 20, ge=1)
    """Bytes of images, or row groups, that are fetched ahead for a block; an augmentation actor has two blocks."""
    if_overwritten: Literal["bad", "use"] = "bad"
    """Objects that were overwritten after they were listed: bad counts them as bad images, use trains on them."""
    max_object_bytes: int = Field(default=64 << 20, ge=1)
    """Larger image objects are not read; they count as bad images."""
    max_pixels: int = Field(default=100_000_000, ge=1)
    """Images with more pixels are not decoded; they count as bad images."""
    row_group_cache_bytes: int = Field(default=256 << 20, ge=0)
    """Parquet: bytes of row groups that are shuffled together, and that an actor which reads for itself caches."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Maximum fraction of bad images in the latest one or two epochs (or 100,000 images); above it a run ends."""

    @field_validator("path")
    @classmethod
    def _path_is_an_address(cls, path: str) -> str:
        normal_uri(path)
        return path


@dataclass(frozen=True)
class Manifest:
    """All images of a data set in one fixed order; an image is its index in [0, num_images).

    `root` is the address that keys are relative to (`s3://bucket` or a folder). `num_ignored` counts listed
    objects that are no images. `listed_as` has the config values that determine the table, `detected` the
    values found for its auto settings, `notes` messages about them. `damaged` are keys of Parquet shards that
    could not be read and are left out. `rows_per_group` is set for a packed set, whose rows lie shuffled in row
    groups of that many, or fewer at the ends of shards. `passed_over` counts and names what is left out on purpose.
    """

    table: pa.Table
    kind: Literal["images", "parquet"]
    root: str
    num_ignored: int
    listed_as: dict[str, Any]
    detected: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    rows_per_group: int | None = None
    passed_over: tuple[str, ...] = ()

    def settle(self, config: DataConfig) -> DataConfig:
        """Return `config` with its auto settings replaced by the values of this manifest."""
        values = {name: value for name, value in self._values.items() if getattr(config, name) == AUTO}
        return config.model_copy(update=values)

    @property
    def _values(self) -> dict[str, Any]:
        return {name: self.listed_as.get(name) for name in _DETECTABLE} | self.detected

    @property
    def path(self) -> str:
        """The data set's address: `data.path`, normalised."""
        return str(self.listed_as["path"])

    @property
    def num_images(self) -> int:
        """Number of image objects, or of rows in all row groups."""
        sizes = self.group_sizes
        return self.table.num_rows if sizes is None else int(sizes.sum())

    @property
    def group_sizes(self) -> np.ndarray | None:
        """Images per row group, int64 [num_groups], for Parquet; None for image objects."""
        return self.table["num_rows"].to_numpy() if self.kind == "parquet" else None

    @property
    def group_bytes(self) -> np.ndarray | None:
        """Bytes per row group in memory, int64 [num_groups], for Parquet; None for image objects."""
        return self.table["num_bytes"].to_numpy() if self.kind == "parquet" else None

    def uri(self, key: str) -> str:
        """Return the full address of the object or file at `key`."""
        return f"{self.root.rstrip('/')}/{key}"

    def to_bytes(self) -> bytes:
        """Return the bytes of a Parquet file, which `from_bytes` and any Parquet reader can read."""
        about = {
            "version": _VERSION,
            "kind": self.kind,
            "root": self.root,
            "num_ignored": self.num_ignored,
            "listed_as": self.listed_as,
            "detected": self.detected,
            "notes": self.notes,
            "damaged": self.damaged,
            "rows_per_group": self.rows_per_group,
            "passed_over": self.passed_over,
        }
        sink = pa.BufferOutputStream()
        table = self.table.replace_schema_metadata({_METADATA: json.dumps(about)})
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes, config: DataConfig, *, has_begun: bool = True) -> "Manifest":
        """Return the manifest in `data`. Raises ConfigError if it was listed with values not in `config`.

        If the run `has_begun`, a setting that is auto in `config` accepts any value of the manifest.
        """
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            about = json.loads(file.schema_arrow.metadata[_METADATA])
            columns = [file.read(columns=[n]).combine_chunks()[n] for n in file.schema_arrow.names]
            table = pa.table(columns, file.schema_arrow.names)
        except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
            raise DataError(
                f"the manifest is damaged ({error}); delete it to list {config.path} again"
            ) from error
        if about["version"] != _VERSION:
            raise DataError(
                f"the manifest has version {about['version']}, this program reads {_VERSION}; "
                f"delete it to list {config.path} again"
            )
        listed, detected = about["listed_as"], about.get("detected", {})
        for name, now in _listed_as(config).items():
            then = listed.get(name)
            if now not in (then, detected.get(name, then)) and not (now == AUTO and has_begun):
                raise ConfigError(
                    f"data.{name}={now!r}, but the manifest of this run was listed with "
                    f"{detected.get(name, then)!r}; give the run another name, or set the old value"
                )
        kept = (table, about["kind"], about["root"], about["num_ignored"])
        notes, damaged, passed_over = (
            tuple(about.get(name, ())) for name in ("notes", "damaged", "passed_over")
        )
        return cls(*kept, listed, detected, notes, damaged, about.get("rows_per_group"), passed_over)


def load_or_build(
    config: DataConfig,
    directory: Directory,
    name: str = run_dir.MANIFEST,
    *,
    storage: StorageConfig = DEFAULTS,
    begun: str = run_dir.CONFIG,
    setting: str = "data.path",
) -> Manifest:
    """Return the manifest stored as `name` in the run directory; the first call lists the data and writes it.

    Before the run has begun (it then writes the file `begun`), a manifest listed with other values is
    replaced: an attempt that failed on a wrong setting must not fix that setting. Raises DataError soon if
    the store of the images does not answer: its address may be wrong.
    """
    with contextlib.suppress(MissingObject):
        data, has_begun = directory.read(name), directory.exists(begun)
        try:
            manifest = Manifest.from_bytes(data, config, has_begun=has_begun)
        except ConfigError:
            if has_begun:
                raise
        else:
            check_bucket(manifest.root)
            return manifest
    manifest = build_manifest(config, storage, setting=setting)
    directory.write(name, manifest.to_bytes())
    return manifest


def build_manifest(
    config: DataConfig, storage: StorageConfig = DEFAULTS, *, setting: str = "data.path"
) -> Manifest:
    """List `config.path` (all pages, all folders), keep images by name, and sort by key.

    Errors name `setting`, the setting or argument that gave the path.

    Once the store has answered the first request, all others wait for it. Raises DataError if there are no
    images, listing fails, or most Parquet shards are damaged. Raises ConfigError if image objects and Parquet
    shards are mixed, or a column or option does not fit the data.
    """
    patient = Patient(storage.give_up_after_seconds)
    path = normal_uri(config.path)
    contents = list_contents(config.path, config.label_from_parent, setting=setting, retry_later=patient)
    num_ignored, num_images, num_shards = (
        table.num_rows for table in (contents.others, contents.images, contents.shards)
    )
    if num_images and num_shards and not hold_images(contents.shards, contents.root):
        num_ignored, num_shards = num_ignored + num_shards, 0  # the shards are metadata about the images
    if num_images and num_shards:
        raise ConfigError(
            f"{setting}={path} holds {num_images} images and {num_shards} Parquet shards; "
            f"point {setting} at a folder with one kind"
        )
    if num_shards:
        num_ignored += contents.bare.num_rows
        kept = _row_groups(config, path, contents.root, contents.shards, storage)
    elif num_images or contents.bare.num_rows:
        images = pa.concat_tables([contents.images, contents.bare])
        nothing = images.schema.empty_table()
        contents = contents._replace(images=nothing, bare=nothing)  # `images` holds them alone, to be freed
        columns = dict(zip(images.column_names, images.columns, strict=True))
        del images
        kept = _images(config, path, columns)
    else:
        raise no_images(contents, path, num_ignored, setting=setting)
    labelled = (
        labelled_parts(kept.table, contents) if any(n.startswith("labels ") for n in kept.notes) else ()
    )
    notes = [*kept.notes, *note_on_parts(contents.parts, path, labelled=labelled)]
    found = (contents.root, num_ignored, _listed_as(config), kept.detected, tuple(notes), tuple(kept.damaged))
    kind: Literal["images", "parquet"] = "parquet" if num_shards else "images"
    manifest = Manifest(kept.table, kind, *found, kept.rows_per_group, contents.passed_over)
    logger.info("%s: %d images, %d other objects ignored", path, manifest.num_images, num_ignored)
    return manifest


class _Found(NamedTuple):
    table: pa.Table
    detected: dict[str, Any]
    notes: list[str]
    damaged: Sequence[str] = ()
    rows_per_group: int | None = None


def _images(config: DataConfig, path: str, columns: dict[str, pa.ChunkedArray]) -> _Found:
    """Takes the columns out of `columns`."""
    detected: dict[str, Any] = {}
    for name in ("key_column", "label_column"):
        if getattr(config, name) == AUTO:
            detected[name] = None
        elif getattr(config, name) is not None:
            raise ConfigError(
                f"data.{name}={getattr(config, name)!r} is for Parquet, but {path} holds image objects; "
                "unset it (labels of image objects: data.label_from_parent=true)"
            )
    if config.label_from_parent is True and columns["label"].null_count == len(columns["label"]):
        raise ConfigError(f"data.label_from_parent=true, but no image of {path} lies in a folder below it")
    notes = []
    if config.label_from_parent == AUTO:
        labels = columns["label"]
        counts = {row["values"]: row["counts"] for row in labels.value_counts().to_pylist()}
        detected["label_from_parent"], note = labels_from_folders(counts)
        notes.append(note)
        classes = [name for name in counts if detected["label_from_parent"] and is_class(name)]
        columns["label"] = pc.if_else(
            pc.is_in(labels, pa.array(classes, pa.string())), labels, pa.scalar(None, pa.string())
        )
        del labels
    return _Found(sorted_by_key(columns), detected, notes)


def _row_groups(config: DataConfig, path: str, root: str, shards: pa.Table, storage: StorageConfig) -> _Found:
    found = list_row_groups(
        sorted_by_key(dict(zip(shards.column_names, shards.columns, strict=True))),
        path=path,
        root=root,
        asked=Asked(config.image_column, config.key_column, config.label_column, config.label_from_parent),
        concurrency=config.fetch_concurrency,
        give_up_after_seconds=storage.give_up_after_seconds,
    )
    columns = found.columns
    values = (columns.image, columns.key, columns.label, found.from_folders)
    detected = dict(zip(_DETECTABLE, values, strict=True))
    chosen = {name: value for name, value in detected.items() if getattr(config, name) == AUTO}
    return _Found(found.table, chosen, columns.notes, found.damaged, found.rows_per_group)


def _listed_as(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _LISTED_AS} | {"path": normal_uri(config.path)}
