"""Which of the listed objects are used: patterns of `data.include` and `data.exclude`, and the file `data.image_list`.

Stands between the listing and the manifest. Reads only the file; no Ray here.
"""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.folder_labels import AUTO, LABEL_COLUMNS
from dinoray.pipeline.data.listing.ignored import some_names
from dinoray.pipeline.storage.files import Directory, MissingObject, normal_uri

_KEY_COLUMNS = (
    *("key", "__key__", "file_name", "filename", "file", "path", "image_path", "image", "img", "name"),
    *("uri", "url", "s3_key", "object", "image_id", "id"),
)
_MAGIC = re.compile(r"[*?]|\[.+\]|\{.+,.+\}")
_PART = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^]]+\]|\{[^{}]*\}|.", re.DOTALL)


def pattern_remedy(setting: str, path: str) -> str | None:
    """Return what to set instead of a pattern in `path`, which comes from `setting`; None if there is none."""
    parts = path.split("/")
    place = next((number for number, part in enumerate(parts) if _MAGIC.search(part)), None)
    if place is None:
        return None
    if setting.startswith("eval."):
        return f"patterns are not supported there: set {setting} to a folder"
    folder, pattern = "/".join(parts[:place]) or "/", "/".join(parts[place:])
    return f"a pattern belongs in data.include: set {setting}={folder} data.include='/{pattern}'"


def regex_of(pattern: str) -> str:
    """Return the regular expression (RE2) of a pattern for names relative to `data.path`.

    `*` and `?` match no slash, `**` matches any folders, and there are `[abc]`, `[!abc]` and `{jpg,png}`. A pattern
    without a slash matches at any depth. A pattern that matches a folder matches all that is in it.
    """
    body = "".join(_translated(part) for part in _PART.findall(pattern.strip("/")))
    anywhere = "" if "/" in pattern.strip("/") or pattern.startswith("/") else "(?:.*/)?"
    return f"(?s)^{anywhere}(?:{body})(?:/.*)?$"


def _translated(part: str) -> str:
    fixed = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if part in fixed:
        return fixed[part]
    if len(part) > 1 and part[0] == "[":
        inside = part[1:-1].replace("\\", r"\\").replace("[", r"\[")
        return f"[{'^/' + inside[1:] if inside[0] == '!' else inside.replace('^', chr(92) + '^')}]"
    if len(part) > 1:
        alternatives = part[1:-1].split(",")
        return f"(?:{'|'.join(''.join(map(_translated, _PART.findall(one))) for one in alternatives)})"
    return re.escape(part)


class Patterns:
    """Which names below `data.path` the settings `include` and `exclude` choose."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include, self._exclude = ("|".join(map(regex_of, some)) for some in (include, exclude))

    def __bool__(self) -> bool:
        return bool(self._include or self._exclude)

    def chosen(self, names: pa.Array) -> pa.Array:
        """Return a boolean for each name: included, or nothing is named to be included, and not excluded."""
        chosen = pc.match_substring_regex(names, self._include or "")
        if self._exclude:
            chosen = pc.and_not(chosen, pc.match_substring_regex(names, self._exclude))
        return chosen


class ImageList(NamedTuple):
    """The keys in a file, relative to `data.path`, each once, and their labels; `label_column` is None without any."""

    keys: pa.Array
    labels: pa.Array
    label_column: str | None
    notes: list[str]

    def choose(self, objects: pa.Table, prefix: str) -> tuple[pa.Table, list[str]]:
        """Return the rows of the objects that are named, with the labels of the list, and notes on other keys.

        Raises ConfigError if there are none.
        """
        names = pc.utf8_slice_codeunits(objects["key"], len(prefix))
        places = pc.index_in(names, self.keys)
        found = objects.filter(places.is_valid())
        missing = self.keys.filter(pc.invert(pc.is_in(self.keys, names.filter(places.is_valid()))))
        if not found.num_rows:
            seen = (
                f"there is {some_names(names.slice(0, 2).to_pylist())}" if len(names) else "nothing is there"
            )
            raise ConfigError(
                f"data.image_list: none of its {len(self.keys)} keys is at data.path: it has "
                f"{some_names(self.keys.slice(0, 2).to_pylist())}, {seen}; write keys relative to data.path"
            )
        if self.label_column is not None:
            labels = self.labels.take(places.drop_null().combine_chunks())
            found = found.set_column(found.schema.get_field_index("label"), "label", labels)
        notes = list(self.notes)
        if len(missing):
            shown = some_names(missing.slice(0, 5).to_pylist(), max(0, len(missing) - 5))
            notes.append(f"{len(missing)} keys of data.image_list are not there: {shown}")
        return found, notes


def read_image_list(config: DataConfig, file: str) -> ImageList:
    """Read `file`, which is the setting `image_list`: CSV (comma or tab), Parquet, or a text with a key a line.

    Raises DataError if there is no such file, ConfigError if it cannot be read or has no column of keys.
    """
    folder, _, name = normal_uri(file).rpartition("/")
    try:
        data = Directory(folder or "/").read(name)
    except MissingObject as error:
        raise DataError(f"data.image_list={file}: there is no such file; check the path") from error
    try:
        table = pq.read_table(pa.BufferReader(data)) if data.startswith(b"PAR1") else _read_text(data)
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"data.image_list={file} is neither CSV nor Parquet ({one_line(error, limit=200)}); write a column of "
            "keys, and one of labels if there are any"
        ) from error
    key = _column(table, config.key_column, _KEY_COLUMNS)
    if key is None and table.num_columns == 1:
        key = table.column_names[0]
    if key is None:
        asked = "" if config.key_column in (AUTO, None) else f"no column {config.key_column!r}; "
        raise ConfigError(
            f"data.image_list={file} has {asked or 'no column of keys; '}it has {', '.join(table.column_names)}; set "
            "data.key_column to one of them"
        )
    label = None if config.label_column is None else _column(table, config.label_column, LABEL_COLUMNS)
    if label is None and config.label_column not in (AUTO, None):
        raise ConfigError(
            f"data.image_list={file} has no column {config.label_column!r}; it has {', '.join(table.column_names)}; "
            "set data.label_column to one of them, or to null"
        )
    return _image_list(table, key, label, config)


def _image_list(table: pa.Table, key: str, label: str | None, config: DataConfig) -> ImageList:
    keys = pc.utf8_trim_whitespace(_texts(table, key, "key_column")).cast(pa.large_string())
    base = f"{normal_uri(config.path).rstrip('/')}/"
    keys = pc.if_else(pc.starts_with(keys, base), pc.utf8_slice_codeunits(keys, len(base)), keys)
    keys = pc.replace_substring_regex(keys, r"^(?:\./)+", "")
    labels = pa.nulls(len(keys), pa.string()) if label is None else _texts(table, label, "label_column")
    first = (
        pa.table({"key": keys, "row": pa.array(np.arange(len(keys)))})
        .group_by("key")
        .aggregate([("row", "min")])
    )
    rows = (
        first["row_min"].filter(pc.fill_null(pc.not_equal(first["key"], ""), False)).combine_chunks().sort()
    )
    repeated = len(keys) - len(rows)
    notes = [] if label is None else [f"labels from column {label!r} of data.image_list"]
    if repeated:
        notes.append(f"{repeated} rows of data.image_list are empty or repeat a key, whose first row counts")
    return ImageList(keys.take(rows), labels.take(rows), label, notes)


def _texts(table: pa.Table, name: str, setting: str) -> pa.Array:
    """Return a column as text, null where it is empty. Raises ConfigError if it holds something else."""
    column = table.column(table.column_names.index(name))
    try:
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        texts = column.cast(pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise ConfigError(
            f"data.image_list: column {name!r} is of type {column.type}, which is no text; set data.{setting} to "
            "another"
        ) from error
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _column(table: pa.Table, asked: str | None, names: Sequence[str]) -> str | None:
    if asked not in (AUTO, None):
        return asked if asked in table.column_names else None
    lower = {name.lower().strip(): name for name in reversed(table.column_names)}
    return next((lower[name] for name in names if name in lower), None)


def _read_text(data: bytes) -> pa.Table:
    """Return the columns of a CSV as text. A lone column whose first line is no name of one has no header."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    first = data.partition(b"\n")[0].decode()
    delimiter = "\t" if "\t" in first and "," not in first else ","
    header = next(csv.reader(io.StringIO(first.rstrip("\r")), delimiter=delimiter), [])
    if len(header) < 2 and first.strip().lower() not in _KEY_COLUMNS:
        lines = data.decode().split("\n")
        return pa.table({"key": pa.array(lines, pa.large_string())})
    return pa_csv.read_csv(
        pa.BufferReader(data),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=True, null_values=[""]
        ),
    )
