"""List the objects under a prefix by several requests at once, in the order of one request after the other.

A page can be asked for only with the token of the page before it, or after a given key. So the keys are cut into
ranges, each of which is read page by page. A thread without work cuts a range that another reads, at a folder or a
name in the middle of what is left of it; no key needs to have that name, so this works for any layout of folders.

Cuts lose no key and double none. A range is read until the first key beyond its end, and the next range counts only if
the store began it with that very key: then both are one stretch of the store's order. Else (the store ignores
StartAfter, or begins elsewhere, or has just changed) the range reads on in place of the next one; after a few of these
no more cuts are made. Not covered, and not known to exist: a store
that compares StartAfter by bytes with each key, but lists keys in another order.
"""

import logging
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import pyarrow as pa

from dinoray.models.errors import DataError
from dinoray.pipeline.storage.key_range import KeyRange, ranges_around
from dinoray.pipeline.storage.key_space import pages_left, split_point
from dinoray.pipeline.storage.listing_parts import ListingParts, OutdatedPartsError
from dinoray.pipeline.storage.pages import Page
from dinoray.pipeline.storage.progress import Count
from dinoray.pipeline.storage.retry import Retry, Unreachable

logger = logging.getLogger(__name__)
T = TypeVar("T")

THREADS = 16
"""Requests at once. A page takes some ms of the interpreter, so more would wait for it, not for the store."""
_PAGES_FIRST = 2
"""Pages that are read before any cut: a small data set takes as many requests as it has pages."""
_LEAST_PAGES = 2.0
"""Pages that must be left of a range, by the keys of its latest page, to cut it."""
_MOST_CUTS = 16
"""Cuts of one range between two of its pages."""
_MOST_MISFITS = 3
"""Ranges that did not fit after which no more cuts are made."""
_MOST_LISTS, _ENOUGH_FOLDERS = 8, 64
"""Requests for folders, and folders after which no more are asked for."""
PAGES_PER_PART = 16
"""Pages that a part of an unfinished listing holds, or fewer at the end of a range: about 1 MB in a file."""
_SAMPLED = 16
"""One of so many keys counts for the letters that names are made of."""


class ReadPage(Protocol):
    """Reads a page: the first one, that after a key, or that of a token."""

    def __call__(self, *, start_after: str | None, token: str | None, retry: Retry) -> Page:
        """Return the page. Raises DataError."""
        ...


class ReadFolders(Protocol):
    """Reads the folders directly below one."""

    def __call__(self, folder: str, *, retry: Retry) -> list[str]:
        """Return them with slashes at their ends; the first 1,000 are enough. Raises DataError."""
        ...


def list_ranges(
    read: ReadPage,
    read_folders: ReadFolders,
    prefix: str,
    *,
    retry: Retry,
    retry_later: Retry,
    count: Count | None = None,
    parts: ListingParts | None = None,
    threads: int = THREADS,
) -> Iterator[pa.RecordBatch]:
    """Yield all objects, as LISTED, in the store's order; `read` asks for pages of the keys that start with `prefix`.

    The first request is repeated by `retry`, all others by `retry_later`. Raises the DataError of the first request
    that fails for good. Adds the keys of each page to `count`.

    What `parts` has of an earlier attempt is not asked for again, and what is read is kept there. Raises
    OutdatedPartsError if the store no longer gives what it gave then.
    """
    count = count or Count("listing", "keys")
    stretches = parts.stretches if parts else []
    ranges, token = ranges_around(stretches), None  # an object may have the prefix itself as its key
    for number in range(0 if stretches else _PAGES_FIRST):
        page = read(start_after=None, token=token, retry=retry if number == 0 else retry_later)
        count.add(ranges[0].take(page.objects, page.token))
        yield from ranges[0].taken()
        token = page.token
        if token is None:
            return
    team = _Team(read, read_folders, prefix, ranges, retry_later, count, parts)
    team.learn([] if stretches else page.objects.keys)
    for stretch in stretches:
        count.add(stretch.batch.num_rows, kept=True)
        team.learn(stretch.batch["key"][::_SAMPLED].to_pylist())
    try:
        team.start(threads)
        yield from team.batches()
    finally:
        team.stop()


class _StoppedError(Exception):
    """Nobody awaits the request any more."""


class _Team:
    """Threads that read the ranges, from the first one on."""

    def __init__(
        self,
        read: ReadPage,
        read_folders: ReadFolders,
        prefix: str,
        ranges: list[KeyRange],
        retry: Retry,
        count: Count,
        parts: ListingParts | None,
    ) -> None:
        self._read, self._read_folders, self._prefix = read, read_folders, prefix
        self._first, self._retry, self._count, self._parts = ranges[0], retry, count, parts
        self._changed = threading.Condition()
        unread = [keys for keys in ranges if not keys.is_read]
        self._waiting, self._active = deque(unread), set(unread)
        self._letters, self._misfits = "", 0
        self._folders: list[str] | None = None
        """Sorted; None until the first are known."""
        self._error: BaseException | None = None
        self._is_stopped = False

    def start(self, number: int) -> None:
        """Start the threads. They hold no process up: a request may wait for a store for minutes."""
        for work in (self._find_folders, *[self._read_ranges] * number):
            threading.Thread(target=self._work, args=(work,), name="list-keys", daemon=True).start()

    def stop(self) -> None:
        """Make all threads end after their requests."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield what the ranges hold, in their order, as it comes."""
        current: KeyRange | None = self._first
        while current is not None:
            with self._changed:
                batches = self._wait_for(current)
                if not batches:
                    current = self._after(current)
            yield from batches

    def _wait_for(self, current: KeyRange) -> list[pa.RecordBatch]:
        """Wait for more of a range; [] at its end, once the next range has begun."""
        while True:
            if self._error is not None:
                raise self._error
            if batches := current.taken():
                return batches
            if current.is_read and (current.following is None or current.following.is_begun):
                return []
            self._changed.wait()

    def _after(self, current: KeyRange) -> KeyRange | None:
        """Return the range that follows one that is read, or the same one if it has to go on."""
        if current.following is None or current.is_followed():
            return current.following
        logger.debug(
            "%r was listed after %r, expected was %r", current.following.first, current.last, current.next
        )
        if current.is_kept:
            raise OutdatedPartsError(
                f"{current.following.first!r} follows {current.end!r}, not {current.next!r}"
            )
        self._misfits += 1
        if self._parts:
            self._parts.forget()
        self._active.discard(current.following)
        self._count.add(current.replace_following())
        if not current.is_read:
            self._active.add(current)
            self._waiting.append(current)
            self._changed.notify()
        return current

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _StoppedError:
            pass
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _find_folders(self) -> None:
        """Find folders, the outer ones first, until there are enough."""
        outer = deque([self._prefix])
        for _ in range(_MOST_LISTS):
            try:
                found = self._read_folders(outer.popleft(), retry=self._retry_while_wanted) if outer else []
            except DataError:  # if the store itself fails, the pages fail too
                found = []
            outer += found
            with self._changed:
                self._folders = sorted({*(self._folders or []), *found})
                self._changed.notify_all()
                if not outer or len(self._folders) >= _ENOUGH_FOLDERS or self._is_stopped:
                    return

    def _read_ranges(self) -> None:
        while (keys := self._next_range()) is not None:
            self._read_page(keys)

    def _next_range(self) -> KeyRange | None:
        """Wait for a range to read a page of, or cut one; None at the end."""
        with self._changed:
            while not self._is_stopped and self._error is None:
                if self._waiting:
                    keys = self._waiting.popleft()
                    if not keys.is_dropped:
                        return keys
                    continue
                if (new := self._cut()) is not None:
                    return new
                self._changed.wait()
            return None

    def _cut(self) -> KeyRange | None:
        """Cut the range that was cut least since its latest page, of these the one with most pages left."""
        if self._folders is None or self._misfits >= _MOST_MISFITS:
            return None
        choices = [keys for keys in self._active if keys.is_begun and keys.cuts < _MOST_CUTS]
        choices = [keys for keys in choices if self._pages_left(keys) >= _LEAST_PAGES]
        if not choices:
            return None
        chosen = min(choices, key=lambda keys: (keys.cuts, -self._pages_left(keys)))
        name = self._middle(chosen, self._folders)
        if name is None:
            chosen.cuts = _MOST_CUTS
            return None
        new = chosen.cut(name)
        self._active.add(new)
        return new

    def _middle(self, keys: KeyRange, folders: list[str]) -> str | None:
        begin = bisect_right(folders, keys.last)
        end = len(folders) if keys.end is None else bisect_left(folders, keys.end)
        if begin < end:
            return folders[(begin + end) // 2]
        return split_point(keys.last, keys.end, prefix=self._prefix, letters=self._letters)

    def _pages_left(self, keys: KeyRange) -> float:
        if keys.left is None:
            keys.left = pages_left(
                keys.before, keys.last, keys.end, prefix=self._prefix, letters=self._letters
            )
        return keys.left

    def _read_page(self, keys: KeyRange) -> None:
        """Add a page to a range, unless it was dropped meanwhile."""
        start = None if keys.token else keys.start or None
        try:
            page = self._read(start_after=start, token=keys.token, retry=self._retry_while_wanted)
        except DataError as error:
            if keys.is_begun or isinstance(error, Unreachable):
                raise
            page = None  # the store may refuse the name that the range begins after
        with self._changed:
            if page is None:
                keys.refuse()
            else:
                added = keys.take(page.objects, page.token)
                self._count.add(0 if keys.is_dropped else added)
                self.learn(page.objects.keys)
            stretch = keys.take_stretch(PAGES_PER_PART) if self._parts and not keys.is_dropped else None
            if keys.is_read or keys.is_dropped:
                self._active.discard(keys)
            else:
                self._waiting.append(keys)
            self._changed.notify_all()
        if self._parts and stretch:
            self._parts.keep(stretch)

    def _retry_while_wanted(self, operation: Callable[[], T], *, what: str) -> T:
        def wanted() -> T:
            if self._is_stopped:
                raise _StoppedError
            return operation()

        return self._retry(wanted, what=what)

    def learn(self, keys: list[str]) -> None:
        """Add the letters and digits of some keys to those that names are made of."""
        new = {letter for key in keys[::_SAMPLED] for letter in key if letter.isalnum()}
        if not new.issubset(self._letters):
            self._letters = "".join(sorted(new.union(self._letters)))
