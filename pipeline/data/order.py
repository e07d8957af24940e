"""The order of images: position -> (epoch, image), a pure function with O(1) skip.

A position counts images from the start of the run over all epochs, so one integer is the whole state of the
data stream. Within an epoch the order is a seeded permutation, evaluated point by point: nothing is shuffled
in memory, nothing is stored, and position 10^9 costs as much as position 0. No files and no Ray here.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

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


class Order:
    """The order of `num_images` images over endless epochs.

    Without `group_sizes` each epoch permutes all images. With `group_sizes` (rows per Parquet row group),
    groups are permuted and taken in windows of `window_groups`, and rows are permuted within a window.
    Neighbouring positions then need few groups, and a reader that caches one window reads each group once.
    """

    def __init__(
        self,
        num_images: int,
        *,
        seed: int,
        group_sizes: NDArray[np.int64] | None = None,
        window_groups: int = 1,
    ) -> None:
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        self.num_images = num_images
        self._seed = seed
        self._group_sizes = group_sizes
        self._window_groups = window_groups
        if group_sizes is not None:
            if int(group_sizes.sum()) != num_images:
                raise ValueError(f"group_sizes sum to {int(group_sizes.sum())}, not num_images={num_images}")
            self._group_starts = np.cumsum(group_sizes) - group_sizes
            sizes = group_sizes.astype(np.int64, copy=False)
            self._windows = lru_cache(_EPOCHS)(lambda epoch_seed: _windows(sizes, window_groups, epoch_seed))

    def __reduce__(self) -> tuple[Callable[[int], "Order"], tuple[int]]:
        options: dict[str, Any] = {"group_sizes": self._group_sizes, "window_groups": self._window_groups}
        return partial(Order, seed=self._seed, **options), (self.num_images,)

    def locate(self, positions: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map positions (int array, >= 0) to (epochs, image indices), each int64 of the same shape."""
        epochs, ranks = np.divmod(np.asarray(positions, dtype=np.int64), self.num_images)
        images = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            images[mine] = self._within_epoch(int(epoch), ranks[mine])
        return epochs, images

    def substitute(self, position: int, attempt: int) -> int:
        """Return the substitute of an unreadable image: the `attempt`-th next in its epoch, cyclic."""
        epoch, rank = divmod(position, self.num_images)
        rank = (rank + attempt) % self.num_images
        return int(self._within_epoch(epoch, np.array([rank]))[0])

    def _within_epoch(self, epoch: int, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        seed = _splitmix64(self._seed) ^ _splitmix64(~epoch)
        if self._group_sizes is None:
            return permute(ranks, size=self.num_images, seed=seed)
        groups, row_ends, window_starts = self._windows(seed)
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
            images[mine] = self._group_starts[groups[slot]] + (rows + start - begin)
        return images


def _windows(
    sizes: NDArray[np.int64], window_groups: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return one epoch's permuted groups, the cumulative ends of their rows, and window starts plus end."""
    groups = permute(np.arange(len(sizes)), size=len(sizes), seed=seed)
    row_ends = np.cumsum(sizes[groups])
    starts = np.concatenate([[0], row_ends])
    return groups, row_ends, np.append(starts[:-1:window_groups], starts[-1])


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
