"""One line about a long listing: renewed in place on a terminal, printed now and then elsewhere.

It goes to stderr, because what a command prints on stdout may be read by a program.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dinoray.pipeline.storage.progress import Count, show_progress

_LIVE_SECONDS = 1.0
"""A listing that takes no longer shows nothing on a terminal."""
_PLAIN_SECONDS = 30.0
"""Time between plain lines; a listing that takes no longer prints nothing."""


def show_progress_lines() -> None:
    """Show the listings of this process on its stderr."""
    lines = ProgressLines(Console(stderr=True))
    show_progress(lines.show)


def describe_progress(count: Count, seconds: float) -> str:
    """`listing s3://photos: 1,250,000 keys  48,200 keys/s  26 s`; the rate leaves out what was kept."""
    done = f"{count.done:,}" if count.total is None else f"{count.done:,} of {count.total:,}"
    rate = (count.done - count.kept) / seconds if seconds else 0.0
    kept = f"  {count.kept:,} kept of the listing that was interrupted" if count.kept else ""
    return f"{count.what}: {done} {count.unit}  {rate:,.0f} {count.unit}/s  {seconds:.0f} s{kept}"


class ProgressLines:
    """Shows counts on a console."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        # TERM=dumb is a terminal that cannot move its cursor.
        self._is_in_place = console.is_terminal and not console.is_dumb_terminal

    @contextlib.contextmanager
    def show(self, count: Count) -> Iterator[Count]:
        """Show `count` until the context ends; the line in place is removed then."""
        began, is_over = self._clock(), threading.Event()
        watch = threading.Thread(
            target=self._watch, args=(count, began, is_over), name="progress", daemon=True
        )
        watch.start()
        try:
            yield count
        finally:
            is_over.set()
            watch.join()

    def _watch(self, count: Count, began: float, is_over: threading.Event) -> None:
        """Renew the line while the listing waits, too: an answer may take minutes."""
        if not self._is_in_place:
            while not is_over.wait(_PLAIN_SECONDS):
                self._console.print(self._line(count, began), soft_wrap=True)
        elif not is_over.wait(_LIVE_SECONDS):
            renew = lambda: self._line(count, began)  # noqa: E731
            with Live(console=self._console, get_renderable=renew, refresh_per_second=2, transient=True):
                is_over.wait()

    def _line(self, count: Count, began: float) -> Text:
        return Text(describe_progress(count, self._clock() - began), overflow="ellipsis", no_wrap=True)
