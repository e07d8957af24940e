"""Which image of a source is packed where: a seeded shuffle, cut into parts and row groups.

Image objects are shuffled among all others. Rows of Parquet are shuffled among those of some of its row groups, as
many as fit a part, so that each of these groups is read by one part only. If there are more row groups than that, the
result may be packed a second time: each of its small row groups is a sample of a part, and parts of the second pass mix
those of many parts. No bytes of images and no Ray here.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.data.order import Order, Windows, epoch_seed
from dinoray.pipeline.data.parquet.row_groups import ROWS_PER_GROUP

PART_BYTES = 128 << 20
"""Maximum bytes of a part, by sizes known in advance; actors hold two to three times as much in memory."""
PART_ROWS = 10_000
"""Maximum images in a part: with tiny images an actor would otherwise take many minutes per part."""
MOST_ROWS_PER_GROUP = 16
"""Images in a row group, unless they are large: some 2 MB, for one request.

A run takes row groups whole. As powers of two, they divide the usual batches of its workers.
"""
ROW_GROUP_BYTES = 16 << 20
"""Maximum bytes of a row group, by the mean of all images."""

_SEED = 0
_MANY_GROUPS = 64
"""Row groups shuffled together from which on a batch of a set sorted by class has 95 % of the classes of a draw."""
_SHRUNK_BYTES_PER_PIXEL = 0.5  # of photos at this quality; accurate enough for planning
_SPREAD_PARTS, _LEAST_ROWS = 64, 256  # enough parts to share among actors, none of them tiny


@dataclass(frozen=True)
class Plan:
    """All settings that decide the content of the parts, beside the images.

    `manifest` identifies the image list.
    """

    manifest: str
    edges: tuple[int, ...]
    """First place of each part in the shuffled order, and at the end the total number of images."""
    max_pixels: int | None
    """Larger images are shrunk to this; None leaves every file unchanged."""
    rows_per_group: int = MOST_ROWS_PER_GROUP
    """Images in each row group of a part but the last."""
    groups_at_once: int = 1
    """Row groups of a Parquet source whose rows are shuffled together."""
    passes: int = 1
    """2 for images that an earlier pass has packed, and shrunk."""

    @property
    def num_parts(self) -> int:
        """Return the number of parts."""
        return len(self.edges) - 1

    def rows(self, part: int) -> range:
        """Return the places of a part in the shuffled order."""
        return range(self.edges[part], self.edges[part + 1])

    def images(self, part: int, manifest: Manifest) -> NDArray[np.int64]:
        """Return the manifest's indices of the images of a part, in the order in which they are packed."""
        return _shuffled(manifest, self.groups_at_once).locate(np.array(self.rows(part)))[1]

    def mixes_all(self, manifest: Manifest) -> bool:
        """Return True if batches of what is packed will be mixed as if drawn from all images, or nearly so.

        That is so for image objects, for row groups that are samples already, as those of a packed set are, and where
        rows are shuffled among all row groups or among many.
        """
        groups = manifest.group_sizes
        if groups is None or manifest.rows_per_group is not None:
            return True
        return self.groups_at_once >= min(_MANY_GROUPS, len(groups))

    def again(self, packed: Manifest, *, digest: str, rows_per_file: int | None) -> "Plan":
        """Return the plan of a second pass over what this plan packed.

        `packed` is its manifest, and `digest` identifies it: with one image more or less, all parts are others.
        """
        second = make_plan(packed, digest=digest, max_pixels=None, rows_per_file=rows_per_file)
        return replace(second, max_pixels=self.max_pixels, passes=2)

    @property
    def layout(self) -> dict[str, Any]:
        """Return the settings of the order and of the row groups."""
        several = {"passes": self.passes} if self.passes > 1 else {}
        return several | {
            ROWS_PER_GROUP: self.rows_per_group,
            "groups_at_once": self.groups_at_once,
            "shuffle_seed": _SEED,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Return the settings recorded in the note of each part."""
        return {"manifest": self.manifest, "max_pixels": self.max_pixels, **self.layout}


def make_plan(manifest: Manifest, *, digest: str, max_pixels: int | None, rows_per_file: int | None) -> Plan:
    """Plan parts of `rows_per_file` images each, by default of about `PART_BYTES`.

    Parts are smaller if there are few images. Row groups of a source that are shuffled together are not divided
    between parts unless they are larger than a part, so that each is read once. `digest` identifies the manifest.
    """
    num_images, weights = manifest.num_images, _weights(manifest, max_pixels)
    rows_per_group = MOST_ROWS_PER_GROUP
    while rows_per_group > 1 and rows_per_group * weights.sum() > ROW_GROUP_BYTES * num_images:
        rows_per_group //= 2
    total = int(weights.sum())
    part_bytes = min(PART_BYTES, max(total // _SPREAD_PARTS, ceil(_LEAST_ROWS * total / num_images)))
    at_once = _groups_at_once(manifest, part_bytes // max(1, int(weights.max())), rows_per_file)
    if rows_per_file is None:
        units = _units(manifest, weights, at_once)
        edges = _cut(*units, part_bytes, multiple=rows_per_group if manifest.group_sizes is None else 1)
    else:
        edges = (*range(0, num_images, rows_per_file), num_images)
    return Plan(digest, edges, max_pixels, rows_per_group, at_once)


def _weights(manifest: Manifest, max_pixels: int | None) -> NDArray[np.int64]:
    """Return the packed bytes of each image or row group of a manifest; a tiny image counts more than its bytes."""
    groups, group_bytes = manifest.group_sizes, manifest.group_bytes
    rows = np.ones(manifest.num_images, int) if groups is None else groups
    weights = manifest.object_sizes if group_bytes is None else group_bytes
    if max_pixels is not None:
        weights = np.minimum(weights, rows * ceil(max_pixels * _SHRUNK_BYTES_PER_PIXEL))
    return np.maximum(weights, rows * (PART_BYTES // PART_ROWS))


def _groups_at_once(manifest: Manifest, of_a_part: int, rows_per_file: int | None) -> int:
    """Return the number of row groups of a Parquet source that are shuffled together, at least one.

    They make one part, which can hold `of_a_part` of them, and its actor keeps them in memory.
    """
    groups, group_bytes = manifest.group_sizes, manifest.group_bytes
    if groups is None or group_bytes is None:
        return 1
    most = min(of_a_part, PART_BYTES // max(1, int(group_bytes.max())))
    if rows_per_file is not None:
        most = min(most, rows_per_file // max(1, int(groups.max())))
    return max(1, most)


def _shuffled(manifest: Manifest, groups_at_once: int) -> Order:
    """Return the order in which the images of a manifest are packed: that of its first epoch."""
    return Order(
        manifest.num_images, seed=_SEED, group_sizes=manifest.group_sizes, window_groups=groups_at_once
    )


def _units(
    manifest: Manifest, weights: NDArray[np.int64], groups_at_once: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and bytes of what parts do not divide, in the shuffled order: an image, or row groups that are
    shuffled together."""
    groups = manifest.group_sizes
    if groups is None:
        order = _shuffled(manifest, 1).locate(np.arange(manifest.num_images))[1]
        return np.ones(len(order), int), weights[order]
    order = Windows(groups, groups_at_once).groups(epoch_seed(_SEED, 0))
    begins = np.arange(0, len(order), groups_at_once)
    return np.add.reduceat(groups[order], begins), np.add.reduceat(weights[order], begins)


def _cut(
    rows: NDArray[np.int64], weights: NDArray[np.int64], part_bytes: int, *, multiple: int
) -> tuple[int, ...]:
    """Return the edges of parts of about `part_bytes`, each of a `multiple` of images if it has more than that."""
    num_images = int(rows.sum())
    # As floats, which are exact here, because np.interp takes floats.
    row_ends, weight_ends = (np.concatenate([[0.0], np.cumsum(values)]) for values in (rows, weights))
    edges = [0]
    while edges[-1] < num_images:
        full = float(np.interp(edges[-1], row_ends, weight_ends)) + part_bytes
        end = int(row_ends[np.searchsorted(weight_ends, full, side="right") - 1])
        if end <= edges[-1]:  # within a unit
            end = max(edges[-1] + 1, int(np.interp(full, weight_ends, row_ends)))
        if end < num_images and end - edges[-1] > multiple:
            end -= (end - edges[-1]) % multiple
        edges.append(end)
    return tuple(edges)
