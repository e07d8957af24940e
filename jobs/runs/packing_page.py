"""The end of packing: the list of duplicates and data.html, from the facts that the actors wrote beside the parts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dinoray.jobs.runs.parts_job import PartsJob
from dinoray.models.errors import DataError, one_line
from dinoray.pipeline.data.config import DataConfig
from dinoray.pipeline.data.decoding.image_facts import decode_whole, open_any
from dinoray.pipeline.data.decoding.samples import as_rgb
from dinoray.pipeline.data.duplicates import Indices
from dinoray.pipeline.data.listing.classify import PACKED_PAGE
from dinoray.pipeline.data.listing.ignored import ignored_line
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.data.statistics import evenly
from dinoray.pipeline.export.packing_facts import Repeats, TableFacts
from dinoray.pipeline.export.packing_plan import Plan
from dinoray.pipeline.export.parquet_parts import LEFT_OUT, QUARANTINE, part_name
from dinoray.pipeline.figures.picture_grid import Captioned, picture_grid
from dinoray.pipeline.reporting.data_page import DataPage, Pairs, build_data_page
from dinoray.pipeline.storage.files import Directory, filesystem

PAGE, DUPLICATES = PACKED_PAGE, "_about/duplicates.jsonl"
_SAMPLES, _EXACT_PAIRS, _NEAR_PAIRS = 24, 3, 9


class PackedImages(NamedTuple):
    """The images of a table, and the facts about them: the parts of the pass that decoded them."""

    out: Directory
    facts: TableFacts
    plan: Plan
    config: DataConfig

    def picture(self, place: int) -> NDArray[np.uint8]:
        """Return an image, uint8 [H,W,3], reduced if it is a JPEG. Raises DataError if its part cannot be read."""
        part, row = self.facts.part_of(place)
        group, row = divmod(row, self.plan.rows_per_group)
        storage, path = filesystem(self.out.uri)
        try:
            with (
                storage.open_input_file(f"{path}/{part_name(part)}") as file,
                pq.ParquetFile(file) as parquet,
            ):
                data = parquet.read_row_group(group, columns=["image"])["image"][row].as_py()
        except (pa.ArrowException, OSError) as error:
            name = self.out.join(part_name(part))
            raise DataError(f"{name} cannot be read ({one_line(error)}); delete it and run again") from error
        image = open_any(data, max_pixels=self.config.max_pixels, config=self.config)
        return as_rgb(decode_whole(image).pixels)


def finish_table(
    summary: Mapping[str, Any],
    *,
    out: Directory,
    source: Source,
    about: Sequence[str],
    next_command: str,
    job: PartsJob,
    packed: PackedImages,
    repeats: Repeats,
    left_out: Indices | None = None,
) -> Mapping[str, Any]:
    """Write the list of duplicates and the page, and return the numbers of duplicates for the summary."""
    table, num_other_label = _list_duplicates(out, packed.facts, repeats, left_out)
    num_exact = int(repeats.is_exact.sum())
    counts = {"exact_duplicates": num_exact, "near_duplicates": len(repeats.places) - num_exact}
    manifest = source.manifest
    line = ignored_line(manifest.ignored)
    ignored = [*([] if line is None else [line]), *(f"damaged: {key}" for key in manifest.damaged)]
    data = DataPage(
        address=out.uri,
        about=about,
        num_images=summary["rows_in"],
        num_packed=summary["rows_out"],
        statistics=packed.facts.statistics,
        bad=[json.loads(line) for line in out.read(QUARANTINE).splitlines()],
        bad_file=out.join(QUARANTINE),
        ignored=ignored,
        pairs=Pairs(
            num_exact,
            counts["near_duplicates"],
            summary.get(LEFT_OUT, 0),
            num_other_label,
            picture_grid(_pairs(packed, repeats, table)),
            out.join(DUPLICATES),
        ),
        samples=picture_grid(_samples(packed)),
        next_commands={"pretrain on the packed images": next_command},
    )
    out.write(PAGE, build_data_page(data).encode())
    lines = [f"page about the images: {out.join(PAGE)}"]
    if len(repeats.places):
        remedy = "" if left_out is not None else "; --duplicates exact or near leaves them out"
        found = f"{num_exact} exact duplicates, {counts['near_duplicates']} near-duplicates"
        lines.insert(0, f"{found}, listed in {out.join(DUPLICATES)}{remedy}")
    for line in lines:
        job.tell(line)
    return counts


def _list_duplicates(
    out: Directory, facts: TableFacts, repeats: Repeats, left_out: Indices | None
) -> tuple[pa.Table, int]:
    """Write the list; return key and label of the duplicates, then of their originals, and how many labels differ."""
    places = np.r_[repeats.places, repeats.originals]
    number = len(repeats.places)
    if not number:
        out.delete(DUPLICATES)
        return pa.table({"key": [], "label": []}), 0
    table = facts.take(places, ["key", "label"])
    keys, labels = table["key"].to_pylist(), table["label"].to_pylist()
    gone = np.zeros(number, bool) if left_out is None else np.isin(repeats.places, left_out)
    lines = [
        json.dumps(
            {
                "key": keys[i],
                "label": labels[i],
                "duplicate_of": keys[number + i],
                "kind": "exact" if repeats.is_exact[i] else "near",
                "left_out": bool(gone[i]),
            }
        )
        for i in range(number)
    ]
    out.write(DUPLICATES, "".join(f"{line}\n" for line in lines).encode())
    return table, sum(one != other for one, other in zip(labels[:number], labels[number:], strict=True))


def _samples(packed: PackedImages) -> list[list[Captioned]]:
    places = evenly(len(packed.facts), _SAMPLES)
    keys = packed.facts.take(places, ["key"])["key"].to_pylist() if len(places) else []
    return [[(key, packed.picture(place))] for key, place in zip(keys, places.tolist(), strict=True)]


def _pairs(packed: PackedImages, repeats: Repeats, table: pa.Table) -> list[list[Captioned]]:
    """Return some pairs of original and duplicate, near-duplicates first."""
    exact, near = np.flatnonzero(repeats.is_exact), np.flatnonzero(~repeats.is_exact)
    chosen = [
        *near[evenly(len(near), _NEAR_PAIRS)].tolist(),
        *exact[evenly(len(exact), _EXACT_PAIRS)].tolist(),
    ]
    number = len(repeats.places)

    def shown(row: int, place: int) -> Captioned:
        return table["key"][row].as_py(), packed.picture(place)

    return [[shown(number + i, int(repeats.originals[i])), shown(i, int(repeats.places[i]))] for i in chosen]
