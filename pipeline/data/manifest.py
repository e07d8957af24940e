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
import itertools
import json
import logging
import re
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.commands import command
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.contents import labelled_parts, list_contents, no_images, note_on_archived
from dinoray.pipeline.data.detection import (
    AUTO,
    is_class,
    labels_from_folders,
    note_on_parts,
)
from dinoray.pipeline.data.first_shard import hold_images
from dinoray.pipeline.data.listed_shards import Found, list_shards
from dinoray.pipeline.data.manifest_file import Manifest, listed_as
from dinoray.pipeline.data.shard_files import with_shards_by_content
from dinoray.pipeline.data.shards import ShardFiles
from dinoray.pipeline.data.sorting import sorted_by_key
from dinoray.pipeline.storage import run_dir
from dinoray.pipeline.storage.config import DEFAULTS, StorageConfig
from dinoray.pipeline.storage.files import Directory, MissingObject, check_bucket, normal_uri
from dinoray.pipeline.storage.listing_parts import ListingParts, resumable
from dinoray.pipeline.storage.waiting import Patient

__all__ = ["DataConfig", "Manifest", "build_manifest", "load_or_build"]

logger = logging.getLogger(__name__)


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

    A listing on S3 that is interrupted leaves parts in the directory, with which the next call resumes it.
    """
    with contextlib.suppress(MissingObject):
        data, has_begun = directory.read(name), directory.exists(begun)
        try:
            manifest = Manifest.from_bytes(data, config, has_begun=has_begun)
        except ConfigError:
            if has_begun:
                raise
        else:
            # A file of data.manifest may list other images of the same path; a run that has begun keeps its own.
            if has_begun or config.manifest is None:
                check_bucket(manifest.root, storage.access)
                return manifest
    with resumable(directory) as parts:
        manifest = build_manifest(config, storage, setting=setting, parts=parts)
    directory.write(name, manifest.to_bytes())
    parts.forget()
    return manifest


def build_manifest(
    config: DataConfig,
    storage: StorageConfig = DEFAULTS,
    *,
    setting: str = "data.path",
    parts: ListingParts | None = None,
) -> Manifest:
    """List `config.path` (all pages, all folders), keep images by name, and sort by key.

    Instead reads `config.manifest`, if that is set; raises ConfigError if it was listed with other values.

    Errors name `setting`, the setting or argument that gave the path. `parts` are those of an interrupted listing.

    Once the store has answered the first request, all others wait for it. Raises DataError if there are no
    images, listing fails, or most Parquet shards are damaged. Raises ConfigError if image objects and Parquet
    shards are mixed, or a column or option does not fit the data.
    """
    if config.manifest is not None:
        return _written_before(config, config.manifest, storage)
    patient = Patient(storage.give_up_after_seconds)
    path = normal_uri(config.path)
    contents = list_contents(
        config.path,
        config.label_from_parent,
        setting=setting,
        retry_later=patient,
        access=storage.access,
        parts=parts,
    )
    contents, of_tables = with_shards_by_content(contents, config.label_from_parent, storage)
    num_ignored, num_images, num_shards = (
        table.num_rows for table in (contents.others, contents.images, contents.shards)
    )
    files = ShardFiles(contents.shards, contents.root, storage)
    has_addresses = num_shards > 0 and config.uri_column not in (AUTO, None)
    if num_images and num_shards and not has_addresses and not hold_images(files):
        num_ignored, num_shards = num_ignored + num_shards, 0  # the shards are metadata about the images
    if num_images and num_shards and not has_addresses:
        raise ConfigError(
            f"{setting}={path} holds {num_images} images and {num_shards} Parquet shards; "
            f"point {setting} at a folder with one kind"
        )
    if num_shards:
        num_ignored += contents.bare.num_rows
        kept = list_shards(config, path, contents, storage)
        num_ignored += num_images - kept.num_listed
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
    notes = [*kept.notes, *of_tables, *note_on_parts(contents.parts, path, labelled=labelled)]
    kind: Literal["images", "parquet"] = "parquet" if "row_group" in kept.table.column_names else "images"
    if kind == "images":
        notes += note_on_archived(kept.table)
    manifest = Manifest(
        kept.table,
        kind,
        kept.root or contents.root,
        num_ignored,
        listed_as(config),
        kept.detected,
        tuple(notes),
        tuple(kept.damaged),
        kept.rows_per_group,
        contents.passed_over,
    )
    logger.info("%s: %d images, %d other objects ignored", path, manifest.num_images, num_ignored)
    return manifest


def _written_before(config: DataConfig, file: str, storage: StorageConfig) -> Manifest:
    folder, _, name = normal_uri(file).rpartition("/")
    there = Directory(folder or "/")
    anew = _command(config, folder, name)
    try:
        data = there.read(name)
    except MissingObject as error:
        raise DataError(f"data.manifest={file}: there is no such file; write one with `{anew}`") from error
    manifest = Manifest.read(data, f"data.manifest={file}", f"delete it, and write another with `{anew}`")
    for setting, now, then in manifest.misfits(config, auto_fits=True):
        if setting == "path":  # under its name the command lists the same path alone
            anew = _command(config, folder, _free_name(there.list()))
        remedy = f"set data.{setting}={_as_typed(then)}, or data.manifest to what `{anew}` writes"
        raise ConfigError(
            f"data.{setting}={now!r}, but data.manifest={file} was listed with {then!r}; {remedy}"
        )
    check_bucket(manifest.root, storage.access)
    return manifest


def _command(config: DataConfig, folder: str, name: str) -> str:
    """Return the command that lists what `config` asks for into a file like `name` in a folder."""
    numbered = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)-\d{4,}\.parquet", name)
    named = ("--name", numbered[1]) if numbered and numbered[1] != "manifest" else ()
    asked = {key: value for key, value in listed_as(config).items() if key != "path" and value != AUTO}
    settings = (f"data.{key}={_as_typed(value)}" for key, value in asked.items())
    return command("manifest", config.path, "--out", folder, *named, *settings)


def _as_typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _free_name(names: Sequence[str]) -> str:
    """Return the name of a manifest that begins as none of `names` does."""
    number = next(
        n for n in itertools.count(2) if not any(name.startswith(f"manifest{n}-") for name in names)
    )
    return f"manifest{number}-0001.parquet"


def _images(config: DataConfig, path: str, columns: dict[str, pa.ChunkedArray]) -> Found:
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
    if config.uri_column == AUTO:
        detected["uri_column"] = None
    elif config.uri_column is not None:
        raise ConfigError(
            f"data.uri_column={config.uri_column!r} is for Parquet, but {path} holds image objects; unset it, or point "
            "data.path at the Parquet files that name the images"
        )
    if config.label_from_parent is True and columns["label"].null_count == len(columns["label"]):
        raise ConfigError(
            f"data.label_from_parent=true, but no image of {path} lies in a folder below it; "
            "set data.label_from_parent=false"
        )
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
    return Found(sorted_by_key(columns), detected, notes)
