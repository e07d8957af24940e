"""Tell what listed objects are, a batch at a time: their roles by their names, their labels and parts by their folders.

Stands between the listing and its contents. Most objects are images with a plain name: those are found by one regular
expression, and their labels are worked out once a folder. All others go one by one through the rules of listing.py.
Reads nothing; no Ray here.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.settings import Auto
from dinoray.pipeline.data.detection import (
    AUTO,
    SPLIT_FOLDERS,
    automatic_label,
    folder_label,
    has_label_pair,
    part_of,
)
from dinoray.pipeline.data.listing import IMAGE_SUFFIXES, Entry, EntryTable, Role, role_of
from dinoray.pipeline.storage.listing_parts import PART
from dinoray.pipeline.storage.run_dir import LEASE_FILE

CONFIG, STUDY = "config.yaml", "study.json"
OF_A_RUN = frozenset({"environment.json", "manifest.parquet", "trial.json"})
EMBEDDINGS, PACKED = "_about/embed.json", "_about/pack.json"

_ROWS = 65_536
_PLAIN_IMAGE = rf"(?is)(?:^|/)[^./][^/]*(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})$"
"""Matches only keys that `role_of` takes for images, and most of these."""
_OF_A_SPLIT = rf"(?i)^(?:{'|'.join(sorted(SPLIT_FOLDERS))})-"
"""Names whose part may be the split that they begin with."""


class Classifier:
    """Sorts listed objects into tables by role, with the label of their folders. `prefix` is not part of a folder."""

    def __init__(self, prefix: str, label_from_parent: bool | Auto) -> None:
        self._prefix, self._label_from_parent = prefix, label_from_parent
        self._tables: dict[Role, EntryTable] = {
            role: EntryTable() for role in ("image", "bare", "parquet", "tar", "other")
        }
        self._labels: dict[str, str | None] = {}
        self.marks: dict[str, set[str]] = defaultdict(set)
        """Folder -> names in it that only this program writes."""
        self.parts: set[str | None] = set()
        """The parts of a data set that the objects are in, apart from those of the role "other"."""

    def tables(self) -> list[pa.Table]:
        """Return the tables of the roles image, bare, parquet, tar and other, and forget them."""
        tables = [table.table() for table in self._tables.values()]
        self._tables.clear()
        return tables

    def add(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Add objects of the schema LISTED."""
        for batch in _joined(batches):
            is_plain = pc.match_substring_regex(batch["key"], _PLAIN_IMAGE)
            is_plain = pc.and_(is_plain, pc.is_valid(batch["size"]))
            self._add_images(batch.filter(is_plain))
            for row in zip(*(c.to_pylist() for c in batch.filter(pc.invert(is_plain)).columns), strict=True):
                self._add(Entry(*row))

    def _add_images(self, batch: pa.RecordBatch) -> None:
        names = pc.utf8_slice_codeunits(batch["key"], len(self._prefix))
        folders = pc.replace_substring_regex(names, "[^/]*$", "", max_replacements=1).dictionary_encode()
        for folder in folders.dictionary.to_pylist():
            if folder:
                self.parts.add(folder.partition("/")[0])
            if folder not in self._labels:
                self._labels[folder] = self._label(_split(folder))
        labels = [self._labels[folder] for folder in folders.dictionary.to_pylist()]
        self._tables["image"].add_batch(batch, pa.array(labels, pa.string()).take(folders.indices))
        self._add_parts(names.filter(pc.equal(pc.find_substring(names, "/"), -1)))

    def _add_parts(self, names: pa.Array) -> None:
        """Add the parts of objects that lie in no folder."""
        is_of_a_split = pc.match_substring_regex(names, _OF_A_SPLIT)
        self.parts.update(part_of([], name) for name in names.filter(is_of_a_split).to_pylist())
        if not pc.all(is_of_a_split, min_count=0).as_py():
            self.parts.add(None)

    def _add(self, entry: Entry) -> None:
        role = "other" if entry.size is None else role_of(entry.key)
        *folders, name = entry.key[len(self._prefix) :].split("/")
        if name.startswith(PART) or LEASE_FILE.fullmatch(name):
            return
        if name in (CONFIG, STUDY) or name in OF_A_RUN:
            self.marks["/".join(folders)].add(name)
        elif folders and f"{folders[-1]}/{name}" in (EMBEDDINGS, PACKED):
            self.marks["/".join(folders[:-1])].add(f"{folders[-1]}/{name}")
        if role == "other":
            self._tables[role].add(entry, None)
            return
        self.parts.add(part_of(folders, name))
        is_labelled = (
            role not in ("parquet", "tar") or self._label_from_parent != AUTO or has_label_pair(folders)
        )
        self._tables[role].add(entry, self._label(folders) if is_labelled else None)

    def _label(self, folders: Sequence[str]) -> str | None:
        if self._label_from_parent == AUTO:
            return automatic_label(folders)
        return folder_label(folders) if self._label_from_parent else None


def _split(folder: str) -> list[str]:
    """Return the names in a path that is empty or ends with a slash."""
    return folder[:-1].split("/") if folder else []


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in fewer batches: a page of a listing is too small to be worth a call for each column."""
    some: list[pa.RecordBatch] = []
    for batch in batches:
        some.append(batch)
        if sum(one.num_rows for one in some) >= _ROWS:
            yield pa.concat_batches(some)
            some = []
    if some:
        yield pa.concat_batches(some)
