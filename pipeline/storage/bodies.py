"""Reads the body of an answer, and ends it when it only trickles.

Stands between botocore's body and s3.py. A socket's own time limit counts from the last byte, so a body that brings
one byte every few seconds never reaches it. No requests and no retries here.
"""

import time
from collections.abc import Callable
from typing import Any

from dinoray.pipeline.storage.hedging import check_wanted

PACE_SECONDS = 60.0
"""Longest time for each PACE_BYTES of a body, and for what is left at its end; after it the attempt fails."""
PACE_BYTES = 600_000
"""Bytes that must arrive within PACE_SECONDS. So an attempt takes at most 60 s, and 1 s more for each 10 kB.

The limit is low, because many reads share a link, and a read that is stopped starts again. 512 reads at this
pace are 41 Mbit/s.
"""
_RECEIVED_AT_ONCE = 1 << 20
"""Most bytes of one receive; one brings what has arrived by then, which is less."""


class Pace:
    """The time that a body still has."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next()

    def received(self, num_bytes: int) -> None:
        """Count bytes that have arrived. Raises TimeoutError, which is retried, if they come too late."""
        if self._clock() > self._due:
            raise TimeoutError(f"the body brought less than {PACE_BYTES} bytes in {PACE_SECONDS:g} s")
        self._missing -= num_bytes
        if self._missing <= 0:
            self._next()

    def _next(self) -> None:
        self._missing, self._due = PACE_BYTES, self._clock() + PACE_SECONDS


def read_body(body: Any) -> bytes:
    """Return all bytes of botocore's `body`, and close it.

    Raises TimeoutError if it is too slow, Abandoned if nobody awaits it any more, and what botocore raises for a
    wrong length or checksum.
    """
    with body as response:  # urllib3's; its end closes the connection, unless all of the body was read
        check_wanted()
        receive, pace = response.read1, Pace()

        def read(size: int) -> bytes:
            """As the response's own `read`, but return after one receive. `read` waits for all `size` bytes."""
            data: bytes = receive(size)
            pace.received(len(data))
            check_wanted()
            return data

        response.read = read  # which `body.read` calls; it adds the checks of length and checksum
        return b"".join(iter(lambda: body.read(_RECEIVED_AT_ONCE), b""))
