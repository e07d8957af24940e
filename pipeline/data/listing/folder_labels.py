"""Detect labels for settings of `data` that are auto, and parts of a data set, from the names of folders.

Used once, when the manifest is built; the manifest stores the result. Pure functions; no storage and no Ray here.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import unquote

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
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "label_name", "category", "target", "cls"),
    *("class_label", "class_id", "label_id", "fine_label"),
)
_NO_CLASSES = re.compile(r"[\d\s_.-]{4,}")
"""Folder names that are no classes: years, dates and numbered shards."""
_YEAR = re.compile(r"(19|20)\d\d")
_MONTH_OR_DAY = re.compile(r"0?[1-9]|[12]\d|3[01]")
_CAMERA_ROOT, _CAMERA_FOLDER = "dcim", re.compile(r"[1-9]\d\d[A-Z0-9_]{5}", re.IGNORECASE)
"""Folders of cameras by their file system standard (DCF): DCIM, and 100CANON or 101_PANA in it."""


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
