"""The nearest neighbours of images under one network, and how another network changes them. No Ray here.

Images of two sources -> features with the images' indices -> neighbours by cosine -> which queries to show. Queries
and the images among which neighbours are sought (the bank) may be the same source: an image is no neighbour of its
own. Axes: m queries, n bank images, D features, k neighbours.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.evaluation.features import Features

NUM_NEIGHBOURS = 8
"""k: as many as a row of the page has room for."""
_BLOCK = 256  # queries


class Nearest(NamedTuple):
    """Rows of the bank [m, k], the nearest first, and their cosines float32 [m, k]."""

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]


class Change(NamedTuple):
    """How the neighbours of each query have changed."""

    num_new: NDArray[np.int64]
    """How many of the k were not among the k before, [m]."""
    places: NDArray[np.float64]
    """Geometric mean of the places, from 1, that the neighbours had before, [m]."""


def nearest(queries: Features, bank: Features, *, is_same: bool, k: int = NUM_NEIGHBOURS) -> Nearest:
    """Return the k nearest images of the bank to each query by cosine, fewer if the bank is smaller.

    `is_same`: queries and bank are of one source, whose images are no neighbours of their own.
    """
    k = min(k, len(bank.indices) - is_same)
    units, blocks = unit(bank.features), []
    for start in range(0, len(queries.indices), _BLOCK):
        cosines = _cosines(queries, bank, units, slice(start, start + _BLOCK), is_same=is_same)
        rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        blocks.append((rows, np.take_along_axis(cosines, rows, axis=1)))
    return Nearest(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def change(before: tuple[Features, Features], first: Nearest, then: Nearest, *, is_same: bool) -> Change:
    """Return how the neighbours `first`, of queries and bank `before`, became `then`."""
    queries, bank = before
    units, places = unit(bank.features), []
    for start in range(0, len(queries.indices), _BLOCK):
        part = slice(start, start + _BLOCK)
        cosines = _cosines(queries, bank, units, part, is_same=is_same)
        reached = np.take_along_axis(cosines, then.rows[part], axis=1)
        nearer = np.stack(
            [(cosines > reached[:, place, None]).sum(1) for place in range(reached.shape[1])], 1
        )
        places.append(np.exp(np.log1p(nearer).mean(1)))
    is_new = ~(then.rows[:, :, None] == first.rows[:, None, :]).any(2)
    return Change(is_new.sum(1), np.concatenate(places))


def chosen_queries(
    changed: Change | None, num_queries: int, *, each: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return queries to show: a fixed random sample, ascending, and of the others the most changed, these first."""
    sample = np.sort(np.random.default_rng(0).permutation(num_queries)[:each])
    if changed is None:
        return sample, np.empty(0, np.int64)
    order = np.lexsort((-changed.places, -changed.num_new))
    moved = order[(changed.num_new[order] > 0) & ~np.isin(order, sample)]
    return sample, moved[:each]


def same_label(queries: Features, bank: Features, found: Nearest) -> NDArray[np.bool_] | None:
    """Return which neighbours [m, k] have the label of their query; None unless all queries and neighbours have one."""
    labels = np.char.strip(bank.labels)[found.rows]
    own = np.char.strip(queries.labels)[:, None]
    return labels == own if (labels != "").all() and (own != "").all() else None


def unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features with unit length; a feature of zeros stays."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _cosines(
    queries: Features, bank: Features, units: NDArray[np.float32], part: slice, *, is_same: bool
) -> NDArray[np.float32]:
    cosines = unit(queries.features[part]) @ units.T
    if is_same:
        cosines[queries.indices[part, None] == bank.indices[None]] = -np.inf
    return cosines
