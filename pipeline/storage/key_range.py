"""A range of the keys of a listing while it is read, page by page: what has come, and where it meets the next one."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from dinoray.pipeline.storage.pages import Objects


class Stretch(NamedTuple):
    """Some of the keys of a listing that lie next to each other: those after `start` up to and including `end`."""

    start: str
    end: str | None
    """None for all that follow."""
    next: str | None
    """The first key beyond the end; None if the listing ended."""
    batch: pa.RecordBatch
    """At least one object, of the schema LISTED."""

    def is_in_order(self) -> bool:
        """Return True if the keys ascend in the order of their bytes, between `start` and `end` and before `next`."""
        keys = self.batch["key"]
        if not len(keys) or not pc.all(pc.less(keys[:-1], keys[1:]), min_count=0).as_py():
            return False
        first, last = keys[0].as_py(), keys[-1].as_py()
        end = last if self.end is None else self.end
        return self.start < first and last <= end and (self.next is None or end < self.next)


class KeyRange:
    """The keys after `start` up to and including `end`, or, with None, all that follow."""

    def __init__(self, start: str, end: str | None, following: "KeyRange | None" = None) -> None:
        self.start, self.end, self.following = start, end, following
        self.token: str | None = None
        self.is_begun, self.is_read, self.is_dropped, self.is_kept = False, False, False, False
        self.first: str | None = None
        """Once begun, the first key that the store gave; None if there was none."""
        self.next: str | None = None
        """Once read, the first key beyond the end; None if the listing ended."""
        self.before, self.last = start, start
        """The keys that the latest page began and ended with."""
        self.num_keys = 0
        self.cuts = 0
        """Cuts since the latest page."""
        self.left: float | None = None
        """About how many pages are left, if that has been worked out since the latest page or cut."""
        self._rest = Objects([], [], [], [])
        self._batches: list[pa.RecordBatch] = []
        self._unkept: list[pa.RecordBatch] = []
        self._kept_to = start

    @classmethod
    def of_stretch(cls, stretch: Stretch) -> "KeyRange":
        """Return a range that an earlier attempt has read."""
        keys = cls(stretch.start, stretch.end)
        keys.is_begun, keys.is_read, keys.is_kept = True, True, True
        keys.first, keys.next = stretch.batch["key"][0].as_py(), stretch.next
        keys._batches, keys.num_keys = [stretch.batch], stretch.batch.num_rows
        return keys

    def take(self, objects: Objects, token: str | None) -> int:
        """Add a page, and the token of the next one; what lies beyond the end is set aside.

        Return the number of keys added.
        """
        keys = objects.keys
        if not self.is_begun and (keys or token is None):
            self.is_begun, self.first = True, keys[0] if keys else None
            if self.first is not None and self.first <= self.start:
                self.refuse()
                return 0
        self.token, highest = token, max(keys, default="")
        if self.end is not None and highest > self.end:
            place = next(index for index, key in enumerate(keys) if key > self.end)
            self.next, self.is_read = keys[place], True
            objects, self._rest = objects.cut(place)
        elif token is None:
            self.next, self.is_read = None, True
        if objects.keys:
            self._batches.append(objects.to_arrow())
            self._unkept.append(self._batches[-1])
            self.before, self.last, self.cuts = objects.keys[0], max(self.last, highest), 0
            self.left = None
            self.num_keys += len(objects.keys)
        return len(objects.keys)

    def refuse(self) -> None:
        """Begin and end without a key that could follow another."""
        self.is_begun, self.is_read, self.first = True, True, ""

    def taken(self) -> list[pa.RecordBatch]:
        """Return what has been added since the last call."""
        batches, self._batches = self._batches, []
        return batches

    def take_stretch(self, least_pages: int) -> Stretch | None:
        """Return the pages since the last call, if they are `least_pages` or the last ones, else None.

        While more may follow, the latest page waits: the first key after a stretch must be known.
        """
        pages, rest, end, after = self._unkept, self._unkept[:0], self.end, self.next
        if not self.is_read:
            pages, rest = pages[:-1], pages[-1:]
        if not pages or (rest and len(pages) < least_pages):
            return None
        if rest:
            end, after = pages[-1]["key"][-1].as_py(), rest[0]["key"][0].as_py()
        stretch = Stretch(self._kept_to, end, after, pa.concat_batches(pages))
        self._kept_to, self._unkept = end or "", rest
        return stretch

    def cut(self, name: str) -> "KeyRange":
        """End this range at `name` and return a new one for what follows."""
        self.end, self.following = name, KeyRange(name, self.end, self.following)
        self.cuts, self.left = self.cuts + 1, None
        return self.following

    def is_followed(self) -> bool:
        """Return True if the next range begins with the first key beyond this one."""
        return self.following is not None and self.next == self.following.first

    def replace_following(self) -> int:
        """Go on to the end of the next range, whose keys no longer count; return the change of the number of keys."""
        assert self.following is not None
        self.following.is_dropped, dropped = True, self.following.num_keys
        self.end, self.following = self.following.end, self.following.following
        rest, self._rest, self.is_read = self._rest, Objects([], [], [], []), False
        return self.take(rest, self.token) - dropped


def ranges_around(stretches: Iterable[Stretch]) -> list[KeyRange]:
    """Return ranges for all keys: the stretches, and what lies between them, which is not read yet.

    The stretches are sorted and do not overlap.
    """
    ranges: list[KeyRange] = []
    end: str | None = ""
    for stretch in stretches:
        assert end is not None
        if stretch.start != end:
            ranges.append(KeyRange(end, stretch.start))
        ranges.append(KeyRange.of_stretch(stretch))
        end = stretch.end
    if end is not None:
        ranges.append(KeyRange(end, None))
    for one, following in pairwise(ranges):
        one.following = following
    return ranges
