"""The seam between a source and its kinds: how the images of a manifest are read. A class for each kind.

objects.py reads image objects, rows.py rows of Parquet, tar_members.py members of tar files.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from dinoray.models.errors import DataError
from dinoray.pipeline.data.reading.fetched import BAD_OBJECT, Fetched
from dinoray.pipeline.data.recently_used import Held, RecentlyUsed
from dinoray.pipeline.storage.retry import Retry

Item = TypeVar("Item")
Result = TypeVar("Result")


class Read(Protocol):
    """`Source.read`: how an object or shard is read."""

    def __call__(self, key: str, operation: Callable[[Retry], Result]) -> Result:
        """Return `operation(retry)`."""
        ...


class Begin(Protocol):
    """How a source begins calls: several at once, as many as their results of about `sizes` bytes fit its buffer."""

    def __call__(
        self, work: Callable[[Item], Result], items: Sequence[Item], sizes: Sequence[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (place in `items`, result of `work`) as calls end."""
        ...


class ImageReader(Protocol):
    """The images of a manifest, by index in [0, num_images)."""

    num_images: int
    cache: Any
    """RecentlyUsed groups, by number; None where each image is read alone."""

    def key(self, index: int) -> str:
        """Return the name of an image, without reading it."""
        ...

    def arrivals(self, indices: Sequence[int], begin: Begin) -> Iterator[tuple[int, Fetched]]:
        """Yield (place in `indices`, image) on arrival; the first reads begin before this returns."""
        ...


def read_groups(
    groups: Sequence[int],
    begin: Begin,
    *,
    cache: RecentlyUsed[int, Held],
    num_bytes: Callable[[list[int]], list[int]],
    read: Callable[[int], Held],
    image: Callable[[int, int, Held | DataError], Fetched],
) -> Iterator[tuple[int, Fetched]]:
    """Yield (place, image) of images that lie in these `groups`, one for each image; read each group once.

    `num_bytes` returns the sizes of groups, `read` reads one, and `image` makes the image of (place, group) from what
    was read, or from the error that all images of the group share.
    """
    places: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    distinct = list(places)

    def held(group: int) -> Held | DataError:
        try:
            return cache.get_or_read(group, lambda: read(group))
        except BAD_OBJECT as error:
            return error

    found = begin(held, distinct, num_bytes(distinct))

    def images() -> Iterator[tuple[int, Fetched]]:
        for which, data in found:
            group = distinct[which]
            for place in places[group]:
                yield place, image(place, group, data)

    return images()
