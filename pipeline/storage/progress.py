"""How far a long listing has come, for a person who waits for it.

The listing counts; whoever shows the count registers with `show_progress`. Without that nothing is shown. Prints
nothing itself.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Count:
    """How much of something is done. Thread-safe."""

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        self.what, self.unit, self.total = what, unit, total
        """`listing s3://bucket`, `keys`, and how many there will be, if that is known."""
        self.done = 0
        self.kept = 0
        """What an earlier attempt had done; part of `done`."""
        self._lock = threading.Lock()

    def add(self, number: int, *, kept: bool = False) -> None:
        """Count more; `kept` if an earlier attempt had done it."""
        with self._lock:
            self.done += number
            self.kept += number if kept else 0


Show = Callable[[Count], contextlib.AbstractContextManager[Count]]
"""Shows a count until the context ends; gives the count to add to."""


@contextlib.contextmanager
def _unseen(count: Count) -> Iterator[Count]:
    yield count


_show: Show = _unseen


def show_progress(show: Show) -> None:
    """Set what shows the counts of this process."""
    global _show
    _show = show


def counting(what: str, unit: str, total: int | None = None) -> contextlib.AbstractContextManager[Count]:
    """Return a context that shows a count from 0 on; it gives the Count to add to."""
    return _show(Count(what, unit, total))
