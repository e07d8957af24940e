"""What each packed image is, in a file beside each part: rows of ImageFacts with the image's row, key and label.

The actor that packs a part writes its file before the part, so a part that exists has one. The driver reads these in
place of the images: for the page about the data, and to find duplicates. No Ray here.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinoray.models.errors import DataError, one_line
from dinoray.pipeline.data.decoding import image_facts
from dinoray.pipeline.data.decoding.image_facts import ImageFacts, facts_table
from dinoray.pipeline.data.duplicates import Indices, find_exact, find_near
from dinoray.pipeline.data.reading.fetched import Fetched
from dinoray.pipeline.data.statistics import DataStatistics
from dinoray.pipeline.export.parquet_parts import facts_name, part_name
from dinoray.pipeline.storage.files import Directory, MissingObject

_OF_SOURCE = pa.schema({"row": pa.int64(), "key": pa.string(), "label": pa.string()})
_SCHEMA = pa.schema([*_OF_SOURCE, *image_facts.SCHEMA])
_AT_ONCE = 16
_OF_REPEATS = ("digest", "difference_hash")
_COUNTED = ("format", "channels", "width", "height", "num_bytes", "low", "high", "mean", "label")
KEEP, EXACT, NEAR = "keep", "exact", "near"
"""Which duplicates are left out: none, those with the same bytes, or those that nearly are the same picture too."""


class PartFacts:
    """The facts about the images of one part, in their order, until they are written."""

    def __init__(self) -> None:
        self._images: list[tuple[int, str, str | None]] = []
        self._facts: list[ImageFacts] = []

    def add(self, row: int, fetched: Fetched, facts: ImageFacts) -> None:
        """Add the image at this row of the manifest."""
        self._images.append((row, fetched.key, fetched.label))
        self._facts.append(facts)

    def write(self, out: Directory, part: int) -> None:
        """Write the file of the part."""
        columns = zip(*self._images, strict=True) if self._images else ((), (), ())
        arrays = [pa.array(values, field.type) for values, field in zip(columns, _OF_SOURCE, strict=True)]
        facts = facts_table(self._facts)
        table = pa.table([*arrays, *facts.columns], schema=_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        out.write(facts_name(part), sink.getvalue().to_pybytes())


class Repeats(NamedTuple):
    """Images that repeat an earlier one of the manifest, by their places among all that are packed; in that order."""

    places: Indices
    originals: Indices
    is_exact: NDArray[np.bool_]
    """The bytes are the same; else the pictures are nearly the same."""

    def left_out(self, which: str) -> Indices:
        """Return the places of the images that EXACT or NEAR leaves out, ascending."""
        return np.sort(self.places[self.is_exact] if which == EXACT else self.places)


class TableFacts:
    """The facts about all images of a table. Their places are in the order in which the parts are listed and read.

    All files are read once, at the start; kept are 32 bytes an image, and what is counted.
    """

    def __init__(self, out: Directory, num_parts: int) -> None:
        self._out = out
        self._parts = sorted(range(num_parts), key=part_name)  # as a manifest of the parts is sorted
        self.statistics = DataStatistics()
        rows, digests, hashes = [], [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
        for table in self.tables(["row", *_OF_REPEATS, *_COUNTED]):
            rows.append(table["row"].to_numpy())
            digests.append(_as_numbers(table["digest"]))
            hashes.append(table["difference_hash"].to_numpy())
            self.statistics.add(table)
        self._ends = np.cumsum([len(some) for some in rows])
        self._digests, self._hashes = np.concatenate(digests), np.concatenate(hashes)
        self.rows: Indices = np.concatenate(rows) if rows else np.empty(0, np.int64)
        """The row of the source's manifest of each image."""

    def __len__(self) -> int:
        return len(self.rows)

    def tables(self, columns: Sequence[str], parts: Sequence[int] | None = None) -> Iterator[pa.Table]:
        """Yield these columns of each part, or of `parts`, in the order of the places, a few parts at a time."""
        chosen = self._parts if parts is None else parts
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in range(0, len(chosen), _AT_ONCE):
                some = chosen[first : first + _AT_ONCE]
                yield from pool.map(lambda part: self._read(part, columns), some)

    def take(self, places: Indices, columns: Sequence[str]) -> pa.Table:
        """Return these columns of the images at `places`, in that order; reads only the parts that have one."""
        wanted = np.unique(places)
        which = np.searchsorted(self._ends, wanted, side="right")
        numbers = np.unique(which)
        begins = np.r_[0, self._ends[:-1]] if len(self._ends) else self._ends
        tables = self.tables(columns, [self._parts[number] for number in numbers.tolist()])
        found = [
            table.take(wanted[which == number] - begins[number])
            for number, table in zip(numbers.tolist(), tables, strict=True)
        ]
        if not found:
            return _SCHEMA.empty_table().select(list(columns))
        return pa.concat_tables(found).take(np.searchsorted(wanted, places))

    def part_of(self, place: int) -> tuple[int, int]:
        """Return the part of an image, and its place in it."""
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self._parts[number], place - int(self._ends[number - 1] if number else 0)

    def repeats(self) -> Repeats:
        """Find the images that repeat an earlier one of the manifest, byte for byte or nearly."""
        if not len(self):
            return Repeats(*(np.empty(0, np.int64),) * 2, np.empty(0, bool))
        order = np.argsort(self.rows)
        exact = find_exact(self._digests[order])
        firsts = np.ones(len(order), bool)
        firsts[exact.images] = False
        first = np.flatnonzero(firsts)
        near = find_near(self._hashes[order][first], lambda images: self._small(order[first[images]]))
        images = np.r_[exact.images, first[near.images]]
        originals = np.r_[exact.originals, first[near.originals]]
        in_order = np.argsort(images)
        is_exact = (np.arange(len(images)) < len(exact.images))[in_order]
        return Repeats(order[images[in_order]], order[originals[in_order]], is_exact)

    def _small(self, places: Indices) -> NDArray[np.uint8]:
        column = self.take(places, ["small"])["small"].combine_chunks()
        return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, image_facts.SMALL_BYTES)

    def _read(self, part: int, columns: Sequence[str]) -> pa.Table:
        name, remedy = facts_name(part), f"delete {self._out.join(part_name(part))} and run again"
        try:
            return pq.read_table(pa.BufferReader(self._out.read(name)), columns=list(columns))
        except MissingObject as error:
            raise DataError(f"{self._out.join(name)} is missing; {remedy}") from error
        except (pa.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{self._out.join(name)} is damaged ({one_line(error)}); {remedy}") from error


def _as_numbers(digests: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return digests of 16 bytes as uint64 [n,2]."""
    joined = b"".join(digests.to_pylist())
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)
