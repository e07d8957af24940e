"""How well the order of images mixes a set that lies sorted by class: ours, for each layout, beside a full shuffle.

    python benchmarks/order.py [--classes 1000] [--images-per-class 1300] [--batch 1024] [--epochs 2]

No image is read. The layouts:

    objects     one object per image, in the order of the listing, class by class
    packed      the same, packed by `jobs.pack`
    others      Parquet of other people, class by class: row groups of 100 images of 110 kB, files of 1,000 images
    one pass    the same, packed by `jobs.pack --one-pass`
    two passes  the same, packed by `jobs.pack`
    full        numpy's permutation, for comparison

For each epoch: Spearman's rank correlation of position and place in the listing; the share of neighbours in the stream
that come from the same shard (a file of 1,000 images of the listing, or of what was packed); distinct row groups and
classes in a batch, on average over batches all over the epoch. Prints a table for RESULTS.md.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dinoray.jobs.cli.arguments import CommandLine
from dinoray.jobs.cli.main import run_main
from dinoray.pipeline.data.manifests.manifest import DataConfig, Manifest
from dinoray.pipeline.data.reading.source import Source
from dinoray.pipeline.export.packing_plan import Plan, make_plan

_IMAGE_BYTES = 110_000
_GROUP, _SHARD = 100, 1000
_SAMPLE, _BATCHES = 100_000, 200
_SETTINGS: dict[str, object] = {
    "path": "s3://bucket/data",
    "image_column": "image",
    "label_from_parent": False,
}


def manifest_of(
    group_sizes: NDArray[np.int64] | None, num_images: int, rows_per_group: int | None
) -> Manifest:
    """Return the manifest of so many images of one size, as objects or in row groups."""
    listed = {**_SETTINGS, "key_column": None, "label_column": None}
    rows = np.ones(num_images, np.int64) if group_sizes is None else group_sizes
    columns = {
        "key": pa.array([f"{number:09d}" for number in range(len(rows))], pa.large_string()),
        "size": pa.array(rows * _IMAGE_BYTES),
        "etag": pa.array([""] * len(rows)),
    }
    if group_sizes is None:
        columns["label"] = pa.nulls(num_images, pa.string())
        return Manifest(pa.table(columns), "images", "s3://bucket", 0, listed)
    columns |= {"row_group": pa.array(np.zeros(len(rows), np.int32)), "num_rows": pa.array(rows)}
    columns["num_bytes"] = pa.array(rows * _IMAGE_BYTES)
    return Manifest(pa.table(columns), "parquet", "s3://bucket", 0, listed, rows_per_group=rows_per_group)


def order_of(manifest: Manifest, epoch: int) -> NDArray[np.int64]:
    """Return the images of an epoch in the order in which a run takes them."""
    source = Source(DataConfig(path="s3://bucket/data"), manifest)
    first = epoch * source.num_images
    return source.order(seed=0).locate(np.arange(first, first + source.num_images))[1]


def quality(
    places: NDArray[np.int64],
    shards: NDArray[np.int64],
    groups: NDArray[np.int64],
    per_class: int,
    batch: int,
) -> list[float]:
    """Return the numbers of one epoch; all arrays are in the order of the stream, `places` in the listing."""
    chosen = np.sort(np.random.default_rng(0).choice(len(places), min(_SAMPLE, len(places)), replace=False))
    begins = np.linspace(0, len(places) - batch, _BATCHES).astype(int)

    def distinct(values: NDArray[np.int64]) -> float:
        return float(np.mean([len(np.unique(values[begin : begin + batch])) for begin in begins]))

    return [
        float(spearmanr(chosen, places[chosen]).statistic),
        float((shards[1:] == shards[:-1]).mean()),
        distinct(groups),
        distinct(places // per_class),
    ]


class Packed(NamedTuple):
    """A set that `jobs.pack` wrote."""

    places: NDArray[np.int64]
    """Of each image that is packed, its place in the listing."""
    manifest: Manifest
    parts: NDArray[np.int64]
    """The part of each image."""
    plan: Plan


def pack(manifest: Manifest, first: Packed | None = None) -> Packed:
    """Return what a pass makes of the images of a manifest, or a second pass of those of the `first`."""
    if first is None:
        plan = make_plan(manifest, digest="benchmark", max_pixels=None, rows_per_file=None)
    else:
        plan = first.plan.again(manifest, digest="benchmark", rows_per_file=None)
    images = np.concatenate([plan.images(part, manifest) for part in range(plan.num_parts)])
    rows = np.diff(plan.edges)
    sizes = np.concatenate([np.diff(np.r_[np.arange(0, n, plan.rows_per_group), n]) for n in rows])
    return Packed(
        images if first is None else first.places[images],
        manifest_of(sizes, len(images), plan.rows_per_group),
        np.repeat(np.arange(plan.num_parts), rows),
        plan,
    )


def main(argv: Sequence[str]) -> None:
    """Print a line for each layout."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images-per-class", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args(argv)
    count, per_class = options.classes * options.images_per_class, options.images_per_class
    objects = manifest_of(None, count, None)
    of_others = manifest_of(np.diff(np.r_[np.arange(0, count, _GROUP), count]), count, None)
    one_pass = pack(of_others)
    packed = {
        "packed": pack(objects),
        "one pass": one_pass,
        "two passes": pack(one_pass.manifest, one_pass),
    }
    print(
        f"{options.classes} classes of {per_class} images, batches of {options.batch}, {options.epochs} epochs\n"
    )
    print(
        "| layout | rank correlation | neighbours of one shard | row groups in a batch | classes in a batch |"
    )
    print("|---|---|---|---|---|")
    for name in ("objects", "packed", "others", "one pass", "two passes", "full"):
        found = []
        for epoch in range(options.epochs):
            if name in packed:
                own = packed[name]
                taken = order_of(own.manifest, epoch)
                group_of = np.repeat(np.arange(own.manifest.table.num_rows), own.manifest.group_sizes)
                places, shards, groups = own.places[taken], own.parts[taken], group_of[taken]
            else:
                full = np.random.default_rng(epoch).permutation(count)
                places = (
                    full if name == "full" else order_of(objects if name == "objects" else of_others, epoch)
                )
                shards, groups = places // _SHARD, places // _GROUP if name == "others" else places
            found.append(quality(places, shards, groups, per_class, options.batch))
        correlation, neighbours, groups_in_batch, classes = np.mean(found, axis=0)
        print(
            f"| {name} | {correlation:+.4f} | {neighbours:.4f} | {groups_in_batch:.0f} | {classes:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    run_main(main)
