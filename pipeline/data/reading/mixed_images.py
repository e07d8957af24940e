"""The images of several sources, numbered one source after the other. Each source reads its own; no Ray here."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np

from dinoray.pipeline.data.manifests.manifest import Manifest
from dinoray.pipeline.data.reading.fetched import Fetched
from dinoray.pipeline.data.reading.image_reader import Begin
from dinoray.pipeline.data.recently_used import Held, RecentlyUsed


class Part(Protocol):
    """What is asked of a source."""

    @property
    def num_images(self) -> int:
        """As `Source.num_images`."""
        ...

    def key(self, index: int) -> str:
        """As `Source.key`."""
        ...

    def arrivals(self, indices: Sequence[int]) -> Iterator[tuple[int, Fetched]]:
        """As `Source.arrivals`."""
        ...

    def keep_in(self, cache: Any) -> None:
        """As `Source.keep_in`."""
        ...


class MixedImages:
    """The images of all sources of a mixture. Keys begin with the name of their source: `photos: cats/1.jpg`."""

    def __init__(self, parts: Sequence[Part], manifest: Manifest) -> None:
        self._parts, self._names = parts, manifest.names
        self._ends = np.cumsum([part.num_images for part in parts])
        self._firsts = np.r_[0, self._ends[:-1]]
        self._first_groups = np.r_[0, manifest.group_ends[:-1]].tolist()
        self.num_images = int(self._ends[-1])

    def key(self, index: int) -> str:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._names[number]}: {self._parts[number].key(index - int(self._firsts[number]))}"

    def arrivals(self, indices: Sequence[int], begin: Begin) -> Iterator[tuple[int, Fetched]]:
        wanted = np.asarray(indices, np.int64)
        numbers = np.searchsorted(self._ends, wanted, side="right")
        # All begin before the first image is waited for.
        turns = deque(
            self._arrivals(n, wanted, np.flatnonzero(numbers == n)) for n in np.unique(numbers).tolist()
        )
        return _in_turn(turns)

    def _arrivals(self, number: int, wanted: Any, places: Any) -> Iterator[tuple[int, Fetched]]:
        own = self._parts[number].arrivals((wanted[places] - self._firsts[number]).tolist())
        name = self._names[number]
        return ((int(places[at]), one._replace(key=f"{name}: {one.key}")) for at, one in own)

    @property
    def cache(self) -> Any:
        """Groups by their numbers in the mixture, of all sources."""
        return None

    @cache.setter
    def cache(self, cache: RecentlyUsed[int, Any]) -> None:
        for part, first in zip(self._parts, self._first_groups, strict=True):
            part.keep_in(_Numbered(cache, first))


class _Numbered:
    """A cache of all sources as one of them uses it, whose groups begin at the number `first`."""

    def __init__(self, cache: RecentlyUsed[int, Any], first: int) -> None:
        self._cache, self._first = cache, first

    def get_or_read(self, group: int, read: Callable[[], Held]) -> Held:
        return cast(Held, self._cache.get_or_read(self._first + group, read))


def _in_turn(turns: "deque[Iterator[tuple[int, Fetched]]]") -> Iterator[tuple[int, Fetched]]:
    """Yield what comes from each, one after the other, so that all continue to fetch ahead."""
    while turns:
        coming = turns.popleft()
        found = next(coming, None)
        if found is not None:
            turns.append(coming)
            yield found
