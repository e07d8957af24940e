"""List what lies at `data.path`, by role, and pass over what this program wrote there: runs, studies, tables.

Stands between the listing and the manifest. Recognises output by the names of its files, so it needs no request
besides the listing; a few objects whose names say nothing are looked into. No Ray here.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.errors import DataError
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.listing.bounds import Bound
from dinoray.pipeline.data.listing.choosing import ImageList, Patterns, pattern_remedy
from dinoray.pipeline.data.listing.classify import (
    CONFIG,
    EMBEDDINGS,
    OF_A_RUN,
    PACKED,
    PACKED_PAGE,
    STUDY,
    Classifier,
)
from dinoray.pipeline.data.listing.folder_labels import AUTO, is_split
from dinoray.pipeline.data.listing.ignored import (
    EXCLUDED,
    HIDDEN_FILE,
    OUTPUT,
    UNNAMED,
    Ignored,
    count_keys,
    from_counts,
    ignored_line,
)
from dinoray.pipeline.data.listing.listing import Listing, list_entries
from dinoray.pipeline.storage.config import StorageConfig
from dinoray.pipeline.storage.files import normal_uri
from dinoray.pipeline.storage.listing_parts import ListingParts, OutdatedPartsError
from dinoray.pipeline.storage.progress import Count, counting
from dinoray.pipeline.storage.retry import Retry

logger = logging.getLogger(__name__)

_ARCHIVED = ("GLACIER", "DEEP_ARCHIVE")
"""Storage classes whose objects cannot be read before they are restored; GLACIER_IR is none."""
_MOST_NAMED = 5


class Contents(NamedTuple):
    """Objects by role: key, size, etag, and the label of their folders. Keys are relative to `root`."""

    root: str
    prefix: str
    """The folder prefix of each key."""
    images: pa.Table
    shards: pa.Table
    tars: pa.Table
    unknown: pa.Table
    """Objects whose names say nothing, and which have not been looked into."""
    others: pa.Table
    parts: frozenset[str | None]
    """The parts of a data set, such as `train`, that the objects are in."""
    left_out: tuple[Ignored, ...]
    """What is in none of the tables: output of this program, what cannot be listed, and what is not asked for."""
    notes: tuple[str, ...] = ()

    def ignored(self) -> tuple[Ignored, ...]:
        """Return what is left out, with the objects that are neither images nor shards."""
        keys = pa.chunked_array([*self.unknown["key"].chunks, *self.others["key"].chunks], pa.large_string())
        return (*count_keys(keys), *self.left_out)


def list_contents(
    config: DataConfig,
    *,
    setting: str,
    retry_later: Retry,
    storage: StorageConfig,
    parts: ListingParts | None = None,
    bound: Bound | None = None,
) -> Contents:
    """List `config.path`, which comes from `setting`, and drop output of this program.

    A packed set is dropped only beside image objects, because it can be the data. Raises DataError if the path is
    missing, is a run directory, or holds nothing but output. What `parts` has of an earlier attempt is not listed
    again, unless the store has changed there: then all is. `bound` ends the listing, and leaves out shards.
    """

    def listed(count: Count) -> tuple[Listing, Classifier]:
        listing = list_entries(
            config.path,
            setting=setting,
            retry_later=retry_later,
            access=storage.access,
            count=count,
            parts=parts,
        )
        patterns = Patterns(config.include, config.exclude)
        # A pattern, a list or a column may name them.
        are_named = (
            bool(config.include) or config.image_list is not None or config.uri_column not in (AUTO, None)
        )
        found = Classifier(
            listing.prefix,
            config.label_from_parent,
            config.label_level,
            patterns,
            with_hidden=are_named,
        )
        found.add(bound.cut(listing.batches) if bound else listing.batches)
        return listing, found

    what = f"listing {normal_uri(config.path)}"
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
    tables = found.tables()
    setting_path = f"{setting}={normal_uri(config.path)}"
    folders_of = _output(found.marks)
    if folders_of["run"][:1] == [""] or folders_of["study"][:1] == [""]:
        raise DataError(f"{setting_path} is a run directory or a study; set it to a folder of images")
    tables[-1] = _without_pages(tables[-1], listing.prefix, found.marks)
    packed = folders_of.pop("packed")
    own = [folder for folders in folders_of.values() for folder in folders]
    tables = [_outside(table, listing.prefix, own) for table in tables]
    if packed and _outside(tables[0], listing.prefix, packed).num_rows:
        folders_of["packed"] = packed
        tables = [_outside(table, listing.prefix, packed) for table in tables]
    left_out = [
        *from_counts(listing.left_out),
        *from_counts(found.left_out),
        *(Ignored(kind, len(some), tuple(some[:_MOST_NAMED])) for kind, some in folders_of.items() if some),
    ]
    if own and not found.left_out[EXCLUDED] and not any(table.num_rows for table in tables[:4]):
        output = (ignored_line(left_out) or "").removeprefix("ignored: ")
        raise DataError(
            f"{setting_path} holds no images, but output of this program ({output}); set it to a folder of images"
        )
    images, unknown, shards, tars, others = tables
    if images.num_rows > tars.num_rows:  # they are archives of a data set of images, and not the data
        tars, others = tars.schema.empty_table(), pa.concat_tables([others, tars])
    known_parts = frozenset(found.parts - set(own))
    return Contents(
        listing.root,
        listing.prefix,
        images,
        bound.some(shards) if bound else shards,
        bound.some(tars) if bound else tars,
        unknown,
        others,
        known_parts,
        tuple(left_out),
    )


def choose_listed(contents: Contents, image_list: ImageList) -> Contents:
    """Return the contents with the objects that the list names as images, whatever their names say.

    Raises ConfigError if there are none.
    """
    named, notes = image_list.choose(
        pa.concat_tables([contents.images, contents.unknown, contents.others]), contents.prefix
    )
    others = pa.concat_tables([contents.unknown, contents.others, contents.shards, contents.tars])
    unnamed, others = (
        table.filter(pc.invert(pc.is_in(table["key"], named["key"]))) for table in (contents.images, others)
    )
    return contents._replace(
        images=named,
        shards=(nothing := contents.images.schema.empty_table()),
        tars=nothing,
        unknown=nothing,
        others=others,
        left_out=(*contents.left_out, *from_counts({UNNAMED: unnamed.num_rows})),
        notes=(*contents.notes, *notes),
    )


def without_shards(contents: Contents) -> Contents:
    """Return the contents with the shards among what is ignored."""
    others = pa.concat_tables([contents.others, contents.shards])
    return contents._replace(shards=contents.shards.schema.empty_table(), others=others)


def no_images(contents: Contents, path: str, *, setting: str) -> DataError:
    """Return the error for a place without images, with what is there and how that can be used."""
    ignored = contents.ignored()
    remedy = pattern_remedy(setting, path) or f"check {setting}"
    if any(one.kind == EXCLUDED for one in ignored):
        remedy = "check data.include and data.exclude"
    elif any(one.kind == HIDDEN_FILE for one in ignored):
        remedy = f"point {setting} at the hidden folder, or name it in data.include"
    line = ignored_line(ignored, otherwise=remedy) or f"nothing is there; {remedy}"
    return DataError(f"no images under {path}; {line}")


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
    found: dict[str, list[str]] = {kind: [] for kind in OUTPUT}
    outer: list[str] = []
    for folder in sorted(marks, key=lambda name: name.split("/")):
        kind = _kind(marks[folder])
        if kind is None or (folder == "" and kind in ("embeddings", "packed")):
            continue
        if not any(above == "" or folder.startswith(f"{above}/") for above in outer[-1:]):
            outer.append(folder)
            found[kind].append(folder)
    return found


def _without_pages(others: pa.Table, prefix: str, marks: Mapping[str, Collection[str]]) -> pa.Table:
    """Return the rows that are not what packed sets have about themselves, which is part of them."""
    folders = [folder for folder, names in marks.items() if PACKED in names]
    pages = [f"{prefix}{folder}/{PACKED_PAGE}" if folder else f"{prefix}{PACKED_PAGE}" for folder in folders]
    others = others.filter(pc.invert(pc.is_in(others["key"], pa.array(pages, others["key"].type))))
    return _outside(others, prefix, [f"{folder}/_about".lstrip("/") for folder in folders])


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
