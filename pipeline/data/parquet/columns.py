"""Columns of Parquet that others write: where a named column lies, and its values as bytes or as text.

A name is a column's, or leads into structs: `image.bytes` is the field `bytes` of `image`, unless a column has that
very name. Arrow's wrappers (extension types, dictionaries, views) are looked through. Pure functions; no files.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import ConfigError

_MOST_DIGEST_BYTES = 64
"""Width up to which a column of fixed width holds ids or digests, not images."""
_SETTINGS = "set data.image_column, data.key_column and data.label_column to names among these"


_Found: TypeAlias = tuple[tuple[str, ...], pa.DataType]
"""The names that lead to a column, and its type."""


class MisfitShard(ConfigError):  # noqa: N818
    """A column is missing, or of a type that cannot be used: another shard of the set may have it."""


class Leaf(NamedTuple):
    """A column without fields of its own: the names that lead to it, and its type without wrappers."""

    path: tuple[str, ...]
    type: pa.DataType

    @property
    def name(self) -> str:
        """Its name in the file's own schema."""
        return ".".join(self.path)

    def of(self, batch: pa.RecordBatch) -> pa.Array:
        """Return its values in rows that were read, without wrappers: null where a struct above is."""
        values = unwrapped(batch.column(batch.schema.get_field_index(self.path[0])))
        for name in self.path[1:]:
            values = unwrapped(pc.struct_field(values, [values.type.get_field_index(name)]))
        return values


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type without extensions and dictionaries."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def unwrapped(values: pa.Array) -> pa.Array:
    """Return the values as `plain_type` of theirs."""
    while True:
        if isinstance(values.type, pa.BaseExtensionType):
            values = values.storage
        elif pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        else:
            return values


def once(schema: pa.Schema | pa.StructType) -> list[pa.Field]:
    """Return the fields whose names are there once."""
    names = [field.name for field in schema]
    return [field for field in schema if names.count(field.name) == 1]


def is_bytes(kind: pa.DataType) -> bool:
    """Return True for binary, and for the {bytes, path} struct of image data sets on the Hugging Face Hub."""
    kind = plain_type(kind)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and is_bytes(kind.field(index).type)
    if pa.types.is_fixed_size_binary(kind):
        return bool(kind.byte_width > _MOST_DIGEST_BYTES)
    return _is_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """Return True for text in any of Arrow's layouts."""
    kind = plain_type(kind)
    return any(is_(kind) for is_ in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def is_name(kind: pa.DataType) -> bool:
    """Return True if values of this type can be keys or classes: text, integers, booleans, UUIDs."""
    kind = plain_type(kind)
    is_id = pa.types.is_fixed_size_binary(kind) and kind.byte_width <= _MOST_DIGEST_BYTES
    return is_id or is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def byte_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the columns of bytes; where there is none, those of fields of structs."""
    names = [name for name, kind in _fields(schema) if is_bytes(kind)]
    return [name for name in names if name in schema.names] or names


def path_columns(schema: pa.Schema) -> list[str]:
    """Return the names of text fields `path` in structs: images that Hugging Face's `datasets` left outside."""
    return [f"{name}.path" for name, kind in _fields(schema) if _has_path(kind)]


def image_leaf(schema: pa.Schema, column: str, uri: str) -> Leaf:
    """Return the column of encoded images. Raises MisfitShard if it is missing, there twice, or holds no bytes."""
    path, kind = _found(schema, column, uri)
    inner = plain_type(kind)
    while pa.types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
        path, inner = (*path, "bytes"), plain_type(inner.field("bytes").type)
    if _is_binary(inner) or pa.types.is_fixed_size_binary(inner):
        return Leaf(path, inner)
    remedy = "set data.image_column to such a column"
    if is_text(inner):
        remedy += f", or data.uri_column={column} if it holds addresses of images"
    elif pa.types.is_struct(inner) and inner.get_field_index("path") >= 0:
        remedy += f", or data.uri_column={column}.path to read the images that it names"
    elif pa.types.is_nested(inner):
        remedy = "write one encoded image per row, and " + remedy
    raise MisfitShard(
        f"data.image_column={column!r} of {uri} holds {kind}; "
        "it must hold the encoded image as binary, or as a struct with a binary field 'bytes'; " + remedy
    )


def text_leaf(schema: pa.Schema, column: str, uri: str) -> Leaf:
    """Return the column of keys, labels or addresses. Raises MisfitShard if it is missing, there twice or nested."""
    path, kind = _found(schema, column, uri)
    if pa.types.is_nested(plain_type(kind)):
        raise MisfitShard(
            f"column {column!r} of {uri} holds {kind}, but a key or label is one value; "
            "set data.key_column and data.label_column to other columns, or to null"
        )
    return Leaf(path, plain_type(kind))


def has_column(schema: pa.Schema, column: str) -> bool:
    """Return True if the schema has a column, or a field of a struct, of this name."""
    return bool(_all_found(schema, column))


def as_text(values: pa.Array, names: Sequence[str] | None = None) -> pa.Array:
    """Return values without wrappers as text: numbers in decimal, ids and digests in hexadecimal, NaN as null.

    Bytes that are printable UTF-8 are that text. With `names`, of Hugging Face's ClassLabel, an integer is the name
    with this number, and null if there is none: -1 is written for no label.
    """
    kind = values.type
    if names is not None and pa.types.is_integer(kind):
        numbers = values.to_pylist()
        return pa.array(
            [names[n] if n is not None and 0 <= n < len(names) else None for n in numbers], pa.string()
        )
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([None if value is None else value.hex() for value in values.to_pylist()], pa.string())
    if _is_binary(kind):
        return pa.array(
            [None if value is None else _printed(value) for value in values.to_pylist()], pa.string()
        )
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, kind), values)
    try:
        return values.cast(pa.string())
    except pa.ArrowException:  # a time zone that this machine does not know, a type without a text
        if pa.types.is_timestamp(kind):
            return values.cast(pa.timestamp(kind.unit)).cast(pa.string())
        return pa.array([None if value is None else str(value) for value in values.to_pylist()], pa.string())


def class_names(schema: pa.Schema, column: str | None) -> Sequence[str] | None:
    """Return the names of the classes that an integer column counts, if Hugging Face's `datasets` noted them."""
    feature = features(schema).get(column or "", {})
    names = feature.get("names")
    return (
        [str(name) for name in names]
        if feature.get("_type") == "ClassLabel" and isinstance(names, list)
        else None
    )


def features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return column -> feature for a file written by Hugging Face's `datasets`; otherwise an empty dict."""
    return _features((schema.metadata or {}).get(b"huggingface", b"{}"))


@lru_cache(maxsize=8)
def _features(note: bytes) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(note)["info"]["features"]
        return {str(name): feature for name, feature in found.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_binary(kind: pa.DataType) -> bool:
    return any(is_(kind) for is_ in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _has_path(kind: pa.DataType) -> bool:
    index = kind.get_field_index("path") if pa.types.is_struct(kind) else -1
    return index >= 0 and is_text(kind.field(index).type)


def _printed(value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.hex()
    return text if text.isprintable() else value.hex()


def _fields(schema: pa.Schema | pa.StructType, above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Yield (dotted name, type) of the columns and of the fields of structs, at any depth above image bytes."""
    for field in once(schema):
        name, kind = f"{above}{field.name}", plain_type(field.type)
        yield name, kind
        if pa.types.is_struct(kind) and not is_bytes(kind):
            yield from _fields(kind, f"{name}.")


def _all_found(schema: pa.Schema | pa.StructType, column: str) -> list[tuple[tuple[str, ...], pa.DataType]]:
    exact: list[tuple[tuple[str, ...], pa.DataType]] = [
        ((column,), field.type) for field in schema if field.name == column
    ]
    if exact:
        return exact
    inner = ((field.name, plain_type(field.type)) for field in schema if column.startswith(f"{field.name}."))
    return [
        ((name, *path), found)
        for name, kind in inner
        if pa.types.is_struct(kind)
        for path, found in _all_found(kind, column[len(name) + 1 :])
    ]


def _found(schema: pa.Schema, column: str, uri: str) -> "_Found":
    found = _all_found(schema, column)
    if not found:
        has = ", ".join(dict.fromkeys(map(repr, schema.names))) or "none"
        raise MisfitShard(f"{uri} has no column {column!r}; it has {has}; {_SETTINGS}")
    path, kind = found[0]
    if len(found) > 1 or schema.names.count(path[0]) > 1:
        raise MisfitShard(
            f"{uri} has {max(len(found), schema.names.count(path[0]))} columns {path[0]!r}, and which is meant cannot "
            f"be told; choose another column, or write the file again with names that differ"
        )
    return path, kind
