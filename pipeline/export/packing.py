"""Images as Parquet parts that pretraining reads best, shrunk on request to what its crops need of them.

Stands between a source of any kind and the next run's `data.path`. A packed directory, local or on S3, is one of
parquet_parts.py:

    part-00000.parquet        image, key, label?, in the manifest's order and in row groups of a few MiB
    _about/pack.json          what decided them: another command is refused
    _about/_manifest.parquet  the images, listed once; `data.path` passes over files, not folders, named so

Knows where the images are through the source alone; no Ray here.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from models.errors import ConfigError
from pipeline.augment.config import CropsConfig, crop_kinds
from pipeline.data.decode import BadImage
from pipeline.data.jpeg import DENOMINATORS, Pixels, open_image
from pipeline.data.manifest import Manifest
from pipeline.data.parquet import CorruptShard, read_row_group
from pipeline.data.source import Fetched, Source, Status
from pipeline.export import parquet_parts
from pipeline.export.parquet_parts import Footer, PartKind, PartWriter, Written
from pipeline.storage.files import ChangedObject, Directory, MissingObject, Unreachable

QUALITY = 95
"""Of the JPEGs that `shrink` writes, at full colour resolution. At 90 and half the colour resolution, crops of them
are twice as far from crops of the photos themselves, for two thirds of the bytes."""
SLACK = 1.21
"""Pixels of the shrunk image to one of a crop's side, for a square region. The narrowest region of the same area,
3:4, has sqrt(4/3) = 1.155 times less along its short side: that still is no fewer than the crop has."""
PART_BYTES = 128 << 20
"""Most of what a part holds, by what is known before: two to three times as much is in each actor's memory."""
PART_ROWS = 10_000
"""Most images in a part: of tiny ones it would otherwise take an actor many minutes to commit anything."""
ROW_GROUP_BYTES = 4 << 20
"""Most of what a row group holds, unless one image is more. Images are shuffled among the row groups that
`data.row_group_cache_bytes` holds at a time: 64 of these by default, and each is still one request worth making."""

_SHRUNK_BYTES_PER_PIXEL = 0.5  # of photos at this quality, near enough to plan with
_MOST_SIDE = 65_500  # of a JPEG, in libjpeg
_SPREAD_PARTS, _LEAST_ROWS = 64, 256  # parts enough to share among actors, none of them tiny

SETTINGS, MANIFEST = "_about/pack.json", "_about/_manifest.parquet"
KIND = PartKind(SETTINGS, b"dinoray.packed", rows="images", written="packed")
FACTS = ("num_shrunk", "bytes_in", "bytes_out")
"""What the note of each part counts."""
SCHEMA = pa.schema({"image": pa.binary(), "key": pa.string(), "label": pa.string()})
# Page checksums: bit rot in a JPEG would be decoded without a word. Encoded images do not compress further.
_PARQUET = {
    "compression": {"image": "none", "key": "zstd", "label": "zstd"},
    "use_dictionary": ["label"],
    "write_statistics": ["key", "label"],
    "write_page_checksum": True,
}


@dataclass(frozen=True)
class Plan:
    """All that decides what is in the parts, beside the images. `manifest` identifies their list."""

    manifest: str
    edges: tuple[int, ...]
    """First row of each part in the manifest, and at the end the number of all rows."""
    max_pixels: int | None
    """Larger images are shrunk to this; None: every file stays as it is."""

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return len(self.edges) - 1

    def rows(self, part: int) -> range:
        """The manifest's rows that a part holds."""
        return range(self.edges[part], self.edges[part + 1])

    @property
    def identity(self) -> dict[str, Any]:
        """What the note of each part says of it."""
        return {"manifest": self.manifest, "max_pixels": self.max_pixels}


def shrink_pixels(crops: CropsConfig, *, slack: float = SLACK) -> int:
    """Pixels that an image needs for each crop, at the lowest share of the area, to find `slack` times its own side.

    96 px of 5 % at a slack of 1.21: 96^2 / 0.05 * 1.21^2 = 269,863.
    """
    return ceil(max(kind.size**2 / kind.scale[0] for kind in crop_kinds(crops)) * slack**2)


def shrunk_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The size, in whole pixels, at which an image of this size has at most `max_pixels`; never a larger one."""
    if width > height:
        return shrunk_size(height, width, max_pixels)[::-1]
    if width * height <= max_pixels:
        return width, height
    scale = min(sqrt(max_pixels / (width * height)), _MOST_SIDE / height)
    height = max(1, min(floor(height * scale), max_pixels))
    return max(1, min(round(width * scale), max_pixels // height)), height


def shrink(data: bytes, *, max_pixels: int, quality: int = QUALITY, most_pixels: int = 100_000_000) -> bytes:
    """An image file of at most `max_pixels`: the very same bytes, or a smaller, upright JPEG without metadata.

    A file that would not get smaller stays as it is, whatever its size. Raises BadImage for anything that is no
    whole image of at most `most_pixels` pixels.
    """
    image = open_image(data, max_pixels=most_pixels)
    width, height = shrunk_size(image.width, image.height, max_pixels)
    if (width, height) == (image.width, image.height):
        image.decode(DENOMINATORS[-1], _memory)  # reads the file to its end, which tells whether it is whole
        return data
    # Twice as many pixels as are wanted leave the filter below all that it would see of the full picture.
    most = min(image.width / width, image.height / height) / 2
    picture = image.decode(max((d for d in DENOMINATORS if d <= most), default=1), _memory)
    left, top = picture.left_shift, picture.top_shift
    right, bottom = left + image.width / picture.denominator, top + image.height / picture.denominator
    small = Image.fromarray(picture.pixels).resize(
        (width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom), reducing_gap=None
    )
    # Pillow, since TurboJPEG's own interface, on which simplejpeg stands, encodes with an inexact transform below 96.
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue() if file.tell() < len(data) else data


def cut_parts(manifest: Manifest, *, max_pixels: int | None, rows_per_file: int | None) -> tuple[int, ...]:
    """`Plan.edges` for parts of `rows_per_file` images each, else of about `PART_BYTES`, or less where images are few.

    Row groups of a source are not divided between parts unless they are larger than one: each is read once.
    """
    num_images = manifest.num_images
    if rows_per_file is not None:
        return (*range(0, num_images, rows_per_file), num_images)
    groups, sizes = manifest.group_sizes, manifest.group_bytes
    rows = np.ones(num_images, int) if groups is None else groups
    weights = manifest.table["size"].to_numpy() if sizes is None else sizes
    if max_pixels is not None:
        weights = np.minimum(weights, rows * ceil(max_pixels * _SHRUNK_BYTES_PER_PIXEL))
    weights = np.maximum(weights, rows * (PART_BYTES // PART_ROWS))
    total = int(weights.sum())
    most = min(PART_BYTES, max(total // _SPREAD_PARTS, ceil(_LEAST_ROWS * total / num_images)))
    # As floats, which are exact here, because that is how np.interp takes them.
    row_ends, weight_ends = (np.concatenate([[0.0], np.cumsum(values)]) for values in (rows, weights))
    edges = [0]
    while edges[-1] < num_images:
        full = float(np.interp(edges[-1], row_ends, weight_ends)) + most
        end = int(row_ends[np.searchsorted(weight_ends, full, side="right") - 1])
        if end <= edges[-1]:  # within a row group
            end = max(edges[-1] + 1, int(np.interp(full, weight_ends, row_ends)))
        edges.append(end)
    return tuple(edges)


def check_keys(source: Source) -> None:
    """ConfigError, naming it, when two rows of Parquet have one key; image objects cannot."""
    config, manifest = source.config, source.manifest
    column = config.key_column
    if manifest.kind != "parquet" or column is None:
        return

    def read(group: Mapping[str, Any]) -> pa.ChunkedArray:
        uri, size, row_group = manifest.uri(group["key"]), group["size"], group["row_group"]
        try:
            table = read_row_group(
                uri, size, row_group, image_column=column, other_columns=[], attempts=config.fetch_attempts
            )
        except (MissingObject, Unreachable, ChangedObject, CorruptShard):
            return pa.chunked_array([], pa.string())  # its images will be among the bad ones
        return table[column].cast(pa.string())

    with ThreadPoolExecutor(config.fetch_concurrency) as pool:
        found = list(pool.map(read, manifest.table.to_pylist()))
    keys = pa.chunked_array([chunk for keys in found for chunk in keys.chunks], pa.string()).drop_null()
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        most = counts[int(np.argmax(counts.field("counts").to_numpy()))].as_py()
        raise ConfigError(
            f"data.key_column={column!r} has {most['values']!r} in {most['counts']} rows, but a key must name one "
            "image; choose another column, or none"
        )


def write_part(_: Any, source: Source, part: int, *, out: Directory, plan: Plan) -> Written:
    """Pack the images of one part and write it, in one step. DataError when storage refuses us."""
    writer = PartWriter(KIND, part, plan.rows(part), SCHEMA)
    rows: list[tuple[bytes, str, str | None]] = []
    facts = dict.fromkeys(FACTS, 0)
    group_bytes = 0
    for position, fetched in zip(plan.rows(part), _fetch_ahead(source, plan.rows(part)), strict=True):
        if fetched.data is None:
            writer.quarantine(position, fetched.key, fetched.status, fetched.reason)
            continue
        data = fetched.data
        try:
            if plan.max_pixels is not None:
                data = shrink(data, max_pixels=plan.max_pixels, most_pixels=source.config.max_pixels)
        except BadImage as error:
            writer.quarantine(position, fetched.key, Status.CORRUPT, error.reason)
            continue
        if rows and group_bytes + len(data) > ROW_GROUP_BYTES:
            writer.write(_table(rows))
            rows, group_bytes = [], 0
        rows.append((data, fetched.key, fetched.label))
        group_bytes += len(data)
        facts["num_shrunk"] += data is not fetched.data
        facts["bytes_in"] += len(fetched.data)
        facts["bytes_out"] += len(data)
    writer.write(_table(rows))
    return writer.commit(out, {**plan.identity, **facts}, **_PARQUET)


def collect(out: Directory, plan: Plan, numbers: Sequence[int]) -> tuple[list[Footer], list[dict[str, Any]]]:
    """(footers, quarantined images by row) of some parts; the latter also written to quarantine.jsonl.

    Reads each part's footer alone. DataError for a part that is damaged, of other settings, or does not account
    for each of its rows: rows in = images out + quarantined.
    """
    return parquet_parts.collect(out, {part: plan.rows(part) for part in numbers}, KIND, plan.identity)


def _memory(num_bytes: int) -> Pixels:
    return np.empty(num_bytes, np.uint8)


def _fetch_ahead(source: Source, rows: range) -> Iterator[Fetched]:
    """The images at these rows of the manifest, in that order; the next ones are under way meanwhile."""
    step = source.config.fetch_concurrency
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(source.fetch, rows[:step])
        for following in range(step, len(rows) + step, step):
            batch = coming.result()
            coming = ahead.submit(source.fetch, rows[following : following + step])
            yield from batch


def _table(rows: Sequence[tuple[bytes, str, str | None]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
