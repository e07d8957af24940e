"""The list of all images of a data set, made once: a row per image, or per row group of Parquet.

First in the flow: `data.path` -> manifest -> order (positions) -> source (bytes). A listing takes minutes for
millions of objects and may change between two starts. So the manifest is stored in the run directory and
reused: an index refers to the same image during the whole run. Reads no image; no Ray here.

Columns of the table, sorted by key in byte order:

    kind images    key  size  etag  label
    kind parquet   key  size  etag  row_group  num_rows  num_bytes  num_unlabelled  label?
    kind tar       key  size  etag  member  offset  num_bytes  chunk  label
    kind mixture   path  name  weight, and the manifest of each source

Key, size and etag are those of the object: the image, the Parquet file or the tar file. A chunk of a tar file is a
number of neighbouring images that are read together (kinds.py).

Settings of `data` that are auto are resolved here, by the rules of folder_labels.py and column_detection.py, and
stored with the table.
"""

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from dinoray.models.commands import command
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.bounds import Bound
from dinoray.pipeline.data.listing.choosing import ImageList, read_image_list
from dinoray.pipeline.data.listing.contents import (
    Contents,
    choose_listed,
    labelled_parts,
    list_contents,
    no_images,
    note_on_archived,
    without_shards,
)
from dinoray.pipeline.data.listing.folder_labels import AUTO, note_on_parts
from dinoray.pipeline.data.listing.ignored import UNADDRESSED, from_counts
from dinoray.pipeline.data.listing.shard_files import note_on_logs, without_logs
from dinoray.pipeline.data.manifests.listed_objects import list_objects
from dinoray.pipeline.data.manifests.listed_shards import list_shards, shards_of
from dinoray.pipeline.data.manifests.listed_tars import list_members
from dinoray.pipeline.data.manifests.manifest_file import Manifest, default_of, listed_as
from dinoray.pipeline.data.manifests.nameless import look_into
from dinoray.pipeline.data.parquet.first_shard import hold_images
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
                for source in manifest.sources or (manifest,):
                    check_bucket(source.root, storage.access)
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
    bound: Bound | None = None,
) -> Manifest:
    """List `config.path` (all pages, all folders), keep images by name, and sort by key.

    Instead reads `config.manifest`, if that is set; raises ConfigError if it was listed with other values.

    Errors name `setting`, the setting or argument that gave the path. `parts` are those of an interrupted listing.
    With a `bound`, the manifest is of a part of the data, for a look at it.

    Once the store has answered the first request, all others wait for it. Raises DataError if there are no
    images, listing fails, or most Parquet shards are damaged. Raises ConfigError if image objects and Parquet
    shards are mixed, or a column or option does not fit the data.
    """
    if config.manifest is not None:
        return _written_before(config, config.manifest, storage)
    if config.mix:
        listed = [_list_source(one, storage, parts) for one in config.each_source]
        return Manifest.mixture(config, listed)
    path = normal_uri(config.path)
    image_list, contents = _list_chosen(config, storage, setting=setting, parts=parts, bound=bound)
    contents = _of_one_kind(contents, config, storage, setting=setting)
    ignored, listed_notes = contents.ignored(), [*contents.notes, *note_on_logs(contents)]
    if contents.shards.num_rows:
        kept = list_shards(config, path, contents, storage)
        if _has_addresses(config):
            unnamed = contents.images.num_rows - kept.num_listed
            ignored = (*ignored, *from_counts({UNADDRESSED: unnamed}))
    elif contents.tars.num_rows:
        kept = list_members(config, path, contents, storage)
    else:
        columns = dict(zip(contents.images.column_names, contents.images.columns, strict=True))
        nothing = contents.images.schema.empty_table()
        contents = contents._replace(images=nothing)  # `columns` holds them alone, to be freed
        kept = list_objects(config, path, columns, image_list)
    labelled = (
        labelled_parts(kept.table, contents) if any(n.startswith("labels ") for n in kept.notes) else ()
    )
    notes = [*kept.notes, *listed_notes, *note_on_parts(contents.parts, path, labelled=labelled)]
    if kept.kind == "images":
        notes += note_on_archived(kept.table)
    root, num_ignored = kept.root or contents.root, sum(one.number for one in ignored)
    found = (root, num_ignored, listed_as(config), kept.detected, tuple(notes), tuple(kept.damaged))
    manifest = Manifest(kept.table, kept.kind, *found, kept.rows_per_group, ignored)
    logger.info("%s: %d images, %d other objects ignored", path, manifest.num_images, num_ignored)
    return manifest


def _list_chosen(
    config: DataConfig,
    storage: StorageConfig,
    *,
    setting: str,
    parts: ListingParts | None,
    bound: Bound | None,
) -> tuple[ImageList | None, Contents]:
    """List `config.path`; return `config.image_list`, if it is set, and what it or the content of files chooses."""
    patient = Patient(storage.give_up_after_seconds)
    contents = list_contents(
        config, setting=setting, retry_later=patient, storage=storage, parts=parts, bound=bound
    )
    contents = without_logs(contents)
    if config.image_list is None:
        return None, look_into(contents, config, storage)
    image_list = read_image_list(config, config.image_list)
    return image_list, choose_listed(contents, image_list)


def _of_one_kind(contents: Contents, config: DataConfig, storage: StorageConfig, *, setting: str) -> Contents:
    """Return the contents without Parquet that is about images beside it. Raises if no kind, or several, are left."""
    path = normal_uri(config.path)
    num_images, num_tars = contents.images.num_rows, contents.tars.num_rows
    has_addresses = contents.shards.num_rows > 0 and _has_addresses(config)
    is_beside = contents.shards.num_rows > 0 and (num_images or num_tars) and not has_addresses
    if is_beside and not hold_images(shards_of(contents, storage)):
        contents = without_shards(contents)  # they are metadata about the images
    num_shards = contents.shards.num_rows
    if has_addresses:
        num_images = 0  # the shards say which of them
    kinds = {"images": num_images, "Parquet shards": num_shards, "tar files": num_tars}
    if len(mixed := [f"{number} {kind}" for kind, number in kinds.items() if number]) > 1:
        exclude = "*.parquet" if num_shards else "*.tar"
        raise ConfigError(
            f"{setting}={path} holds {' and '.join(mixed)}; leave out one kind with data.exclude='{exclude}', or point "
            f"{setting} at a folder with one kind"
        )
    if not mixed:
        raise no_images(contents, path, setting=setting)
    return contents


def _has_addresses(config: DataConfig) -> bool:
    return config.uri_column not in (AUTO, None)


def _list_source(config: DataConfig, storage: StorageConfig, parts: ListingParts | None) -> Manifest:
    """List one source of a mix. Settings of columns are for those of its sources that have columns."""

    def listed(settings: DataConfig) -> Manifest:
        with contextlib.nullcontext() if parts is None else parts.of_source() as own:
            return build_manifest(settings, storage, setting="data.mix", parts=own)

    without = config.model_copy(update=dict.fromkeys(("key_column", "label_column", "uri_column"), AUTO))
    try:
        return listed(config)
    except ConfigError:
        if config == without:
            raise
        manifest = listed(without)
        if manifest.of_kind.has_columns:
            raise
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
    asked = {
        key: value for key, value in listed_as(config).items() if key != "path" and value != default_of(key)
    }
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
