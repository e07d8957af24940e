"""The order of images of several sources mixed by weight: position -> (source, position in that source's own order).

A pure function of (weights, seed, position), at the price of one block for any position, so that one integer stays the
whole state of the stream. Each source runs through its own epochs, which are called passes where an epoch of the mix
has several. No files and no Ray here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinoray.pipeline.data.order import Order, Window, permute

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

    def before(self, position: int) -> list[int]:
        """Return how many images of each source come before `position` (>= 0)."""
        number, slot = divmod(position, BLOCK)
        period, place = divmod(number, _BLOCKS)
        inside = np.bincount(self._block(number)[0][:slot], minlength=len(self.shares))
        return (period * self.shares + self._before[place] + inside).tolist()

    def after(self, source: int, number: int) -> int:
        """Return the position at which the first `number` images of a source have all come."""
        if not number:
            return 0
        period, rest = divmod(number - 1, int(self.shares[source]))
        place = int(np.searchsorted(self._before[:, source], rest, side="right")) - 1
        block = period * _BLOCKS + place
        slots = np.flatnonzero(self._block(block)[0] == source)
        return block * BLOCK + int(slots[rest - self._before[place, source]]) + 1

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


class MixedOrder(Order):
    """The order of images of several sources, which are numbered one source after the other.

    An epoch has as many positions as all sources have images. A source whose share is larger than its part of the
    images is passed through more than once in it, shuffled anew each time; another one continues in the next epoch
    where this one ends. `locate` returns the passes of the sources as epochs: no image has the same crops twice.
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[float], num_groups: Sequence[int], *, seed: int
    ) -> None:
        """`num_groups`: of each source in the manifest, by which row groups are numbered."""
        self.num_images = sum(order.num_images for order in orders)
        self._mixture, self._orders = Mixture(weights, seed=seed), orders
        self._firsts = np.cumsum([0, *(order.num_images for order in orders)])
        self._first_groups = np.cumsum([0, *num_groups]).tolist()
        shares = np.asarray(weights) / sum(weights)
        self.most_passes = max(
            share * self.num_images / order.num_images
            for share, order in zip(shares.tolist(), orders, strict=True)
        )
        self._made_from = partial(_mixed_order, orders, weights, num_groups, seed)

    def __reduce__(self) -> tuple[Callable[[], Order], tuple[()]]:  # type: ignore[override]
        return self._made_from, ()

    def locate(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map positions (int array, >= 0) to (passes of the source, image indices), each int64 of the same shape."""
        sources, own = self._mixture.locate(positions)
        passes, images = np.empty_like(own), np.empty_like(own)
        for source in np.unique(sources).tolist():
            mine = sources == source
            passes[mine], found = self._orders[source].locate(own[mine])
            images[mine] = self._firsts[source] + found
        return passes, images

    def window(self, position: int) -> Window | None:
        """Return the row groups that all sources are at, and between which positions none of them is at others."""
        first, stop = 0, 0
        groups: list[NDArray[np.int64]] = []
        for source, number in enumerate(self._mixture.before(position)):
            window = self._orders[source].window(number)
            if window is None:
                continue
            first = max(first, self._mixture.after(source, window.first))
            end = self._mixture.after(source, window.stop)
            stop = min(stop, end) if groups else end
            groups.append(window.groups + self._first_groups[source])
        return Window(first, stop, np.concatenate(groups)) if groups else None

    def substitute(self, position: int, attempt: int) -> int:
        """Return the substitute of an unreadable image: the `attempt`-th next of its source, in its pass, cyclic."""
        (source,), (own,) = self._mixture.locate([position])
        return int(self._firsts[source]) + self._orders[source].substitute(int(own), attempt)


def _mixed_order(
    orders: Sequence[Order], weights: Sequence[float], num_groups: Sequence[int], seed: int
) -> MixedOrder:
    return MixedOrder(orders, weights, num_groups, seed=seed)
