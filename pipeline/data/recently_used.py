"""A cache of what was used last, limited in bytes. No files and no Ray here."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, Protocol, TypeVar


class HasBytes(Protocol):
    """What is cached: a table, or what stands for one in a count."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        ...


Key = TypeVar("Key", bound=Hashable)
Held = TypeVar("Held", bound=HasBytes)


class RecentlyUsed(Generic[Key, Held]):
    """Cache of the most recently used values: up to `max_bytes`, but always the latest. Thread-safe.

    With `get_is_use=False` only `put` and `use` count as use.
    """

    def __init__(self, max_bytes: int, *, get_is_use: bool = True) -> None:
        self._max_bytes, self._num_bytes, self._get_is_use = max_bytes, 0, get_is_use
        self._held: OrderedDict[Key, Held] = OrderedDict()
        self._reading: dict[Key, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes in the cache."""
        with self._lock:
            return self._num_bytes

    def get(self, key: Key) -> Held | None:
        """Return the value of a key; None if it is not cached."""
        if self._get_is_use:
            self.use([key])
        with self._lock:
            return self._held.get(key)

    def get_or_read(self, key: Key, read: Callable[[], Held]) -> Held:
        """Return the value of a key, from `read()` if it is not cached. Of calls that need it at once, one reads it.

        What `read` raises is raised, and nothing is cached.
        """
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        try:
            with reading:  # who asks meanwhile waits, and does not read it too
                held = self.get(key)
                if held is None:
                    held = read()
                    self.put(key, held)
                return held
        finally:
            with self._lock:
                self._reading.pop(key, None)

    def use(self, keys: Iterable[Key]) -> None:
        """Mark those of the keys that are cached as the latest used, in this order."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._held.move_to_end(key)

    def release(self, keys: Iterable[Key]) -> None:
        """Mark those of the keys that are cached as the first to be dropped."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._held.move_to_end(key, last=False)

    def put(self, key: Key, value: Held) -> None:
        """Add a value and drop the least recently used ones."""
        with self._lock:
            self._drop(key)
            self._held[key] = value
            self._num_bytes += value.nbytes
            while self._num_bytes > self._max_bytes and len(self._held) > 1:
                self._drop(next(iter(self._held)))

    def forget(self, key: Key) -> None:
        """Drop the value of a key, if it is cached."""
        with self._lock:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        if key in self._held:
            self._num_bytes -= self._held.pop(key).nbytes
