"""The order of images: position -> (epoch, image), a pure function with O(1) skip.

A position counts images from the start of the run over all epochs, so one integer is the whole state of the
data stream. Within an epoch the order is a seeded permutation, evaluated point by point: nothing is shuffled
in memory, nothing is stored, and position 10^9 costs as much as position 0. No files and no Ray here.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 6
_EPOCHS = 2
"""Epochs whose order of row groups is kept: a block may lie in two."""
_MASK64 = 0xFFFFFFFFFFFFFFFF


def permute(index: ArrayLike, *, size: int, seed: int) -> NDArray[np.int64]:
    """Map `index` (int array, each in [0, size)) by a seeded permutation of range(size).

    A balanced Feistel network over the next even power of two, applied until the value is in the range (cycle
    walking). It is a bijection by construction, for any round function.
    """
    x = np.asarray(index, dtype=np.int64)
    if x.size and int(x.max()) >= size:
        raise ValueError(f"index={int(x.max())} must be below size={size}")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    tables = _round_function(half_bits, seed)
    out = np.empty(x.size, np.int64)
    walking, places = x.ravel(), np.arange(x.size)
    while len(places):
        left, right = walking >> half_bits, walking & mask
        for table in tables:
            left, right = right, left ^ table[right]
        walking = (left << half_bits) | right
        has_arrived = walking < size
        out[places[has_arrived]] = walking[has_arrived]
        walking, places = walking[~has_arrived], places[~has_arrived]
    return out.reshape(x.shape)


@lru_cache(maxsize=8)
def _round_function(half_bits: int, seed: int) -> NDArray[np.int64]:
    """Return each round's function of every half: [rounds, 2**half_bits]. Half of a billion has 15 bits."""
    halves = np.arange(1 << half_bits, dtype=np.uint64)
    keys = [np.uint64(_splitmix64(seed * _ROUNDS + number + 1)) for number in range(_ROUNDS)]
    mask = np.uint64((1 << half_bits) - 1)
    return np.stack([_mix(halves ^ key) & mask for key in keys]).astype(np.int64)


class Window(NamedTuple):
    """Row groups whose rows are permuted together: all images at the positions [first, stop) of the stream."""

    first: int
    stop: int
    groups: NDArray[np.int64]


class Order:
    """The order of `num_images` images over endless epochs.

    Without `group_sizes` each epoch permutes all images. With `group_sizes` (rows per Parquet row group),
    groups are permuted and taken in windows of `window_groups`, and rows are permuted within a window.
    Neighbouring positions then need few groups: who keeps the groups of a window until all its positions have been
    served reads each group once an epoch.

    With `rows_per_group`, rows lie shuffled in groups of that size, and each group is taken whole (WholeGroups):
    the readers of different positions then share no group.
    """

    most_passes: float = 1
    """How often an image comes in an epoch, on average; of a mix, one of the source for which that is most."""

    def __init__(
        self,
        num_images: int,
        *,
        seed: int,
        group_sizes: NDArray[np.int64] | None = None,
        window_groups: int = 1,
        rows_per_group: int | None = None,
    ) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        self.num_images = num_images
        self._seed = seed
        self._options: dict[str, Any] = {
            "group_sizes": group_sizes,
            "window_groups": window_groups,
            "rows_per_group": rows_per_group,
        }
        self._groups: Windows | WholeGroups | None = None
        if group_sizes is not None:
            sizes = group_sizes.astype(np.int64, copy=False)
            if int(sizes.sum()) != num_images:
                raise ValueError(f"group_sizes sum to {int(sizes.sum())}, not num_images={num_images}")
            self._groups = (
                WholeGroups(sizes, rows_per_group) if rows_per_group else Windows(sizes, window_groups)
            )

    def __reduce__(self) -> tuple[Callable[[int], "Order"], tuple[int]]:
        return partial(Order, seed=self._seed, **self._options), (self.num_images,)

    def locate(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map positions (int array, >= 0) to (epochs, image indices), each int64 of the same shape."""
        epochs, ranks = np.divmod(np.asarray(positions, dtype=np.int64), self.num_images)
        images = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            images[mine] = self._within_epoch(int(epoch), ranks[mine])
        return epochs, images

    def window(self, position: int) -> Window | None:
        """Return the window that holds `position`; None if this order has no windows."""
        if not isinstance(self._groups, Windows):
            return None
        epoch, rank = divmod(position, self.num_images)
        first, stop, groups = self._groups.window(epoch_seed(self._seed, epoch), rank)
        return Window(position - rank + first, position - rank + stop, groups)

    def substitute(self, position: int, attempt: int) -> int:
        """Return the substitute of an unreadable image: the `attempt`-th next in its epoch, cyclic."""
        epoch, rank = divmod(position, self.num_images)
        rank = (rank + attempt) % self.num_images
        return int(self._within_epoch(epoch, np.array([rank]))[0])

    def _within_epoch(self, epoch: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        seed = epoch_seed(self._seed, epoch)
        if self._groups is None:
            return permute(ranks, size=self.num_images, seed=seed)
        return self._groups.images(epoch, seed, ranks)


class Windows:
    """Row groups of `sizes` rows, permuted, of which each `window_groups` have their rows permuted together."""

    def __init__(self, sizes: NDArray[np.int64], window_groups: int) -> None:
        self._starts, self._window_groups = np.cumsum(sizes) - sizes, window_groups
        self._of_epoch = lru_cache(_EPOCHS)(lambda seed: _windows(sizes, window_groups, seed))

    def groups(self, seed: int) -> NDArray[np.int64]:
        """Return the row groups in the order of an epoch with this seed."""
        return self._of_epoch(seed)[0]

    def window(self, seed: int, rank: int) -> tuple[int, int, NDArray[np.int64]]:
        """Return the first rank, the end and the row groups of the window of `rank`, in an epoch with this seed."""
        groups, _, starts = self._of_epoch(seed)
        window = int(np.searchsorted(starts, rank, side="right")) - 1
        first = window * self._window_groups
        return int(starts[window]), int(starts[window + 1]), groups[first : first + self._window_groups]

    def images(self, epoch: int, seed: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the images at these ranks of an epoch with this seed."""
        groups, row_ends, window_starts = self._of_epoch(seed)
        windows = np.searchsorted(window_starts, ranks, side="right") - 1
        images = np.empty_like(ranks)
        for window in np.unique(windows):
            mine = windows == window
            start = window_starts[window]
            rows = permute(
                ranks[mine] - start,
                size=int(window_starts[window + 1] - start),
                seed=_splitmix64(seed + int(window)),
            )
            slot = np.searchsorted(row_ends, rows + start, side="right")
            begin = np.where(slot > 0, row_ends[slot - 1], 0)
            images[mine] = self._starts[groups[slot]] + (rows + start - begin)
        return images


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of an epoch's permutation."""
    return _splitmix64(seed) ^ _splitmix64(~epoch)


def _windows(
    sizes: NDArray[np.int64], window_groups: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return one epoch's permuted groups, the cumulative ends of their rows, and window starts plus end."""
    groups = permute(np.arange(len(sizes)), size=len(sizes), seed=seed)
    row_ends = np.cumsum(sizes[groups])
    starts = np.concatenate([[0], row_ends])
    return groups, row_ends, np.append(starts[:-1:window_groups], starts[-1])


class WholeGroups:
    """Row groups of `rows` images each, permuted, whose rows follow one another.

    A group begins at a multiple of `rows` in the stream of all epochs, so whoever reads a run of positions that
    begins and ends at such multiples reads whole groups, and nobody else reads these. Where the epochs before end
    between two multiples, one group of the epoch is divided: its first part begins the epoch. Groups of fewer rows
    end the epoch.
    """

    def __init__(self, sizes: NDArray[np.int64], rows: int) -> None:
        if int(sizes.max()) > rows:
            raise ValueError(f"group_sizes has {int(sizes.max())}, more than rows_per_group={rows}")
        starts = np.cumsum(sizes) - sizes
        self._rows, self._num_images = rows, int(sizes.sum())
        self._whole = starts[sizes == rows]
        is_short = (sizes > 0) & (sizes < rows)
        self._short, self._short_sizes = starts[is_short], sizes[is_short]
        self._of_epoch = lru_cache(_EPOCHS)(self._order)

    def images(self, epoch: int, seed: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the images at these ranks of an epoch with this seed."""
        head, whole, tail = self._of_epoch(epoch, seed)
        body = ranks - len(head)
        last = len(whole) * self._rows
        is_whole, is_tail = (body >= 0) & (body < last), body >= last
        images = np.empty_like(ranks)
        images[body < 0] = head[ranks[body < 0]]
        images[is_whole] = whole[body[is_whole] // self._rows] + body[is_whole] % self._rows
        images[is_tail] = tail[body[is_tail] - last]
        return images

    def _order(self, epoch: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return an epoch's first images, the first images of its whole groups, and its last images."""
        whole = self._whole[permute(np.arange(len(self._whole)), size=max(1, len(self._whole)), seed=seed)]
        num_first = -(epoch * self._num_images) % self._rows if len(whole) else 0
        divided, whole = (whole[:1], whole[1:]) if num_first else (whole[:0], whole)
        of_divided = (divided[:, None] + np.arange(self._rows)).ravel()
        order = permute(np.arange(len(self._short)), size=max(1, len(self._short)), seed=_splitmix64(seed))
        short, sizes = self._short[order], self._short_sizes[order]
        of_short = np.arange(sizes.sum()) + np.repeat(short - (np.cumsum(sizes) - sizes), sizes)
        return of_divided[:num_first], whole, np.concatenate([of_divided[num_first:], of_short])


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
