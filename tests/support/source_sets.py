"""The same 24 images with labels as tar files, as Parquet of Hugging Face, and named by addresses in Parquet.

And as TIFF of four channels and 16 bits, one of which is damaged.
"""

import io
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from paths import ROOT
from samples import parquet
from tars import tar_of

from dinoray.pipeline.data.decoding.decode import decode
from dinoray.pipeline.data.demo_images import PATTERNS, draw_demo_image

LABELS = [tuple(PATTERNS)[i % 3] for i in range(24)]
IMAGES = [draw_demo_image(label, "train", i) for i, label in enumerate(LABELS)]


class Set(NamedTuple):
    """The files of a data set, what is printed of it, its keys in order with labels, and the settings that it needs."""

    files: dict[str, bytes]
    line: str
    keys: list[str]
    settings: tuple[str, ...] = ()
    labels: list[str] = LABELS
    crops: tuple[str, ...] = ()
    """Settings of a run on it alone."""
    num_bad: int = 0
    """Images that are damaged, and not among the keys."""


def tar_files() -> Set:
    tars = {}
    for first in (0, 8, 16):
        members: dict[str, bytes] = {}
        for i in range(first, first + 8):
            members |= {f"{i:02}.jpg": IMAGES[i], f"{i:02}.cls": LABELS[i].encode()}
        tars[f"{first:02}.tar"] = tar_of(members)
    return Set(tars, "24 images in 3 tar files", [f"{i // 8 * 8:02}.tar#{i:02}.jpg" for i in range(24)])


def hugging_face() -> Set:
    """Two shards of the schema, with its notes, that `datasets` wrote into the recorded file."""
    schema = pq.read_schema(ROOT / "tests/pipeline/data/huggingface_dataset.parquet")
    classes = sorted(set(LABELS))
    note = schema.metadata[b"huggingface"].replace(
        b'["cat", "dog", "owl"]', str(classes).replace("'", '"').encode()
    )
    rows = [
        {"image": {"bytes": data, "path": None}, "label": classes.index(label), "caption": "a picture"}
        for data, label in zip(IMAGES, LABELS, strict=True)
    ]
    table = pa.Table.from_pylist(rows, schema.with_metadata({b"huggingface": note}))
    files = {}
    for number, first in enumerate((0, 12)):
        sink = pa.BufferOutputStream()
        pq.write_table(table.slice(first, 12), sink, row_group_size=4)
        files[f"data/train-{number:05}-of-00002.parquet"] = sink.getvalue().to_pybytes()
    keys = [f"data/train-{i // 12:05}-of-00002.parquet#{i % 12}" for i in range(24)]
    return Set(files, "24 images in 2 Parquet files", keys)


def addresses() -> Set:
    names = [f"pictures/{i:02}.jpg" for i in range(24)]
    table = parquet({"url": [f"../{name}" for name in names], "label": LABELS})
    files = {"table/all.parquet": table, **dict(zip(names, IMAGES, strict=True))}
    return Set(files, "24 images", names, ("data.uri_column=url",))


def tiffs_of_four_channels() -> Set:
    """Class folders of TIFF of 12 bits in 16: RGB and near-infrared, every other one planar, and one damaged."""
    import tifffile

    files = {}
    for i, (label, data) in enumerate(zip(LABELS, IMAGES, strict=True)):
        colours = decode(data, max_pixels=1 << 20).astype(np.uint16) * 16
        values, file = np.dstack([colours, 4080 - colours[..., :1]]), io.BytesIO()
        layout = {"planarconfig": "contig", "compression": "zlib", "predictor": True}
        if i % 2:
            values, layout = np.moveaxis(values, 2, 0), {"planarconfig": "separate"}
        tifffile.imwrite(file, values, photometric="rgb", extrasamples=("unspecified",), **layout)
        files[f"{label}/{i:02}.tif"] = file.getvalue()
    damaged = f"{LABELS[5]}/05.tif"
    files[damaged] = files[damaged][: len(files[damaged]) // 2]
    keys = sorted(files.keys() - {damaged})
    return Set(
        files,
        "24 images in 3 class folders",
        keys,
        ("data.channels=4", "data.max_bad_fraction=0.1"),
        [key.split("/")[0] for key in keys],
        ("crops.saturation=0", "crops.hue=0", "crops.gray_prob=0"),
        num_bad=1,
    )
