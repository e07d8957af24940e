"""A table as Parquet parts, each written once and atomically: missing parts, footers, accounting for rows.

Shared by embeddings.py and packing.py. A directory, local or on S3, holds:

    part-00000.parquet        rows; its footer records the images that they stand for, and the unusable images
    _about/                   readers of Parquet folders skip names that begin with an underscore
      ....parquet             the manifest, listed once: each part stands for a range of its rows; and, where a
                              kind of table has them, facts about the rows of each part, written before the part
      quarantine.jsonl        the unusable images of all parts
      summary.json            written last: rows in, rows out, quarantined
      ....json                settings that decide the rows; a command with other settings is refused

A part is committed by one atomic write, quarantine included, so existing parts are progress. No Ray here.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dinoray.models.errors import ConfigError, DataError, one_line
from dinoray.pipeline.data.reading.source import Status
from dinoray.pipeline.storage.files import Directory, MissingObject, filesystem

QUARANTINE, SUMMARY = "_about/quarantine.jsonl", "_about/summary.json"
LEFT_OUT = "num_left_out"
"""Entry of a part's note: images that are neither rows of it nor quarantined, but left out on request."""

_ABOUT = "_about"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_FACTS = re.compile(r"_images-(\d{5,})\.parquet")


class PartFormat(NamedTuple):
    """Names of one kind of part: where its metadata is stored, and the words for messages."""

    settings: str
    """File of the settings that decide the rows."""
    manifest: str
    """File of the list of images."""
    metadata: bytes
    """Name of the note in each part's footer."""
    rows: str
    """Noun for the rows, in the plural."""
    written: str
    """Verb for rows that exist already."""
    rows_out: str
    """Name of the number of rows in summary.json."""
    counts: tuple[str, ...] = ()
    """Names of numbers in each part's note whose sums are in summary.json."""


class PartFooter(NamedTuple):
    """Content of a part's footer: its number of rows, and the note that `PartWriter.commit` wrote."""

    num_rows: int
    note: dict[str, Any]


class PartResult(NamedTuple):
    """Counts of a written part: images that became rows, and unusable images."""

    part: int
    num_rows: int
    num_bad: int


class PartWriter:
    """Builds one part in memory for manifest rows `images`; nothing is visible before `commit`."""

    def __init__(self, kind: PartFormat, part: int, images: range, schema: pa.Schema) -> None:
        self._kind, self._part, self._images, self._schema = kind, part, images, schema
        self._row_groups: list[pa.Table] = []
        self._quarantined: list[dict[str, Any]] = []

    def write(self, rows: pa.Table) -> None:
        """Add rows as one row group."""
        self._row_groups.append(rows)

    def quarantine(self, image: int, key: str, status: Status, reason: str) -> None:
        """Record that the image at this row of the manifest has no row in the part."""
        self._quarantined.append({"row": image, "key": key, "status": status.name.lower(), "reason": reason})

    def commit(self, out: Directory, facts: Mapping[str, Any], **options: Any) -> PartResult:
        """Write the part in one step; `facts` (JSON values) go into its note, `options` to Parquet."""
        about = {"part": self._part, "first_row": self._images.start, "num_rows": len(self._images)}
        note = json.dumps({**about, **facts, "quarantined": self._quarantined})
        sink = pa.BufferOutputStream()
        num_rows = 0
        with pq.ParquetWriter(
            sink, self._schema.with_metadata({self._kind.metadata: note}), **options
        ) as parquet:
            while self._row_groups:  # released while they are written: a part may be large
                rows = self._row_groups.pop(0)
                parquet.write_table(rows)
                num_rows += rows.num_rows
        out.write(part_name(self._part), sink.getvalue().to_pybytes())
        return PartResult(self._part, num_rows, len(self._quarantined))


def part_name(part: int) -> str:
    """Return the file name of a part."""
    return f"part-{part:05d}.parquet"


def facts_name(part: int) -> str:
    """Return the file name of the facts about the images of a part; the underscore hides it from readers of Parquet."""
    return f"{_ABOUT}/_images-{part:05d}.parquet"


def missing_parts(out: Directory, num_parts: int, *, with_facts: bool = False) -> list[int]:
    """Return the numbers of the missing parts, ascending; `with_facts` also of those whose facts are missing."""
    there = {int(match[1]) for name in out.list() if (match := _PART.fullmatch(name))}
    if with_facts:
        names = out.child(_ABOUT).list()
        there &= {int(match[1]) for name in names if (match := _FACTS.fullmatch(name))}
    return [part for part in range(num_parts) if part not in there]


def remove_parts(out: Directory) -> None:
    """Remove the parts of a table, the facts about them, and its summary."""
    out.delete(SUMMARY)
    names = [name for name in out.list() if _PART.fullmatch(name)]
    names += [f"{_ABOUT}/{name}" for name in out.child(_ABOUT).list() if _FACTS.fullmatch(name)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(out.delete, names))


def remove_table(out: Directory, kind: PartFormat) -> None:
    """Remove what a job has written into a folder, its settings last, and the folder if nothing else is in it."""
    remove_parts(out)
    for name in (QUARANTINE, kind.settings):
        out.delete(name)
    for folder in (out.child(_ABOUT), out):
        if not folder.list():
            folder.remove()  # with what a killed process has begun to write


def check_settings(out: Directory, settings: Mapping[str, Any], kind: PartFormat) -> bool:
    """Return true if `out` was begun with these settings, false for an empty directory.

    Only the given settings are compared. Raises ConfigError, naming the difference, if `out` holds rows of
    other settings, or parts without recorded settings.
    """
    try:
        known = json.loads(out.read(kind.settings))
    except MissingObject:
        if any(_PART.fullmatch(name) for name in out.list()):
            raise ConfigError(
                f"{out.uri} holds parts but no {kind.settings}; choose another --out, or remove them"
            ) from None
        return False
    except ValueError as error:
        raise DataError(f"{out.join(kind.settings)} is damaged ({error}); choose another --out") from error
    differ = [f"{k}={known.get(k)!r}, not {v!r}" for k, v in settings.items() if known.get(k) != v]
    if differ:
        raise ConfigError(
            f"{out.uri} holds {kind.rows} made with {'; '.join(differ)}; set it back, or choose another --out"
        )
    return True


def collect(
    out: Directory,
    images: Mapping[int, range],
    kind: PartFormat,
    identity: Mapping[str, Any],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[PartFooter], list[Mapping[str, Any]]]:
    """Return (footers, quarantined images by row) of some parts; also write quarantine.jsonl.

    `images` are the manifest rows that each part must stand for; `identity` is the expected content of each
    part's note; `earlier` are images that were quarantined before, in what the parts are made of. Reads only the
    footer of each part. Raises DataError for a part that is damaged, has other settings, or does not account for
    all rows: rows in = rows out + quarantined + left out.
    """
    storage, path = filesystem(out.uri)

    def read(part: int) -> PartFooter:
        name, rows = part_name(part), images[part]
        try:
            with storage.open_input_file(f"{path}/{name}") as file, pq.ParquetFile(file) as parquet:
                found = PartFooter(
                    parquet.metadata.num_rows, json.loads(parquet.schema_arrow.metadata[kind.metadata])
                )
                expected = {"part": part, "first_row": rows.start, "num_rows": len(rows), **identity}
                told, num_bad = {k: found.note[k] for k in expected}, len(found.note["quarantined"])
                num_left_out = found.note.get(LEFT_OUT, 0)
        except (pa.ArrowException, OSError, TypeError, KeyError, ValueError) as error:
            reason = one_line(error)
            raise DataError(f"{out.join(name)} cannot be read ({reason}); delete it and run again") from error
        if told != expected or found.num_rows + num_bad + num_left_out != len(rows):
            raise DataError(
                f"{out.join(name)}: {len(rows)} rows in, but {found.num_rows} {kind.rows} out and {num_bad} "
                f"quarantined of part {told['part']}; delete it and run again"
            )
        return found

    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(read, images))
    bad = [*earlier, *(record for footer in footers for record in footer.note["quarantined"])]
    out.write(QUARANTINE, "".join(json.dumps(record) + "\n" for record in bad).encode())
    return footers, bad


def check_bad(num_bad: int, num_images: int, *, limit: float, out: Directory, kind: PartFormat) -> None:
    """Raise DataError if more than the share `limit` of all images could not be used."""
    # Not their product, which may round to less: 0.29 * 100 is less than 29.
    if num_bad / num_images > limit:
        raise DataError(
            f"{num_bad} of {num_images} images could not be used, more than data.max_bad_fraction={limit}; "
            f"they are named in {out.join(QUARANTINE)}; set data.max_bad_fraction={_enough(num_bad / num_images):g} "
            f"to do without them: what is {kind.written} already stays"
        )


def _enough(share: float) -> float:
    """Return the smallest whole percentage that allows for `share`."""
    return math.ceil(share * 100) / 100
