"""Count what a data set is made of, from the facts about its images: formats, sizes, shapes, values, labels.

Memory does not grow with the number of images. Pure functions; no storage and no Ray here.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_MEGAPIXELS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_KILOBYTES = (1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
_SHAPES = (1 / 4, 1 / 2, 5 / 8, 7 / 8, 8 / 7, 8 / 5, 2 / 1, 4 / 1)
_LEVELS = (1, 32, 64, 96, 128, 160, 192, 224, 255)
_MOST_SIZES = 100_000
"""Different sizes in pixels that are told apart; what comes later counts in the histogram alone."""


class Bars(NamedTuple):
    """A histogram: a label and a count for each range, without the empty ranges at both ends."""

    labels: Sequence[str]
    counts: Sequence[int]


class DataStatistics:
    """Counts over images that `add` takes a table at a time."""

    def __init__(self) -> None:
        self.num_images = self.num_bytes = 0
        self.kinds: Counter[tuple[str, str]] = Counter()
        """Images of each format, and its channels."""
        self.labels: Counter[str | None] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        """Images of each width and height."""
        self.num_constant = 0
        """Images all of whose values are the same."""
        self.low, self.high = np.inf, -np.inf
        self._histograms = {name: np.zeros(len(edges) + 1, np.int64) for name, (edges, _) in _RANGES.items()}

    def add(self, table: pa.Table) -> None:
        """Count the images of a table with the columns of ImageFacts; of labels too, if it has the column."""
        if not table.num_rows:
            return
        self.num_images += table.num_rows
        self.num_bytes += pc.sum(table["num_bytes"]).as_py()
        width, height, low, high, mean, num_bytes = (
            table[name].to_numpy() for name in ("width", "height", "low", "high", "mean", "num_bytes")
        )
        self._count(self.kinds, table.select(["format", "channels"]))
        self._count(self.sizes, table.select(["width", "height"]))
        if "label" in table.column_names:
            for row in pc.value_counts(table["label"].combine_chunks()).to_pylist():
                self.labels[row["values"]] += row["counts"]
        self.num_constant += int((low == high).sum())
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        values = {
            "pixels": width * height / 1e6,
            "bytes": num_bytes / 1e3,
            "shape": width / height,
            "mean": mean,
        }
        for name, numbers in values.items():
            edges = _RANGES[name][0]
            self._histograms[name] += np.bincount(
                np.searchsorted(edges, numbers, side="right"), minlength=len(edges) + 1
            )

    def bars(self, name: str) -> Bars:
        """Return the histogram of `pixels` (megapixels), `bytes` (kB), `shape` (width / height) or `mean` (levels)."""
        edges, unit = _RANGES[name]
        counts = self._histograms[name]
        filled = np.flatnonzero(counts)
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        return Bars([*_names(edges, unit)][first:last], counts[first:last].tolist())

    def median_size(self) -> tuple[int, int]:
        """Return the width and height of the image in the middle by its number of pixels; (0, 0) without images."""
        sizes = sorted(self.sizes.items(), key=lambda one: (one[0][0] * one[0][1], one[0]))
        seen, half = 0, sum(self.sizes.values()) / 2
        for size, count in sizes:
            seen += count
            if seen >= half:
                return size
        return 0, 0

    def largest_size(self) -> tuple[int, int]:
        """Return the width and height of the image with the most pixels; (0, 0) without images."""
        return max(self.sizes, key=lambda size: (size[0] * size[1], size), default=(0, 0))

    def smallest_size(self) -> tuple[int, int]:
        """Return the width and height of the image with the fewest pixels; (0, 0) without images."""
        return min(self.sizes, key=lambda size: (size[0] * size[1], size), default=(0, 0))

    def _count(self, counter: "Counter[tuple[str, str]] | Counter[tuple[int, int]]", pairs: pa.Table) -> None:
        for row in pairs.group_by(pairs.column_names).aggregate([([], "count_all")]).to_pylist():
            *pair, number = (row[name] for name in (*pairs.column_names, "count_all"))
            if tuple(pair) in counter or len(counter) < _MOST_SIZES:
                counter[tuple(pair)] += number


def _names(edges: Sequence[float], unit: str) -> Iterator[str]:
    texts = [_SHAPE_NAMES.get(edge, f"{edge:g}") if unit == "" else f"{edge:g}" for edge in edges]
    yield f"below {texts[0]}{unit}"
    for one, other in pairwise(texts):
        yield f"{one} to {other}{unit}"
    yield f"{texts[-1]}{unit} or more"


_SHAPE_NAMES = {
    1 / 4: "1:4",
    1 / 2: "1:2",
    5 / 8: "5:8",
    7 / 8: "7:8",
    8 / 7: "8:7",
    8 / 5: "8:5",
    2: "2:1",
    4: "4:1",
}
_RANGES: dict[str, tuple[Sequence[float], str]] = {
    "pixels": (_MEGAPIXELS, " MP"),
    "bytes": (_KILOBYTES, " kB"),
    "shape": (_SHAPES, ""),
    "mean": (_LEVELS, " of 255"),
}


def evenly(number: int, most: int) -> NDArray[np.int64]:
    """Return up to `most` indices in [0, number), evenly spread, ascending."""
    return np.unique(np.linspace(0, max(0, number - 1), min(number, most)).astype(np.int64))
