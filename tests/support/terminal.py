"""A program on a pseudo-terminal, and the screen that its terminal shows."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pyte
from paths import ROOT

_SETTINGS_OF_TERMINALS = ("COLUMNS", "LINES", "TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "TTY_")


class Terminal:
    """A running program whose stdout and stderr are a terminal; its stdin is a pipe."""

    def __init__(self, process: "subprocess.Popen[bytes]", master: int, columns: int, rows: int) -> None:
        self.process, self._master = process, master
        self._lock = threading.Lock()
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone once all programs have closed it
            while data := os.read(self._master, 1 << 16):
                with self._lock:
                    self._stream.feed(data)

    def lines(self) -> list[str]:
        """All that was shown, from the first row that scrolled out to the last that is not empty."""
        with self._lock:
            width = self._screen.columns
            past = ["".join(row[x].data for x in range(width)) for row in self._screen.history.top]
            rows = [row.rstrip() for row in [*past, *self._screen.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def send(self, line: str) -> None:
        """Give the program a line of input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def press(self, keys: bytes) -> None:
        """Press keys; the terminal echoes them."""
        os.write(self._master, keys)

    def resize(self, columns: int, rows: int) -> None:
        """Change the size of the window."""
        with self._lock:
            self._screen.resize(rows, columns)
        _set_size(self._master, columns, rows)

    def wait_until(self, condition: Callable[[list[str]], bool], timeout_seconds: float = 60) -> list[str]:
        """The lines once `condition` holds for them."""
        deadline = time.monotonic() + timeout_seconds
        while not condition(lines := self.lines()):
            assert time.monotonic() < deadline, "timed out:\n" + "\n".join(lines)
            time.sleep(0.02)
        return lines

    def end(self) -> list[str]:
        """Close the program's input and wait for its end; return the lines that stay."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.process.wait(60)
        self._reader.join(10)
        assert code == 0, "\n".join(self.lines())
        return self.lines()


@contextlib.contextmanager
def terminal(
    program: str,
    *arguments: str,
    columns: int,
    rows: int = 40,
    term: str = "xterm-256color",
    env: Mapping[str, str] | None = None,
) -> Iterator[Terminal]:
    """`python -c program arguments...` on a terminal of this size."""
    master, slave = pty.openpty()
    _set_size(slave, columns, rows)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS_OF_TERMINALS)}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env=inherited | {"TERM": term, "PYTHONPATH": str(ROOT), **(env or {})},
        stdin=subprocess.PIPE,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    try:
        yield Terminal(process, master, columns, rows)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
