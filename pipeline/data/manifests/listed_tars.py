"""The part of a manifest that comes from tar files: the images in them, by the settings of `data`."""

from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.contents import Contents
from dinoray.pipeline.data.listing.folder_labels import AUTO
from dinoray.pipeline.data.listing.sorting import sorted_by_key
from dinoray.pipeline.data.manifests.found import Found, settled
from dinoray.pipeline.data.tar.tar_index import Wanted
from dinoray.pipeline.data.tar.tars import list_tars
from dinoray.pipeline.storage.config import StorageConfig


def list_members(config: DataConfig, path: str, contents: Contents, storage: StorageConfig) -> Found:
    """Return the images in the tar files of `contents`. Raises ConfigError if a setting is for Parquet."""
    for name in ("key_column", "uri_column"):
        if getattr(config, name) not in (AUTO, None):
            raise ConfigError(
                f"data.{name}={getattr(config, name)!r} is for Parquet, but {path} holds tar files, whose images are "
                f"named by their members; set data.{name}=null"
            )
    tars = contents.tars
    found = list_tars(
        sorted_by_key(dict(zip(tars.column_names, tars.columns, strict=True))),
        path=path,
        prefix=contents.prefix,
        root=contents.root,
        wanted=Wanted(config.image_column, config.label_column),
        from_folders=config.from_folders,
        concurrency=config.fetch_concurrency,
        storage=storage,
    )
    values = (config.image_column, None, found.label_column, found.from_folders, None)
    return Found("tar", found.table, settled(config, values), found.notes, found.unusable)
