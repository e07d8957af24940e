"""Readers that the augment actors of a run share, so that each row group of others' Parquet is read once.

The rows of a row group are spread over a window of the order, and so over the blocks of all actors. If each actor
read for itself, each row group would be read by all of them. So a few readers read instead, each of them its own row
groups, and keep those of the windows in use. Here is how many readers there are, which of them reads a row group,
and how much each keeps. Pure functions; no files and no Ray here.
"""

import math
import threading
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.data.order import Order, Window
from dinoray.pipeline.data.recently_used import Held, RecentlyUsed

_CPUS_PER_READER = 8
"""CPUs that crop what one reader reads: at 300 images a second each, about 250 MB/s."""
_BLOCKS_PER_ACTOR = 2
_WINDOWS = 3
"""The window in use, the one after it, which is read ahead, and the one before, for actors that are late."""
_WINDOWS_APART = 2
"""Windows by which one of several streams may be ahead of another one."""
_DEVIATIONS = 2
"""How far above its share of the row groups in use a reader may have: shares are as even as drawn lots."""


_WINDOWS_BEGUN = 8
"""Windows that were begun lately, and are not begun again by who is late."""


class Sharing(NamedTuple):
    """How the reading of row groups is shared out."""

    num_readers: int
    cache_bytes: int
    """Bytes of row groups that each reader keeps at most."""

    def reader_of(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the reader of each row group."""
        return groups % self.num_readers


def share_reading(
    manifest: Manifest,
    order: Order,
    *,
    most_actors: int,
    cpus_per_actor: float,
    rows_per_block: int,
    num_streams: int = 1,
) -> Sharing | None:
    """Return the readers of a run with up to `most_actors` actors; None if its order has no windows."""
    window, group_bytes = order.window(0), manifest.group_bytes
    if window is None or group_bytes is None:
        return None
    total, largest = int(group_bytes.sum()), int(group_bytes.max())
    # As many row groups as are in the window, each as large as the largest of its source.
    sources, numbers = np.unique(
        np.searchsorted(manifest.group_ends, window.groups, side="right"), return_counts=True
    )
    of_sources = np.split(group_bytes, manifest.group_ends[:-1])
    window_bytes = sum(
        number * int(of_sources[source].max())
        for source, number in zip(sources.tolist(), numbers.tolist(), strict=True)
    )
    num_readers = min(math.ceil(most_actors * cpus_per_actor / _CPUS_PER_READER), len(group_bytes))
    num_windows = _WINDOWS + (_WINDOWS_APART if num_streams > 1 else 0)
    in_use = num_windows * window_bytes
    of_actors = _BLOCKS_PER_ACTOR * most_actors * rows_per_block * total / order.num_images
    each = (in_use + of_actors) / num_readers
    if num_readers > 1:
        each += _DEVIATIONS * math.sqrt(each * largest)
    return Sharing(num_readers, min(math.ceil(each), total))


class WindowCache(RecentlyUsed[int, Held]):
    """Row groups of the windows in use: those whose rows have all been given are dropped first.

    Among the others, those of the window that was begun first. Who is late thus still finds its rows, and a set that
    fits stays whole.
    """

    def __init__(self, max_bytes: int, sizes: NDArray[np.int64]) -> None:
        super().__init__(max_bytes, get_is_use=False)
        self._ends, self._sizes = np.cumsum(sizes), sizes
        self._given: dict[int, set[int]] = {}
        self._begun: deque[int] = deque(maxlen=_WINDOWS_BEGUN)
        self._giving = threading.Lock()

    def begin(self, ahead: Window) -> bool:
        """Keep the row groups of a window and of the next (`groups_ahead`); False if that was done lately."""
        with self._giving:
            if ahead.first in self._begun:
                return False
            self._begun.append(ahead.first)
        self.use(ahead.groups.tolist())
        return True

    def give(self, images: NDArray[np.int64]) -> None:
        """Note that these images have been given to who asked."""
        groups = np.searchsorted(self._ends, images, side="right")
        done = []
        with self._giving:
            for group, image in zip(groups.tolist(), images.tolist(), strict=True):
                given = self._given.setdefault(group, set())
                given.add(image)
                if len(given) == self._sizes[group]:
                    del self._given[group]
                    done.append(group)
        self.release(done)


class StreamsApart:
    """How far the streams of a run have come, in windows; all of them need each window.

    A stream whose train workers wait for those of a slower one runs ahead as far as the object store has room, which
    may be further than readers keep row groups. So it must not begin a window that the others are far from.
    """

    def __init__(self, num_streams: int) -> None:
        self._latest = [-1] * num_streams
        self._begun: set[int] = set()

    def may_begin(self, stream: int, window: int) -> bool:
        """Return whether a stream may begin the window at this position, or one that it has begun before."""
        last = min(latest for other, latest in enumerate(self._latest) if other != stream)
        ahead = sum(last < begun <= window for begun in self._begun | {window})
        return window <= self._latest[stream] or ahead <= _WINDOWS_APART

    def begin(self, stream: int, window: int) -> None:
        """Note that a stream begins the window at this position."""
        self._latest[stream] = max(self._latest[stream], window)
        self._begun = {begun for begun in self._begun | {window} if begun >= min(self._latest)}


def groups_ahead(order: Order, position: int, stop: int) -> Window | None:
    """Return the window of `position`, with the row groups of the window after it; None if the run ends before.

    Those of the first window are asked for again, so that a cache which drops what was unused for longest keeps them.
    """
    now = order.window(position)
    after = None if now is None or now.stop >= stop else order.window(now.stop)
    return None if now is None or after is None else now._replace(groups=np.r_[now.groups, after.groups])
