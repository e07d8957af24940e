"""Detect the columns of Parquet for settings of `data` that are auto, from schemas and first values.

Used once, when the manifest is built; the manifest stores the result. Pure functions; no storage and no Ray here.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import pyarrow as pa

from dinoray.models.commands import command
from dinoray.pipeline.data.decoding.signatures import begins_as_an_image
from dinoray.pipeline.data.listing.folder_labels import AUTO, LABEL_COLUMNS
from dinoray.pipeline.data.parquet.columns import (
    MisfitShard,
    byte_columns,
    class_names,
    features,
    image_leaf,
    is_bytes,
    is_name,
    is_text,
    once,
)

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes")
_KEY_COLUMNS = ("key", "__key__", "image_id", "id", "file_name", "filename", "path")


class Columns(NamedTuple):
    """The columns of a Parquet data set, and notes on how they were chosen."""

    image: str
    key: str | None
    label: str | None
    notes: list[str]


def detect_columns(
    schema: pa.Schema,
    *,
    uri: str,
    image: str,
    key: str | None,
    label: str | None,
    first_bytes: Callable[[str], bytes | None],
    is_unique: Callable[[str], bool],
) -> Columns:
    """Return the columns of the shard at `uri`. A name or None is kept; `auto` is detected.

    `first_bytes` reads the first value of a column of bytes. `is_unique` returns True if the first rows of a
    column differ. Raises ConfigError if no column holds images.
    """
    notes: list[str] = []
    if image == AUTO:
        image = _image_column(schema, uri, first_bytes, notes)
    if label == AUTO:
        names = [field.name for field in once(schema)]
        classes = [name for name in names if features(schema).get(name, {}).get("_type") == "ClassLabel"]
        named = _named(schema, LABEL_COLUMNS, classes) or next(iter(classes), None)
        label = named or _named(schema, LABEL_COLUMNS)
        if label is None:
            notes.append("no labels: no column is named like one; data.label_column=NAME takes one")
        else:
            notes.append(f"labels from column {label!r}; data.label_column=null ignores them")
    if key == AUTO:
        named = [name for name in _all_named(schema, _KEY_COLUMNS) if name not in (image, label)]
        key = next((name for name in named if is_unique(name)), None)
    return Columns(image, key, label, notes)


def other_label_column(schema: pa.Schema, column: str) -> str | None:
    """Return a column of text that is named like a label, besides `column`, unless that has text too."""
    texts = [field.name for field in schema if is_text(field.type)]
    has_names = column in texts or class_names(schema, column) is not None
    return None if has_names else _named(schema, LABEL_COLUMNS, texts)


def _image_column(
    schema: pa.Schema, uri: str, first_bytes: Callable[[str], bytes | None], notes: list[str]
) -> str:
    columns = byte_columns(schema)
    if not columns:
        for name in (field.name for field in schema if is_bytes(field.type)):
            image_leaf(schema, name, uri)  # raises: it is there twice
        kinds = ", ".join(f"{field.name!r} ({field.type})" for field in schema) or "no column"
        raise MisfitShard(
            f"{uri} has no column of image bytes; it has {kinds}; write the encoded images into a binary column, one "
            f"per row (`{command('pack')}` does so for image files), set data.uri_column to a column of addresses of "
            "images, or point data.path at the images themselves"
        )
    marked = [name for name in columns if _is_marked(schema, name)]
    best = _named(schema, _IMAGE_COLUMNS, marked or columns) or next(iter(marked), None)
    if best is None and len(columns) > 1:
        best = next((name for name in columns if begins_as_an_image(first_bytes(name) or b"")), None)
    chosen = best or columns[0]
    others = [name for name in columns if name != chosen]
    if others:
        notes.append(f"column {chosen!r} holds the images; data.image_column={others[0]} takes another")
    return chosen


def is_named_as_images(schema: pa.Schema, column: str) -> bool:
    """Return True if a column of bytes is named like one of images, or noted as such by Hugging Face's `datasets`."""
    return _is_marked(schema, column) or bool(_all_named(schema, _IMAGE_COLUMNS, [column]))


def _is_marked(schema: pa.Schema, column: str) -> bool:
    return features(schema).get(column, {}).get("_type") == "Image"


def _all_named(schema: pa.Schema, names: Sequence[str], among: Collection[str] | None = None) -> list[str]:
    """Return the columns with one of `names`, in the order of `names`.

    Candidates are the columns in `among`, or all columns of plain values if it is None.
    """
    plain = [f.name for f in once(schema) if is_name(f.type)] if among is None else list(among)
    plain_names = [column.lower().removesuffix(".bytes") for column in plain]
    return [
        column for name in names for column, found in zip(plain, plain_names, strict=True) if found == name
    ]


def _named(schema: pa.Schema, names: Sequence[str], among: Collection[str] | None = None) -> str | None:
    return next(iter(_all_named(schema, names, among)), None)
