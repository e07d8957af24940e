"""A range of the keys of a listing while it is read, page by page: what has come, and where it meets the next one."""

import pyarrow as pa

from dinoray.pipeline.storage.pages import Objects


class KeyRange:
    """The keys after `start` up to and including `end`, or, with None, all that follow."""

    def __init__(self, start: str, end: str | None, following: "KeyRange | None" = None) -> None:
        self.start, self.end, self.following = start, end, following
        self.token: str | None = None
        self.is_begun, self.is_read, self.is_dropped = False, False, False
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
        self._rest = Objects([], [], [])
        self._batches: list[pa.RecordBatch] = []

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
        rest, self._rest, self.is_read = self._rest, Objects([], [], []), False
        return self.take(rest, self.token) - dropped
