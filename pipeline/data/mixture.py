"""The order of images of several sources mixed by weight: position -> (source, position in that source's own order).

A pure function of (weights, seed, position), at the price of one block for any position, so that one integer stays the
whole state of the stream. Each source runs through its own epochs. No files and no Ray here.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinoray.pipeline.data.order import permute

BLOCK = 256
"""Positions of a block, each of which has the share of each source to within one image."""
_BLOCKS = 4096
PERIOD = BLOCK * _BLOCKS
"""Positions after which the same blocks come again; in a period each source has its share exactly."""


class Mixture:
    """Sources, by number, mixed by `weights`.

    A ticket is a number in [0, PERIOD), of which each source has an interval as long as its weight. A period uses each
    ticket once: a block, those with one remainder by the number of blocks, which lie evenly over all intervals.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        values = np.asarray(weights, np.float64)
        if not len(values) or not np.isfinite(values).all() or values.min() <= 0:
            raise ValueError(f"weights={list(weights)} must be one or more numbers above 0")
        self._ends = np.rint(np.cumsum(values) / values.sum() * PERIOD).astype(np.int64)
        self.shares: NDArray[np.int64] = np.diff(np.r_[0, self._ends])
        """Positions of each source in a period: int64 [sources]."""
        if not self.shares.all():
            raise ValueError(f"weights={list(weights)}: the least must be at least 1/{PERIOD} of all")
        self._seed = seed
        self._offsets = permute(np.arange(_BLOCKS), size=_BLOCKS, seed=seed)
        # Tickets of a block below an end: offset, offset + _BLOCKS, ...
        below = -((self._offsets[:, None] - self._ends) // _BLOCKS)
        counts = np.diff(below, axis=1, prepend=0)
        self._before = np.cumsum(counts, axis=0) - counts

    def locate(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map positions (int array, >= 0) to (sources, positions in these), each int64 of the same shape."""
        wanted = np.asarray(positions, np.int64)
        numbers, slots = np.divmod(wanted, BLOCK)
        distinct, which = np.unique(numbers, return_inverse=True)
        if not len(distinct):
            return wanted.copy(), wanted.copy()
        sources, own = map(np.stack, zip(*map(self._block, distinct.tolist()), strict=True))
        which = which.reshape(wanted.shape)
        return sources[which, slots], own[which, slots]

    def _block(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each slot of a block, and the position in it."""
        period, place = divmod(number, _BLOCKS)
        slots = permute(np.arange(BLOCK), size=BLOCK, seed=self._seed ^ (number + 1))
        sources = np.searchsorted(self._ends, slots * _BLOCKS + self._offsets[place], side="right")
        own = np.empty_like(sources)
        for source in np.unique(sources).tolist():
            mine = sources == source
            own[mine] = period * self.shares[source] + self._before[place, source] + np.arange(mine.sum())
        return sources, own
