"""The part of a manifest that comes from Parquet shards: their row groups, or the images that they name by address."""

import pyarrow.compute as pc

from dinoray.models.commands import command
from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.contents import Contents
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.listing.sorting import sorted_by_key
from dinoray.pipeline.data.manifests.found import Found, settled
from dinoray.pipeline.data.parquet.first_shard import Asked
from dinoray.pipeline.data.parquet.row_groups import list_row_groups
from dinoray.pipeline.data.parquet.shards import ShardFiles
from dinoray.pipeline.data.parquet.spill import most_in_memory
from dinoray.pipeline.data.parquet.uri_list import list_addresses, paths_alone
from dinoray.pipeline.storage.config import StorageConfig


def shards_of(contents: Contents, storage: StorageConfig) -> ShardFiles:
    """Return the shards of a data set, sorted by key."""
    columns = dict(zip(contents.shards.column_names, contents.shards.columns, strict=True))
    return ShardFiles(sorted_by_key(columns), contents.root, storage)


def list_shards(config: DataConfig, path: str, contents: Contents, storage: StorageConfig) -> Found:
    """Return the row groups of the shards, or the images that they name by address."""
    files = shards_of(contents, storage)
    asked = Asked(config.image_column, config.key_column, config.label_column, config.from_folders)
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
    chosen = settled(config, values)
    return Found("parquet", found.table, chosen, found.columns.notes, found.damaged, found.rows_per_group)


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
        "images",
        found.table,
        settled(config, values),
        found.notes,
        found.damaged,
        root=found.root,
        num_listed=found.num_listed,
    )
