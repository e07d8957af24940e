"""List what lies at `data.path`, by role, and pass over what this program wrote there: runs, studies, tables.

Stands between the listing and the manifest. Recognises output by the names of its files, so it needs no request
besides the listing. No Ray here.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import DataError
from dinoray.models.settings import Auto
from dinoray.pipeline.data.classify import CONFIG, EMBEDDINGS, OF_A_RUN, PACKED, STUDY, Classifier
from dinoray.pipeline.data.detection import is_split
from dinoray.pipeline.data.listing import Listing, is_pattern, list_entries
from dinoray.pipeline.storage.config import SIGNED, Access
from dinoray.pipeline.storage.files import normal_uri
from dinoray.pipeline.storage.listing_parts import ListingParts, OutdatedPartsError
from dinoray.pipeline.storage.progress import Count, counting
from dinoray.pipeline.storage.retry import Retry

logger = logging.getLogger(__name__)

_KINDS = {
    "run": ("run directory", "run directories"),
    "study": ("study", "studies"),
    "embeddings": ("table of embeddings", "tables of embeddings"),
    "packed": ("packed set", "packed sets"),
}
_ARCHIVED = ("GLACIER", "DEEP_ARCHIVE")
"""Storage classes whose objects cannot be read before they are restored; GLACIER_IR is none."""
_MOST_NAMES = 5
_LIKE_AN_ARCHIVE = r"(?is)\.(zip|rar|7z|tar|tgz|tbz2?|txz|tar\..{1,4})\n?$"
_ARCHIVE = re.compile(r"\.(zip|rar|7z|tar|tgz|tbz2?|txz|tar\.\w{1,4})$", re.IGNORECASE)


class Contents(NamedTuple):
    """Objects by role: key, size, etag, and the label of their folders. Keys are relative to `root`."""

    root: str
    prefix: str
    """The folder prefix of each key."""
    images: pa.Table
    bare: pa.Table
    shards: pa.Table
    tars: pa.Table
    others: pa.Table
    parts: frozenset[str | None]
    """The parts of a data set, such as `train`, that the objects are in."""
    passed_over: tuple[str, ...]
    """Phrases that count and name output of this program, and archives."""


def list_contents(
    path: str,
    label_from_parent: bool | Auto,
    *,
    setting: str,
    retry_later: Retry,
    access: Access = SIGNED,
    parts: ListingParts | None = None,
) -> Contents:
    """List `path`, which comes from `setting`, and drop output of this program.

    A packed set is dropped only beside image objects, because it can be the data. Raises DataError if `path` is
    missing, is a run directory, or holds nothing but output. What `parts` has of an earlier attempt is not listed
    again, unless the store has changed there: then all is.
    """

    def listed(count: Count) -> tuple[Listing, Classifier]:
        listing = list_entries(
            path, setting=setting, retry_later=retry_later, access=access, count=count, parts=parts
        )
        found = Classifier(listing.prefix, label_from_parent)
        found.add(listing.batches)
        return listing, found

    what = f"listing {normal_uri(path)}"
    try:
        with counting(what, "keys") as count:
            listing, found = listed(count)
    except OutdatedPartsError as error:
        assert parts
        logger.warning(
            "the store has changed since the listing was interrupted (%s): listing all again", error
        )
        parts.forget()
        with counting(what, "keys") as count:
            listing, found = listed(count)
    if parts:
        parts.is_complete = True
    images, bare, shards, tars, others = found.tables()
    setting_path = f"{setting}={normal_uri(path)}"
    folders_of = _output(found.marks)
    if folders_of["run"][:1] == [""] or folders_of["study"][:1] == [""]:
        raise DataError(f"{setting_path} is a run directory or a study; set it to a folder of images")
    sets = [folders_of.pop("packed"), *folders_of.values()]
    tables = [images, bare, shards, tars, others]
    own = [folder for folders in sets[1:] for folder in folders]
    tables = [_outside(table, listing.prefix, own) for table in tables]
    if sets[0] and _outside(tables[0], listing.prefix, sets[0]).num_rows:
        folders_of["packed"] = sets[0]
        tables = [_outside(table, listing.prefix, sets[0]) for table in tables]
    passed_over = [
        f"{_counted(len(folders), *_KINDS[kind])} passed over: {some_names(folders)}"
        for kind, folders in folders_of.items()
        if folders
    ]
    if passed_over and not any(table.num_rows for table in tables[:4]):
        raise DataError(
            f"{setting_path} holds no images, but output of this program ({'; '.join(passed_over)}); "
            "set it to a folder of images"
        )
    if tables[3].num_rows and _are_beside(tables):
        *tables, tars, others = tables
        tables += [tars.schema.empty_table(), pa.concat_tables([others, tars])]
    likely = tables[4]["key"].filter(pc.match_substring_regex(tables[4]["key"], _LIKE_AN_ARCHIVE))
    archives = [key for key in likely.to_pylist() if _ARCHIVE.search(key)]
    if archives:
        tables[4] = tables[4].filter(
            pc.invert(pc.is_in(tables[4]["key"], pa.array(archives, pa.large_string())))
        )
        names = some_names(sorted(key[len(listing.prefix) :] for key in archives))
        one = len(archives) == 1
        passed_over.append(
            f"{_counted(len(archives), 'archive', 'archives')} not read: {names}; unpack "
            f"{'it' if one else 'them'} to use {'its' if one else 'their'} images"
        )
    images, bare, shards, tars, others = tables
    return Contents(
        listing.root,
        listing.prefix,
        images,
        bare,
        shards,
        tars,
        others,
        frozenset(found.parts - set(own)),
        tuple(passed_over),
    )


def no_images(contents: Contents, path: str, num_ignored: int, *, setting: str) -> DataError:
    """Return the error for a place without images; it names archives and patterns, which are not supported."""
    remedy = f"check {setting}"
    archives = [text for text in contents.passed_over if "archive" in text]
    if archives:
        remedy = f"archives are not supported: {archives[0]}"
    elif is_pattern(path):
        remedy = f"patterns are not supported: set {setting} to a folder"
    return DataError(f"no images under {path}, {num_ignored} other objects ignored; {remedy}")


def note_on_archived(images: pa.Table) -> list[str]:
    """Return a phrase that counts the images in storage classes that cannot be read; none without any."""
    classes = images["storage_class"].drop_null()
    archived = classes.filter(pc.is_in(classes, pa.array(_ARCHIVED)))
    if not len(archived):
        return []
    counts = [f"{one['counts']} {one['values']}" for one in pc.value_counts(archived).to_pylist()]
    return [f"{len(archived)} archived ({', '.join(counts)}): bad images unless they have been restored"]


def labelled_parts(table: pa.Table, contents: Contents) -> frozenset[str]:
    """Return the parts with labels of their own: all of Parquet with a label column, else those with class folders.

    Only parts named as splits are looked at: a data set may have thousands of folders.
    """
    parts = frozenset(part for part in contents.parts if part is not None and is_split(part))
    if "label" not in table.column_names or not parts:
        return parts
    labelled = table["key"].filter(pc.is_valid(table["label"]))
    return frozenset(
        part for part in parts if pc.any(pc.starts_with(labelled, f"{contents.prefix}{part}/")).as_py()
    )


def _output(marks: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    """Return the outermost folders of each kind of output, sorted; a trial lies within its study."""
    found: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    outer: list[str] = []
    for folder in sorted(marks, key=lambda name: name.split("/")):
        kind = _kind(marks[folder])
        if kind is None or (folder == "" and kind in ("embeddings", "packed")):
            continue
        if not any(above == "" or folder.startswith(f"{above}/") for above in outer[-1:]):
            outer.append(folder)
            found[kind].append(folder)
    return found


def _are_beside(tables: Sequence[pa.Table]) -> bool:
    """Return True if the tar files are beside a data set of images, as an archive of it, and are not the data."""
    images, _, _, tars, _ = tables
    return bool(images.num_rows > tars.num_rows)


def _kind(names: Collection[str]) -> str | None:
    if CONFIG in names and STUDY in names:
        return "study"
    if CONFIG in names and not OF_A_RUN.isdisjoint(names):
        return "run"
    return "embeddings" if EMBEDDINGS in names else "packed" if PACKED in names else None


def _outside(table: pa.Table, prefix: str, folders: Iterable[str]) -> pa.Table:
    """Return the rows whose keys lie in none of the folders."""
    inside = np.zeros(table.num_rows, bool)
    for folder in folders:
        inside |= pc.starts_with(table["key"], f"{prefix}{folder}/").to_numpy(zero_copy_only=False)
    return table.filter(pa.array(~inside)) if inside.any() else table


def some_names(names: Sequence[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
