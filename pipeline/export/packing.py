"""Images as Parquet parts in the layout that pretraining reads fastest, optionally shrunk for its crops.

This module stands between a source of any kind and the next run's `data.path`. A packed directory, local or
on S3, follows parquet_parts.py:

    part-00000.parquet        image, key, label?, shuffled, in row groups of 16 images (packing_plan.py)
    _about/pack.json          settings that decide the rows; a command with other settings is refused
    _about/_manifest.parquet  the images, listed once; `data.path` skips files, not folders, with such names
    _about/_images-*.parquet  what each packed image of a part is (packing_facts.py)
    data.html                 the page about all of it

The location of the images is known only to the source; no Ray here.
"""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil, floor, sqrt
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.augment.config import CropsConfig, crop_kinds
from dinoray.pipeline.data.decoding.bad_image import BadImage
from dinoray.pipeline.data.decoding.decode import is_deep
from dinoray.pipeline.data.decoding.image_facts import decode_whole, measure_image, open_any, picture_box
from dinoray.pipeline.data.decoding.jpeg import Decoded, Encoded
from dinoray.pipeline.data.parquet.parquet_rows import read_column
from dinoray.pipeline.data.parquet.row_groups import PACKED
from dinoray.pipeline.data.reading.fetched import BAD_OBJECT
from dinoray.pipeline.data.reading.source import Fetched, Source, Status
from dinoray.pipeline.export.packing_facts import PartFacts
from dinoray.pipeline.export.packing_plan import Plan
from dinoray.pipeline.export.parquet_parts import LEFT_OUT, PartFormat, PartResult, PartWriter
from dinoray.pipeline.storage.files import Directory

QUALITY = 95
"""JPEG quality of the images that `shrink` writes, at full colour resolution.

At 90 and half the colour resolution, files take two thirds of the bytes. Their crops are twice as far from
crops of the photos themselves.
"""
SLACK = 1.21
"""Pixels of the shrunk image per pixel of a crop's side, for a square region.

The narrowest region of the same area, 3:4, has sqrt(4/3) = 1.155 times fewer pixels along its short side.
That is still no fewer than the crop has.
"""
_MOST_SIDE = 65_500  # side of a JPEG, in libjpeg
KIND = PartFormat(
    settings="_about/pack.json",
    manifest="_about/_manifest.parquet",
    metadata=PACKED,
    rows="images",
    written="packed",
    rows_out="rows_out",
    counts=("num_shrunk", "bytes_in", "bytes_out"),
)
OF_FIRST_PASS = ("num_shrunk", "bytes_in")
"""Counts that a table made in two passes has from the first one."""
SCHEMA = pa.schema({"image": pa.binary(), "key": pa.string(), "label": pa.string()})
# Page checksums: bit rot in a JPEG would be decoded without an error. Encoded images do not compress further.
_PARQUET = {
    "compression": {"image": "none", "key": "zstd", "label": "zstd"},
    "use_dictionary": ["label"],
    "write_statistics": ["key", "label"],
    "write_page_checksum": True,
}


def shrink_pixels(crops: CropsConfig, *, slack: float = SLACK) -> int:
    """Return the pixels an image needs: each crop, at its lowest area share, gets `slack` times its side.

    96 px of 5 % at a slack of 1.21: 96^2 / 0.05 * 1.21^2 = 269,863.
    """
    return ceil(max(kind.size**2 / kind.scale[0] for kind in crop_kinds(crops)) * slack**2)


def shrunk_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the size, in whole pixels, at which an image has at most `max_pixels`; never a larger size."""
    if width > height:
        return shrunk_size(height, width, max_pixels)[::-1]
    if width * height <= max_pixels:
        return width, height
    scale = min(sqrt(max_pixels / (width * height)), _MOST_SIDE / height)
    height = max(1, min(floor(height * scale), max_pixels))
    return max(1, min(round(width * scale), max_pixels // height)), height


def shrink(data: bytes, *, max_pixels: int, quality: int = QUALITY, most_pixels: int = 100_000_000) -> bytes:
    """Return an image file of at most `max_pixels`: the same bytes, or a smaller upright JPEG, no metadata.

    A file that would not get smaller stays unchanged, whatever its size. Raises BadImage unless `data` is a
    complete image of at most `most_pixels` pixels.
    """
    return _packed(open_any(data, max_pixels=most_pixels), max_pixels=max_pixels, quality=quality)[0]


def _packed(image: Encoded, *, max_pixels: int | None, quality: int = QUALITY) -> tuple[bytes, Decoded]:
    """Return the file to write for an image, shrunk if it has more than `max_pixels`, and its picture at some size.

    Reads the whole file, which detects truncation. Raises BadImage unless it is a complete image.
    """
    most = image.width * image.height if max_pixels is None else max_pixels
    width, height = shrunk_size(image.width, image.height, most)
    # A smaller JPEG would have 8 bits and three channels.
    is_kept = is_deep(image.data) or (image.pixels is not None and image.pixels.shape[2] != 3)
    if is_kept or (width, height) == (image.width, image.height):
        return image.data, decode_whole(image)
    # Twice as many pixels as requested leave the filter below all detail that it would use of the full
    # picture.
    picture = decode_whole(image, most=min(image.width / width, image.height / height) / 2)
    small = Image.fromarray(picture.pixels).resize(
        (width, height), Image.Resampling.LANCZOS, box=picture_box(image, picture), reducing_gap=None
    )
    # Pillow, because TurboJPEG's own interface, used by simplejpeg, encodes with an inexact transform below
    # 96.
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    return file.getvalue() if file.tell() < len(image.data) else image.data, picture


def packed_settings() -> dict[str, Any]:
    """Return the settings of `data` under which a packed table gives all that was packed, with its keys and labels.

    They replace those that chose images and labels of its source.
    """
    columns = {f"{name}_column": name for name in SCHEMA.names}
    all_of_it = {"manifest": None, "include": (), "exclude": (), "image_list": None, "uri_column": None}
    return {**columns, **all_of_it, "label_from_parent": False, "label_level": -1}


def check_keys(source: Source) -> None:
    """Raise ConfigError, naming the key, if two Parquet rows have one key; image objects cannot."""
    config, manifest = source.config, source.manifest
    column = config.key_column
    if not manifest.of_kind.has_columns or column is None:
        return

    def read(number: int) -> list[str | None]:
        group = manifest.row_group(number)
        uri, size, row_group = manifest.uri(group["key"]), group["size"], group["row_group"]
        try:
            return source.read(
                group["key"],
                lambda retry: read_column(
                    uri, size, row_group, column=column, retry=retry, access=source.storage.access
                ),
            )
        except BAD_OBJECT:
            return []  # its images will be among the bad images

    with ThreadPoolExecutor(config.fetch_concurrency) as pool:
        found = list(pool.map(read, range(manifest.table.num_rows)))
    keys = pa.chunked_array([pa.array(keys, pa.string()) for keys in found]).drop_null()
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        most = counts[int(np.argmax(counts.field("counts").to_numpy()))].as_py()
        raise ConfigError(
            f"data.key_column={column!r} has {most['values']!r} in {most['counts']} rows, but a key must name one "
            "image; choose another column, or none"
        )


def write_part(
    _: Any,
    source: Source,
    part: int,
    *,
    out: Directory,
    plan: Plan,
    left_out: NDArray[np.int64] | None = None,
) -> PartResult:
    """Pack the images of one part and write it, in one step; the facts about them are written before.

    Each image is decoded once, in the pass that reads the source. A second pass passes over the images `left_out`, by
    index. Raises DataError if storage denies access, or if an image that the first pass has written cannot be read: it
    is not a bad image, but lost since.
    """
    places = plan.rows(part)
    chosen = plan.images(part, source.manifest)
    counts = dict.fromkeys(KIND.counts, 0)
    if left_out is not None:
        chosen = chosen[~np.isin(chosen, left_out)]
        counts[LEFT_OUT] = len(places) - len(chosen)
    images = chosen.tolist()
    writer, facts = PartWriter(KIND, part, places, SCHEMA), PartFacts()
    rows: list[tuple[bytes, str, str | None]] = []
    for image, fetched in zip(images, _fetch_ahead(source, images), strict=True):
        data = fetched.data
        if data is None and plan.passes > 1:
            shard = source.manifest.uri(source.key(image).rpartition("#")[0])
            raise DataError(
                f"{shard}, of the first pass, cannot be read ({fetched.reason}); delete it and run again"
            )
        if data is None:
            writer.quarantine(image, fetched.key, fetched.status, fetched.reason)
            continue
        try:
            if plan.passes == 1:
                opened = open_any(data, max_pixels=source.config.max_pixels, config=source.config)
                data, picture = _packed(opened, max_pixels=plan.max_pixels)
                facts.add(image, fetched, measure_image(opened, picture))
        except BadImage as error:
            writer.quarantine(image, fetched.key, Status.CORRUPT, error.reason)
            continue
        if len(rows) == plan.rows_per_group:
            writer.write(_table(rows))
            rows = []
        rows.append((data, fetched.key, fetched.label))
        counts["num_shrunk"] += data is not fetched.data
        counts["bytes_in"] += len(fetched.data or b"")
        counts["bytes_out"] += len(data)
    writer.write(_table(rows))
    if plan.passes == 1:
        facts.write(out, part)
    return writer.commit(out, {**plan.identity, **counts}, **_PARQUET)


def _fetch_ahead(source: Source, rows: Sequence[int]) -> Iterator[Fetched]:
    """Yield the images at these rows of the manifest, in this order, while the next images are being fetched."""
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
