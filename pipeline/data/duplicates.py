"""Find the images of a data set that repeat an earlier one: byte for byte, or nearly the same picture.

Images are numbered in the order of the manifest, and the first one of several is the original: the result depends on
the images alone. Takes about 80 bytes an image, more where most look alike. Pure functions; no storage and no Ray here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

MOST_BITS = 3
"""Bits in which the difference hashes of near-duplicates differ at most."""
MOST_LEVELS = 6
"""Levels, of 255, by which their pictures of 8 x 8 pixels differ at most, on average."""
_BANDS, _BITS_PER_BAND = (
    4,
    16,
)  # of two hashes that differ in fewer bits than there are bands, one band is the same
_MOST_COMPARED = 1024
"""Hashes that one is compared with, in each band, at most: a band that most images share would take for ever."""
_MOST_CLOSE = 16
"""Close hashes that are remembered of one, in each band, at most."""
_MOST_ORIGINALS = 64
"""Originals that an image is compared with, at most."""
_NUM_BITS = np.array([number.bit_count() for number in range(1 << 16)], np.uint8)


class Duplicates(NamedTuple):
    """Images that repeat an earlier one, ascending: both int64 [num_duplicates]."""

    images: Indices
    originals: Indices

    def __len__(self) -> int:
        return len(self.images)


def find_exact(digests: NDArray[np.uint64]) -> Duplicates:
    """Return the images whose digest, uint64 [n,2], an earlier image has."""
    order = np.lexsort(
        (digests[:, 0], digests[:, 1])
    )  # stable: of the same digest, the first image comes first
    ordered = digests[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    originals = np.empty(len(order), np.int64)
    originals[order] = order[is_first][np.cumsum(is_first) - 1]
    images = np.flatnonzero(originals != np.arange(len(order)))
    return Duplicates(images, originals[images])


def find_near(hashes: NDArray[np.uint64], small: Callable[[Indices], NDArray[np.uint8]]) -> Duplicates:
    """Return the images that are nearly the same picture as an earlier one, which is no near-duplicate itself.

    `hashes` are difference hashes, uint64 [n]. `small(images)` returns the pictures [k,192] of the images that have
    company by their hashes. Sets in which very many images look alike are searched in part: _MOST_COMPARED.
    """
    values, value_of, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    neighbours = _Neighbours(values)
    has_company = counts > 1
    has_company[neighbours.values] = True
    images = np.flatnonzero(has_company[value_of])
    pictures = small(images).astype(np.int16)
    kept: dict[int, list[int]] = defaultdict(list)  # hash -> places in `images` of originals
    found: list[tuple[int, int]] = []
    for place, value in enumerate(value_of[images].tolist()):
        others = sorted(other for near in (value, *neighbours.of(value)) for other in kept[near])
        others = others[:_MOST_ORIGINALS]
        levels = np.abs(pictures[others] - pictures[place]).mean(axis=1)
        same = np.flatnonzero(levels <= MOST_LEVELS)
        if len(same):
            found.append((place, others[same[0]]))
        else:
            kept[value].append(place)
    pairs = images[np.array(found, np.int64).reshape(-1, 2)]
    return Duplicates(pairs[:, 0], pairs[:, 1])


class _Neighbours:
    """Which of some different hashes, uint64 [n] ascending, differ in at most MOST_BITS bits."""

    def __init__(self, values: NDArray[np.uint64]) -> None:
        number = len(values)
        found = [
            one * number + other
            for band in range(_BANDS)
            for left, right in _close_in_band(values, band)
            for one, other in ((left, right), (right, left))
        ]
        pairs = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
        self.values, self._others = pairs // max(1, number), pairs % max(1, number)
        """Indices of the hashes that have such neighbours, once for each."""
        self._begins = np.searchsorted(self.values, np.arange(number + 1))

    def of(self, value: int) -> list[int]:
        """Return the indices of the neighbours of a hash, by its index."""
        close: list[int] = self._others[self._begins[value] : self._begins[value + 1]].tolist()
        return close


def _close_in_band(values: NDArray[np.uint64], band: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield pairs of close hashes, as indices, that are the same in a band of their bits."""
    bands = ((values >> np.uint64(band * _BITS_PER_BAND)) & np.uint64(0xFFFF)).astype(np.uint16)
    order = np.argsort(bands, kind="stable")
    bands, ordered = bands[order], values[order]
    num_close = np.zeros(len(order), np.int16)
    left = np.arange(len(order))
    for shift in range(1, _MOST_COMPARED):
        left = left[: np.searchsorted(left, len(order) - shift)]
        left = left[(bands[left] == bands[left + shift]) & (num_close[left] < _MOST_CLOSE)]
        if not len(left):
            return
        close = left[_num_bits(ordered[left] ^ ordered[left + shift]) <= MOST_BITS]
        num_close[close] += 1
        if len(close):
            yield order[close], order[close + shift]


def _num_bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    return _NUM_BITS[values.view(np.uint16)].reshape(-1, 4).sum(axis=1, dtype=np.int64)
