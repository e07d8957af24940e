"""Detect labels and columns for settings of `data` that are auto, from folder names, schemas and statistics.

Used once, when the manifest is built; the manifest stores the result. Pure functions; no storage and no Ray
here.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow as pa

from dinoray.models.commands import command
from dinoray.pipeline.data.columns import (
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
from dinoray.pipeline.data.signatures import begins_as_an_image

AUTO = "auto"
SPLIT_FOLDERS = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "holdout"}
)
"""Names of folders that hold parts of a data set, not classes."""

_SEPARATORS = "-_."
_NAMED_AS_A_SPLIT = rf"(?i:{'|'.join(sorted(SPLIT_FOLDERS))})"
_SPLIT = re.compile(rf"{_NAMED_AS_A_SPLIT}_?(?:19|20)?(?:\d\d)?")
"""Also with a year, as in COCO's train2017."""
STARTS_AS_A_SPLIT = rf"^{_NAMED_AS_A_SPLIT}[{_SEPARATORS}]"
"""Names of files whose part may be the split that they begin with."""
_STARTS_AS_A_SPLIT = re.compile(STARTS_AS_A_SPLIT)

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes")
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "label_name", "category", "target", "cls"),
    *("class_label", "class_id", "label_id", "fine_label"),
)
_KEY_COLUMNS = ("key", "__key__", "image_id", "id", "file_name", "filename", "path")
_NO_CLASSES = re.compile(r"[\d\s_.-]{4,}")
"""Folder names that are no classes: years, dates and numbered shards."""
_YEAR = re.compile(r"(19|20)\d\d")
_MONTH_OR_DAY = re.compile(r"0?[1-9]|[12]\d|3[01]")
_CAMERA_ROOT, _CAMERA_FOLDER = "dcim", re.compile(r"[1-9]\d\d[A-Z0-9_]{5}", re.IGNORECASE)
"""Folders of cameras by their file system standard (DCF): DCIM, and 100CANON or 101_PANA in it."""


class Columns(NamedTuple):
    """The columns of a Parquet data set, and notes on how they were chosen."""

    image: str
    key: str | None
    label: str | None
    notes: list[str]


def folder_label(folders: Sequence[str]) -> str | None:
    """Return the label in a file's folders, or None: `dog` for both `pets/dog` and `label=dog/split=1`."""
    for folder in reversed(folders):
        name, is_pair, value = folder.partition("=")
        if is_pair and name.lower() in LABEL_COLUMNS:
            return unquote(value)
    return folders[-1] if folders else None


def label_at(folders: Sequence[str], level: int | str) -> str | None:
    """Return the label in a file's folders: the folder at `level` (0 the top, -1 the parent), or None.

    For -1 as `folder_label`; for a text, the value of the innermost folder `level=value`.
    """
    if level == -1:
        return folder_label(folders)
    if isinstance(level, int):
        return folders[level] if -len(folders) <= level < len(folders) else None
    values = [unquote(folder.partition("=")[2]) for folder in folders if folder.startswith(f"{level}=")]
    return values[-1] if values else None


def automatic_label(folders: Sequence[str]) -> str | None:
    """Return the label as `folder_label`, or the path `/2023/01` for a folder that is no class by its place or name.

    Such a folder is a month or day below a year, or a camera's folder. No folder name has a slash.
    """
    if not folders or has_label_pair(folders):
        return folder_label(folders)
    *above, name = folders
    while above and _MONTH_OR_DAY.fullmatch(name) and _MONTH_OR_DAY.fullmatch(above[-1]):
        above.pop()
    is_date = bool(above) and _MONTH_OR_DAY.fullmatch(name) and _YEAR.fullmatch(above[-1])
    is_camera = _CAMERA_FOLDER.fullmatch(name) or any(folder.lower() == _CAMERA_ROOT for folder in folders)
    return f"/{'/'.join(folders)}" if is_date or is_camera else name


def has_label_pair(folders: Sequence[str]) -> bool:
    """Return True if one of the folders is `label=value`, as in partitioned tables."""
    return any("=" in folder and folder.partition("=")[0].lower() in LABEL_COLUMNS for folder in folders)


def is_class(label: str | None) -> bool:
    """Return True if a folder of this name may be a class."""
    return label is not None and _SPLIT.fullmatch(label) is None and not label.startswith("/")


def labels_from_folders(counts: Mapping[str | None, int]) -> tuple[bool, str]:
    """Return True if folder names are labels, and the reason. `counts`: number of images per folder name."""
    classes = {name: number for name, number in counts.items() if is_class(name)}
    labelled, total = sum(classes.values()), sum(counts.values())
    override = "data.label_from_parent=true takes folder names as labels"
    if any(name is not None and name.startswith("/") for name in counts) and len(classes) < 2:
        return False, f"no labels: the folders are named by dates or cameras; {override}"
    if not classes:
        inside = any(counts.get(name) for name in counts if name is not None)
        return False, "no labels: there are no class folders" + (f"; {override}" if inside else "")
    if len(classes) == 1:
        return False, f"no labels: one folder makes no classes; {override}"
    if 2 * labelled < total:
        return False, f"no labels: most images lie outside of class folders; {override}"
    if labelled < 2 * len(classes):
        return False, f"no labels: the {len(classes)} folders hold hardly more than an image each; {override}"
    if all(_NO_CLASSES.fullmatch(str(name)) for name in classes):
        return False, f"no labels: the folders are named by numbers or dates; {override}"
    return True, "labels from folder names; data.label_from_parent=false ignores them"


def part_of(folders: Sequence[str], name: str) -> str | None:
    """Return the part of a data set that a file is in.

    That is the path of the first folder that is named as a split (`images/train`), or the folder with the start of a
    name (`data/train-` of `data/train-00000-of-2`); else its top folder, if there is one.
    """
    for number, folder in enumerate(folders):
        if _SPLIT.fullmatch(folder):
            return "/".join(folders[: number + 1])
    if start := _STARTS_AS_A_SPLIT.match(name):
        return "/".join([*folders, start[0]])
    return folders[0] if folders else None


def is_split(part: str) -> bool:
    """Return True if a part of a data set is named as a split: `train`, `train2017`, or `train-`."""
    return _SPLIT.fullmatch(part.rpartition("/")[2].rstrip(_SEPARATORS)) is not None


def note_on_parts(parts: Collection[str | None], path: str, *, labelled: Collection[str]) -> list[str]:
    """Return a note if `path` holds training and evaluation parts side by side, since all are trained on.

    The note proposes an evaluation part only where it and the training part are `labelled`.
    """
    splits = sorted(part for part in parts if part is not None and is_split(part))
    splits.sort(key=lambda part: not _is_for_training(part))
    if len(splits) < 2 or not _is_for_training(splits[0]) or all(map(_is_for_training, splits)):
        return []
    others = [part for part in splits if not _is_for_training(part)]
    remedy = f"data.path={path}/{splits[0]}"
    with_labels = [part for part in others if part in labelled]
    if with_labels and splits[0] in labelled:
        remedy += f" eval.val_path={path}/{with_labels[0]}"
    of_names = any(part.endswith(tuple(_SEPARATORS)) for part in splits)
    patterns = [f"/{part}*" if part.endswith(tuple(_SEPARATORS)) else f"/{part}" for part in others]
    exclude = f"data.exclude='[{', '.join(patterns)}]'"
    shown = ", ".join(part.rstrip(_SEPARATORS) for part in splits)
    remedy = exclude if of_names or len(splits) - len(others) > 1 else f"{remedy} or {exclude}"
    return [f"{shown} are all trained on; {remedy} keeps them apart"]


def _is_for_training(part: str) -> bool:
    return part.rpartition("/")[2].lower().startswith("train")


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
