"""The part of a manifest that comes from image objects: their labels by folders or by a list. Lists nothing."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import ConfigError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.choosing import ImageList
from dinoray.pipeline.data.listing.folder_labels import AUTO, is_class, labels_from_folders
from dinoray.pipeline.data.listing.sorting import sorted_by_key
from dinoray.pipeline.data.manifests.found import Found


def list_objects(
    config: DataConfig, path: str, columns: dict[str, pa.ChunkedArray], image_list: ImageList | None
) -> Found:
    """Return the images among listed objects; takes the columns out of `columns`, which may be large.

    Raises ConfigError if a setting is for other kinds of data, or there are no labels where a setting says so.
    """
    detected: dict[str, Any] = {}
    listed_label = image_list and image_list.label_column
    for name, found in (("key_column", None), ("label_column", listed_label)):
        if getattr(config, name) == AUTO:
            detected[name] = found
        elif getattr(config, name) is not None and image_list is None:
            raise ConfigError(
                f"data.{name}={getattr(config, name)!r} is for Parquet and data.image_list, but {path} holds image "
                "objects; unset it (labels of image objects: data.label_from_parent=true)"
            )
    if config.uri_column == AUTO:
        detected["uri_column"] = None
    elif config.uri_column is not None:
        raise ConfigError(
            f"data.uri_column={config.uri_column!r} is for Parquet, but {path} holds image objects; unset it, or point "
            "data.path at the Parquet files that name the images"
        )
    folders = config.from_folders
    if folders is True and listed_label is not None:
        raise ConfigError(
            f"data.label_from_parent=true or data.label_level, and column {listed_label!r} of data.image_list, both "
            "say where labels are; set data.label_column=null, or leave out the former"
        )
    if folders is True and columns["label"].null_count == len(columns["label"]):
        if config.label_level != -1:
            raise ConfigError(
                f"data.label_level={config.label_level}, but no image of {path} lies in such a folder; set another "
                "level (0 is the top folder), or leave it out"
            )

        raise ConfigError(
            f"data.label_from_parent=true, but no image of {path} lies in a folder below it; "
            "set data.label_from_parent=false"
        )
    notes = []
    if config.label_from_parent == AUTO and (listed_label is not None or folders is True):
        detected["label_from_parent"] = folders is True
        notes += [f"labels from folders of data.label_level={config.label_level}"] if folders is True else []
    elif folders == AUTO:
        labels = columns["label"]
        counts = {row["values"]: row["counts"] for row in labels.value_counts().to_pylist()}
        detected["label_from_parent"], note = labels_from_folders(counts)
        notes.append(note)
        classes = [name for name in counts if detected["label_from_parent"] and is_class(name)]
        columns["label"] = pc.if_else(
            pc.is_in(labels, pa.array(classes, pa.string())), labels, pa.scalar(None, pa.string())
        )
        del labels
    return Found("images", sorted_by_key(columns), detected, notes)
