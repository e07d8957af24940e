"""The labels of images in tar files: texts beside the images, or the folders that they lie in. Pure functions."""

from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import ConfigError
from dinoray.models.settings import Auto
from dinoray.pipeline.data.listing.folder_labels import (
    AUTO,
    automatic_label,
    folder_label,
    is_class,
    labels_from_folders,
)
from dinoray.pipeline.data.tar.tar_index import CLASS


class Labels(NamedTuple):
    """Labels, and where they are from."""

    of_images: pa.ChunkedArray
    """A text for each image, null without one."""
    column: str | None
    """`data.label_column`: the extension of the members that they are from."""
    from_folders: bool
    notes: list[str]


def find_labels(
    table: pa.Table,
    texts: pa.ChunkedArray,
    *,
    prefix: str,
    path: str,
    asked: str | None,
    from_folders: bool | Auto,
) -> Labels:
    """Return the labels of the images in `table`: key (that of the tar file, which begins with `prefix`) and member.

    `texts` are those of the members that `asked`, which is `data.label_column`, names. If both settings are auto, texts
    of two classes or more go before folders. Raises ConfigError for a setting that does not fit.
    """
    is_named = asked not in (AUTO, None)
    if is_named and from_folders is True:
        raise ConfigError(
            f"data.label_from_parent=true and data.label_column={asked!r} both say where labels are; "
            "leave out one of them"
        )
    if is_named and texts.null_count == len(texts):
        raise ConfigError(
            f"data.label_column={asked!r}: no image in the tar files of {path} has such a text beside it; "
            f"set it to the extension of members that hold labels, as {CLASS!r}, to 'json.FIELD', or to null"
        )
    if is_named or (asked == AUTO and from_folders is not True and pc.count_distinct(texts).as_py() > 1):
        column = CLASS if asked in (AUTO, None) else asked
        notes = [f"labels from .{column} members; data.label_column=null ignores them"]
        if texts.null_count:
            notes.append(f"{texts.null_count} images have no label")
        return Labels(texts, column, False, notes)
    folders = _of_folders(table, prefix, automatic=from_folders == AUTO)
    if from_folders is True and folders.null_count == len(folders):
        raise ConfigError(
            f"data.label_from_parent=true, but no image of {path} lies in a folder; set data.label_from_parent=false"
        )
    if from_folders is True:
        return Labels(folders, None, True, [])
    none = pa.chunked_array([pa.nulls(len(folders), pa.string())])
    if from_folders is False:
        return Labels(none, None, False, [])
    counts = {one["values"]: one["counts"] for one in folders.value_counts().to_pylist()}
    are_labels, note = labels_from_folders(counts)
    if not are_labels:
        return Labels(none, None, False, [note])
    classes = pa.array([name for name in counts if is_class(name)], pa.string())
    return Labels(
        pc.if_else(pc.is_in(folders, classes), folders, pa.scalar(None, pa.string())), None, True, [note]
    )


def _of_folders(table: pa.Table, prefix: str, *, automatic: bool) -> pa.ChunkedArray:
    """Return the label in the folders of each image: those in its tar file lie in those of the file itself."""
    label_of = automatic_label if automatic else folder_label
    outer = pc.utf8_slice_codeunits(table["key"].cast(pa.large_string()), len(prefix))
    names = (
        pc.replace_substring_regex(path, "[^/]*$", "", max_replacements=1)
        for path in (outer, table["member"])
    )
    folders = (
        pc.binary_join_element_wise(*names, pa.scalar("", pa.large_string()))
        .combine_chunks()
        .dictionary_encode()
    )
    labels = [
        label_of([name for name in folder.split("/") if name not in ("", ".")])
        for folder in folders.dictionary.to_pylist()
    ]
    return pa.chunked_array([pa.array(labels, pa.string()).take(folders.indices)])
