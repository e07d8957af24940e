"""Tell what listed objects are, a batch at a time: their roles by their names, their labels and parts by their folders.

Stands between the listing and its contents. Most objects are images with a plain name: those are found by one regular
expression, and their labels are worked out once a folder. All others go one by one through the rules of listing.py.
Reads nothing; no Ray here.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.models.settings import Auto
from dinoray.pipeline.data.listing.choosing import Patterns
from dinoray.pipeline.data.listing.folder_labels import (
    AUTO,
    STARTS_AS_A_SPLIT,
    automatic_label,
    has_label_pair,
    label_at,
    part_of,
)
from dinoray.pipeline.data.listing.ignored import EXCLUDED, HIDDEN_FILE
from dinoray.pipeline.data.listing.listing import Entry, EntryTable
from dinoray.pipeline.data.listing.names import HIDDEN, PLAIN_IMAGE, PLAIN_OTHER, Role, role_of
from dinoray.pipeline.storage.listing_parts import PART
from dinoray.pipeline.storage.run_dir import LEASE_FILE

CONFIG, STUDY = "config.yaml", "study.json"
OF_A_RUN = frozenset({"environment.json", "manifest.parquet", "trial.json"})
EMBEDDINGS, PACKED = "_about/embed.json", "_about/pack.json"
PACKED_PAGE = "data.html"

_ROWS = 65_536
_NAMES = "|".join(map(re.escape, sorted({CONFIG, STUDY, *OF_A_RUN, "embed.json", "pack.json"})))
_OF_OUTPUT = rf"(?s)(?:^|/)(?:{_NAMES}|lease[^/]*)$"
"""Matches the names of marks, and of leases."""
_ALL = Patterns((), ())


class Classifier:
    """Sorts listed objects into tables by role, with the label of their folders. `prefix` is not part of a folder."""

    def __init__(
        self,
        prefix: str,
        label_from_parent: bool | Auto,
        label_level: int | str = -1,
        patterns: Patterns = _ALL,
        *,
        with_hidden: bool = False,
    ) -> None:
        self._prefix, self._label_from_parent, self._level = prefix, label_from_parent, label_level
        self._patterns, self._is_automatic = patterns, label_from_parent == AUTO and label_level == -1
        self._with_hidden = with_hidden
        self._tables: dict[Role, EntryTable] = {
            role: EntryTable() for role in ("image", "unknown", "parquet", "tar", "other")
        }
        self._labels: dict[str, str | None] = {}
        self.left_out: Counter[str] = Counter()
        """Number of objects that are left out and in none of the tables, by kind."""
        self.marks: dict[str, set[str]] = defaultdict(set)
        """Folder -> names in it that only this program writes."""
        self.parts: set[str | None] = set()
        """The parts of a data set that the objects are in, apart from those of the role "other"."""

    def tables(self) -> list[pa.Table]:
        """Return the tables of the roles image, unknown, parquet, tar and other, and forget them."""
        tables = [table.table() for table in self._tables.values()]
        self._tables.clear()
        return tables

    def add(self, batches: Iterable[pa.RecordBatch]) -> None:
        """Add objects of the schema LISTED."""
        for batch in _joined(batches):
            if self._patterns:
                batch = self._chosen(batch)
            if not self._with_hidden:
                batch = self._without_hidden(batch)
            is_image = pc.match_substring_regex(batch["key"], PLAIN_IMAGE)
            self._add_images(batch.filter(is_image))
            batch = batch.filter(pc.invert(is_image))
            is_other = pc.and_not(
                pc.match_substring_regex(batch["key"], PLAIN_OTHER),
                pc.match_substring_regex(batch["key"], _OF_OUTPUT),
            )
            others = batch.filter(is_other)
            self._tables["other"].add_batch(others, pa.nulls(others.num_rows, pa.string()))
            for row in zip(*(c.to_pylist() for c in batch.filter(pc.invert(is_other)).columns), strict=True):
                self._add(Entry(*row))

    def _chosen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the objects that the patterns choose; of others, output of this program is still recognised."""
        is_chosen = self._patterns.chosen(pc.utf8_slice_codeunits(batch["key"], len(self._prefix)))
        others = batch["key"].filter(pc.invert(is_chosen))
        self.left_out[EXCLUDED] += len(others)
        for key in others.filter(pc.match_substring_regex(others, _OF_OUTPUT)).to_pylist():
            *folders, name = key[len(self._prefix) :].split("/")
            self._mark(folders, name)
        return batch.filter(is_chosen)

    def _without_hidden(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the objects that lie in no hidden folder below the prefix, and those of the log of a Hudi table."""
        if not pc.any(pc.match_substring_regex(batch["key"], HIDDEN)).as_py():
            return batch
        names = pc.utf8_slice_codeunits(batch["key"], len(self._prefix))
        is_hidden = pc.and_not(pc.match_substring_regex(names, HIDDEN), pc.match_substring(names, ".hoodie/"))
        self.left_out[HIDDEN_FILE] += pc.sum(is_hidden).as_py()
        return batch.filter(pc.invert(is_hidden))

    def _add_images(self, batch: pa.RecordBatch) -> None:
        names = pc.utf8_slice_codeunits(batch["key"], len(self._prefix))
        folders = pc.replace_substring_regex(names, "[^/]*$", "", max_replacements=1).dictionary_encode()
        for folder in folders.dictionary.to_pylist():
            if folder and folder not in self._labels:
                self.parts.add(part_of(_split(folder), ""))
            if folder not in self._labels:
                self._labels[folder] = self._label(_split(folder))
        labels = [self._labels[folder] for folder in folders.dictionary.to_pylist()]
        self._tables["image"].add_batch(batch, pa.array(labels, pa.string()).take(folders.indices))
        self._add_parts(names.filter(pc.equal(pc.find_substring(names, "/"), -1)))

    def _add_parts(self, names: pa.Array) -> None:
        """Add the parts of objects that lie in no folder."""
        is_of_a_split = pc.match_substring_regex(names, STARTS_AS_A_SPLIT)
        self.parts.update(part_of([], name) for name in names.filter(is_of_a_split).to_pylist())
        if not pc.all(is_of_a_split, min_count=0).as_py():
            self.parts.add(None)

    def _add(self, entry: Entry) -> None:
        role = role_of(entry.key)
        *folders, name = entry.key[len(self._prefix) :].split("/")
        if name.startswith(PART) or LEASE_FILE.fullmatch(name):
            return
        self._mark(folders, name)
        if role == "other":
            self._tables[role].add(entry, None)
            return
        has_many = role in ("parquet", "tar")  # images in each, whose own labels come first
        self.parts.add(part_of(folders, name if has_many or not folders else ""))
        is_labelled = not has_many or not self._is_automatic or has_label_pair(folders)
        self._tables[role].add(entry, self._label(folders) if is_labelled else None)

    def _mark(self, folders: Sequence[str], name: str) -> None:
        if name in (CONFIG, STUDY) or name in OF_A_RUN:
            self.marks["/".join(folders)].add(name)
        elif folders and f"{folders[-1]}/{name}" in (EMBEDDINGS, PACKED):
            self.marks["/".join(folders[:-1])].add(f"{folders[-1]}/{name}")

    def _label(self, folders: Sequence[str]) -> str | None:
        if self._is_automatic:
            return automatic_label(folders)
        return label_at(folders, self._level) if self._label_from_parent else None


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
