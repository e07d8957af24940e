"""The part of a manifest that comes from Parquet shards: their row groups, or the images that they name by address."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.contents import Contents
from dinoray.pipeline.data.detection import AUTO
from dinoray.pipeline.data.first_shard import Asked
from dinoray.pipeline.data.manifest_file import DETECTABLE
from dinoray.pipeline.data.row_groups import list_row_groups
from dinoray.pipeline.data.shards import ShardFiles
from dinoray.pipeline.data.sorting import sorted_by_key
from dinoray.pipeline.data.spill import most_in_memory
from dinoray.pipeline.data.uri_list import list_addresses, paths_alone
from dinoray.pipeline.storage.config import StorageConfig


class Found(NamedTuple):
    """The table of a manifest, the values of settings that were auto, and notes on them."""

    table: pa.Table
    detected: dict[str, Any]
    notes: list[str]
    damaged: Sequence[str] = ()
    rows_per_group: int | None = None
    root: str | None = None
    """Where the images lie, if not where the shards do."""
    num_listed: int = 0
    """Listed images that shards name."""


def list_shards(config: DataConfig, path: str, contents: Contents, storage: StorageConfig) -> Found:
    """Return the row groups of the shards, or the images that they name by address."""
    columns = dict(zip(contents.shards.column_names, contents.shards.columns, strict=True))
    files = ShardFiles(sorted_by_key(columns), contents.root, storage)
    asked = Asked(config.image_column, config.key_column, config.label_column, config.label_from_parent)
    uri_column = paths_alone(files) if config.uri_column == AUTO else config.uri_column
    if uri_column is not None:
        return _addressed(config, path, contents, files, uri_column, asked)
    found = list_row_groups(files, path=path, asked=asked, concurrency=config.fetch_concurrency)
    largest = pc.max(found.table["num_bytes"]).as_py()
    if largest > most_in_memory(config.row_group_cache_bytes):
        found.columns.notes.append(
            f"row groups of up to {largest / 1e9:.3g} GB are read through a file in the folder for temporary files; "
            f"`{command('pack', path, '--out', 'FOLDER')}` writes smaller ones"
        )
    values = (found.columns.image, found.columns.key, found.columns.label, found.from_folders, None)
    chosen = _chosen(config, values)
    return Found(found.table, chosen, found.columns.notes, found.damaged, found.rows_per_group)


def _addressed(
    config: DataConfig, path: str, contents: Contents, files: ShardFiles, uri_column: str, asked: Asked
) -> Found:
    if config.key_column not in (AUTO, None):
        raise ConfigError(
            f"data.key_column={config.key_column!r} is for rows of Parquet, but data.uri_column={uri_column!r} names "
            "objects, whose addresses are their keys; leave data.key_column out"
        )
    found = list_addresses(
        files,
        contents.images,
        contents.root,
        path=path,
        column=uri_column,
        asked=asked,
        concurrency=config.fetch_concurrency,
    )
    values = (config.image_column, None, found.label, config.label_from_parent is True, uri_column)
    return Found(
        found.table,
        _chosen(config, values),
        found.notes,
        found.damaged,
        root=found.root,
        num_listed=found.num_listed,
    )


def _chosen(config: DataConfig, values: Sequence[Any]) -> dict[str, Any]:
    """Return the values of the settings that are auto."""
    found = dict(zip(DETECTABLE, values, strict=True))
    return {name: value for name, value in found.items() if getattr(config, name) == AUTO}
